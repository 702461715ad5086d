"""The agent as a user runs it: processes of their own, a configuration file, real ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from relay_agent import config, report
from relay_agent.ledger import Ledger
from tests.undisturbed import no_delay, undisturbed

PROJECT = Path(__file__).resolve().parent.parent
SECRET = "relay:s3cret-of-the-tests"


PATIENCE = 180.0  # seconds; what a test waits for comes at once, unless the machine is very busy


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE, say: str = "") -> Any:
    """Wait until something is true; its value. Fails with ``say`` otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = what()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s in vain: {say or what}")


class Agent:
    """One box: configuration, data folder and the processes of its services."""

    def __init__(self, folder: Path, settings: str = "", *, receivers: str | None = None, stage: str | None = None,
                 general: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "config.toml"
        secret = folder / "secret"
        secret.write_text(SECRET, encoding="utf-8")
        secret.chmod(0o600)
        self.file.write_text("\n".join((
            'name = "box"', f'data = "{folder / "data"}"', general,
            '[receive]\nreserve = "10 MB"\nprocesses = 2\njournal = "8 MiB"' if "[receive]" not in settings else "",
            receivers or '[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]',
            stage or '[stage]\nquiet = "1 s"\nlonging = "1 min"'.replace("longing", "longest")
            + '\nlanding_stable = "1 s"\nrescan = "2 s"',
            settings)), encoding="utf-8")
        self.config = config.load(self.file)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    @property
    def port(self) -> int:
        return self.ports["RELAY"]

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.config.ledger)

    def start(self, *services: str) -> Agent:
        """Start services (both by default) and wait until they are up."""
        for service in services or ("receive", "work"):
            ready = self.folder / "ports.json"
            command = [sys.executable, "-m", "relay_agent", service, "--config", str(self.file)]
            if service != "work":
                ready.unlink(missing_ok=True)
                command += ["--ready", str(ready)]
            output = (self.folder / f"{service}.log").open("ab")
            process = self.processes[service] = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output)
            if service != "work":
                wait_for(lambda ready=ready, process=process: _text(ready) or process.poll() is not None, say=service)
                assert process.poll() is None, f"{service} did not start: {self.log[-3000:]}"
                self.ports = json.loads(_text(ready))
        return self

    def stop(self, *services: str, kill: bool = False) -> None:
        """Stop services by SIGTERM, or kill them with everything that they forked."""
        for service in services or tuple(self.processes):
            process = self.processes.pop(service)
            children = _children(process.pid)
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            if kill:
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
            process.wait(PATIENCE)

    @property
    def log(self) -> str:
        """What the services wrote."""
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("*.log")))

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the console script."""
        command = [sys.executable, "-m", "relay_agent", *arguments, "--config", str(self.file)]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        done = self.cli(*arguments, "--json")
        return json.loads(done.stdout)

    def status(self) -> dict[str, Any]:
        """What ``relay-agent status --json`` prints, without the cost of a process, for questions that are repeated."""
        return report.status(self.config, self.ledger)

    def wait_state(self, state: str, instances: int) -> None:
        """Wait until so many instances are in shipments of that state."""
        ledger = self.ledger
        try:
            wait_for(lambda: (ledger.value("SELECT sum(instances) FROM shipment WHERE state = ?", state) or 0)
                     >= instances)
        except AssertionError:
            raise AssertionError(f"{instances} instances do not become {state}: {self.cli('status').stdout}\n"
                                 f"{self.log[-3000:]}") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        found = [int(child) for child in text.split()]
        return found + [grandchild for child in found for grandchild in _children(child)]
    return []


@contextlib.contextmanager
def running(agent: Agent, *services: str) -> Iterator[Agent]:
    """An agent that is stopped at the end, whatever happens."""
    try:
        yield agent.start(*services)
    finally:
        agent.stop(kill=True)


def send(port: int, images: Sequence[Dataset], *, calling: str = "SCANNER", called: str = "RELAY",
         host: str = "127.0.0.1") -> list[int]:
    """Send images over one association with pynetdicom; the status of each; -1: not accepted or no answer."""
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = PATIENCE
    for sop_class, syntax in {(image.SOPClassUID, image.file_meta.TransferSyntaxUID) for image in images}:
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate(host, port, ae_title=called, evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)])
    assert association.is_established, "the association was not accepted"
    statuses = []
    with undisturbed(association):
        for image in images:
            try:
                status = association.send_c_store(image)
            except ValueError:  # its presentation context was not accepted
                statuses.append(-1)
                continue
            except RuntimeError:  # the association has ended
                break
            if "Status" not in status:
                break
            statuses.append(int(status.Status))
    lost = len(images) - len(statuses)
    association.abort() if lost else association.release()
    return statuses + [-1] * lost


def xnat(url: str, folder: Path, ca: Path | None = None, more: str = "", *, name: str = "central",
         route: str = "") -> str:
    """Settings that deliver everything to an XNAT."""
    bundle = f'ca_bundle = "{ca}"' if ca else ""
    return (f'[[destination]]\nname = "{name}"\nurl = "{url}"\ncredential = "{folder / "secret"}"\n{bundle}\n'
            f'retry_first = "1 s"\nretry_longest = "5 s"\ntimeout = "20 s"\n{more}\n'
            f'[[route]]\nname = "all"\ndestinations = ["{name}"]\n{route}\n')
