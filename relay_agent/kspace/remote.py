"""Files on a scanner's back end, by the SSH programs of this machine: listed and fetched with sftp or rsync.

Whatever fails comes as :class:`Failed` with words of ours: what those programs say names files, and files may be named
after patients.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from relay_agent.config import credential_path
from relay_agent.config_kspace import Pull

_LIST = 120.0  # seconds for a list
_LOOK = 1.0  # seconds between looks whether to go on
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": os.environ.get("PATH", "/usr/bin:/bin")}
_OPTIONS = ("BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes", "GlobalKnownHostsFile=/dev/null",
            "HostKeyAlias=imager", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4",
            "ControlPath=none", "ForwardAgent=no", "ClearAllForwardings=yes")
_SFTP = re.compile(r"-\S+ +\S+ +\S+ +\S+ +(\d+) +(\w{3} +\d+ +(?:\d\d:\d\d|\d{4})) (.+)")
_RSYNC = re.compile(r"-\S+ +(\d+) (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) (.+)")
_PLAIN = re.compile(r"[^./\x00-\x1f\x7f\\][^/\x00-\x1f\x7f\\]*")  # a backslash: rsync and sftp escape what is not
_WORDS = (
    ("host key verification failed", "its host key is not the one of host_key. If it was exchanged, ask for the new "
     "one; otherwise somebody else answers there"),
    ("unprotected private key", "the file of key may be read by others; chmod 600"),
    ("not accessible:", "the file of key is not there; write the private key into it"),
    ("load key", "the file of key is no private key, or has a passphrase; write one without"),
    ("permission denied (", "the key is refused; have its public part entered for this account over there"),
    ("could not resolve", "the name of host cannot be resolved; check DNS and host"),
    ("connection refused", "nothing listens there; is it on, does the firewall let us through?"),
    ("connection timed out", "no answer; is it on, does the firewall let us through?"),
    ("no route to host", "there is no way to it; check cable and network"),
    ("no matching", "it is too old for this SSH: name what it speaks in ssh_options"),
    ("failed to exec", "ssh is not installed on this box"),
    ("no such file", "the folder, or a file in it, is not there"),
    ("permission denied", "this account may not read the folder or a file in it"),
    ("no space left", "the disk of this box is full"),
    ("not found", "a program is missing over there; use method sftp, correct list_command"),
)


class Failed(Exception):
    """It did not work; the message is for operators and names no file."""


class Interrupted(Exception):
    """Fetching was ended by the caller; what came so far is kept, and goes on from there."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A file over there: name, bytes, and time of its last change (seconds since 1970; of sftp, minutes)."""

    name: str
    size: int
    changed: float


