"""A scanner's back end: a real SSH server on the loopback with raw data in a folder."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from relay_agent.config_text import toml
from tests.bench.meter import tree
from tests.harness import wait_for

SSHD = "/usr/sbin/sshd"


class Imager:
    """`with` starts it. Its keys are made for this test, and nobody else may log in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw data"  # with a space, as people name folders
        self.raw.mkdir(parents=True)
        for name in ("host", "host2", "client", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name)],
                           check=True)
        self.host_key = (folder / "host.pub").read_text().strip()
        self.port = _free()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "sshd.log"

    def start(self, host: str = "host") -> Imager:
        """Start the server, with another key for its host if wanted."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        (self.folder / "sshd_config").write_text("\n".join((
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder / host}", "UsePAM no",
            f"AuthorizedKeysFile {self.folder / 'client.pub'}", "StrictModes no", "PasswordAuthentication no",
            "PermitRootLogin prohibit-password", "Subsystem sftp internal-sftp", "PidFile none", "LogLevel ERROR")))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=log)
        wait_for(self._answers, 20, f"sshd: {self.log.read_text()}")
        return self

    def stop(self) -> None:
        """Stop it, and what it forked for those who are logged in."""
        if self.process is not None:
            for process in reversed(tree([self.process.pid])):
                with suppress(ProcessLookupError):
                    os.kill(process, 9)
            self.process.wait(10)
            self.process = None

    def __enter__(self) -> Imager:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The table [kspace.source.pull]."""
        return {"host": "127.0.0.1", "port": self.port, "user": getpass.getuser(), "key": str(self.folder / "client"),
                "host_key": self.host_key, "folder": str(self.raw), "poll": "1 s", "everything": True,
                "smallest": "0 B"} | changes

    def table(self, **changes: Any) -> str:
        """The same as text."""
        return "[kspace.source.pull]\n" + "\n".join(f"{name} = {toml(value)}" for name, value in
                                                    self.settings(**changes).items()) + "\n"

    def write(self, name: str, content: bytes, age: float = 3600) -> Path:
        """Put a file there, written so many seconds ago."""
        path = self.raw / name
        path.write_bytes(content)
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


def _free() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