class Remote:
    """The folder of one imager. ``scratch`` is a folder for the file that holds the host key."""

    def __init__(self, settings: Pull, scratch: Path) -> None:
        self._settings = settings
        self._known = scratch / "known_hosts"
        self.strange = 0
        """Files of the last list whose names no program can be told."""

    def entries(self) -> list[Entry]:
        """What is in the folder, files only, without those whose name begins with a dot or cannot be a name here."""
        if self._settings.method == "rsync":
            out = self._run(["rsync", "--list-only", "--no-human-readable", "--secluded-args", "--timeout=60", "-e",
                             shlex.join(["ssh", *self._ssh()]), f"{self._target}:{self._folder}/"])
            found = ((match[3], int(match[1]), _moment(match[2])) for match in map(_RSYNC.fullmatch, out.splitlines())
                     if match)
        else:
            out = self._sftp(f"cd {_quoted(self._folder)}\nls -ln\n")
            found = ((match[3], int(match[1]), _minute(match[2])) for match in map(_SFTP.fullmatch, out.splitlines())
                     if match)
        files = [Entry(*one) for one in found if not one[0].startswith(".")]
        plain = sorted(entry for entry in files if _PLAIN.fullmatch(entry.name))
        self.strange = len(files) - len(plain)
        return plain

    def scanning(self) -> bool:
        """Whether the scanner's own list shows a running scan; False without such a list."""
        if not self._settings.list_command:
            return False
        out = self._run(["ssh", *self._ssh(), self._target, self._settings.list_command])
        return re.search(self._settings.running, out) is not None

    def fetch(self, entry: Entry, target: Path, bandwidth: float | None, go_on: Callable[[], bool]) -> None:
        """Fetch a file, on from what ``target`` holds of it. ``bandwidth`` in bytes per second.

        Raises :class:`Interrupted` when ``go_on``, asked about once a second, says no; :class:`Failed`.
        """
        if self._settings.method == "rsync":
            limit = [f"--bwlimit={max(int(bandwidth / 1024), 1)}"] if bandwidth else []
            command = ["rsync", "--append", "--times", "--secluded-args", "--timeout=60", *limit, "-e",
                       shlex.join(["ssh", *self._ssh()]), f"{self._target}:{self._folder}/{entry.name}", str(target)]
            self._run(command, go_on=go_on)
        else:
            batch = f"cd {_quoted(self._folder)}\nreget -p {_quoted(entry.name)} {_quoted(str(target))}\n"
            self._sftp(batch, bandwidth, go_on)
        if target.stat().st_size != entry.size:
            raise Failed("a file has not the size that the list says; it is fetched again")

    @property
    def _target(self) -> str:
        host = self._settings.host
        return f"{self._settings.user}@{f'[{host}]' if ':' in host else host}"

    @property
    def _folder(self) -> str:
        return self._settings.folder.rstrip("/") or "/"

    def _ssh(self) -> list[str]:
        self._known.parent.mkdir(parents=True, exist_ok=True)
        self._known.write_text(f"imager {self._settings.host_key}\n", encoding="ascii")
        options = [*self._settings.ssh_options, *_OPTIONS, f"UserKnownHostsFile={self._known}"]
        return ["-F", "none", "-i", str(credential_path(self._settings.key)), "-o", f"Port={self._settings.port}",
                *(part for option in options for part in ("-o", option))]

    def _sftp(self, batch: str, bandwidth: float | None = None, go_on: Callable[[], bool] | None = None) -> str:
        limit = ["-l", str(max(int(bandwidth * 8 / 1000), 1))] if bandwidth else []
        return self._run(["sftp", *self._ssh(), *limit, "-b", "-", self._target], batch, go_on)

    def _run(self, command: list[str], batch: str = "", go_on: Callable[[], bool] | None = None) -> str:
        """Run a program; what it printed."""
        try:
            started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env=_ENVIRONMENT, start_new_session=True)
        except FileNotFoundError:
            raise Failed(f"{command[0]} is not installed on this box") from None
        with started as process:
            until = time.monotonic() + _LIST
            given: bytes | None = batch.encode()
            while True:
                try:
                    out, error = process.communicate(given, timeout=_LOOK)
                    break
                except subprocess.TimeoutExpired:
                    given = None
                if go_on is None and time.monotonic() > until:
                    _end(process)
                    raise Failed(f"no answer within {_LIST:.0f} s")
                if go_on is not None and not go_on():
                    _end(process)
                    raise Interrupted
        if process.returncode:
            raise Failed(_words(error.decode("utf-8", "replace")))
        return out.decode("utf-8", "surrogateescape")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and the ssh that it started."""
    os.killpg(process.pid, 15)
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()


def _words(error: str) -> str:
    lower = error.lower()
    return next((words for sign, words in _WORDS if sign in lower), "the connection broke")


def _quoted(text: str) -> str:
    """A name in a batch of sftp, which takes it as it is between quotes."""
    return '"' + text.replace('"', '\\"') + '"'


def _moment(text: str) -> float:
    return datetime.strptime(text, "%Y/%m/%d %H:%M:%S").replace(tzinfo=UTC).timestamp()


def _minute(text: str) -> float:
    """``Nov 26 00:35`` of the last months, ``Nov 26  2024`` otherwise."""
    if ":" not in text:
        return datetime.strptime(text, "%b %d %Y").replace(tzinfo=UTC).timestamp()
    now = datetime.now(UTC)
    found = datetime.strptime(f"{now.year} {text}", "%Y %b %d %H:%M").replace(tzinfo=UTC)
    if (found - now).days > 1:
        found = found.replace(year=now.year - 1)
    return found.timestamp()
