"""Commands: shown and logged, on the console, in the journal and on the stick."""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("relay-disk")


class Failed(Exception):
    """It cannot go on; the message says why and what to do."""


class Refused(Failed):
    """It must not go on; nothing was changed."""


def ask(*command: str, given: bytes | None = None) -> str:
    """What a command answers that changes nothing on a disk; shown only to those who want every detail."""
    log.debug("$ %s", shlex.join(command))
    return _call(command, given).decode(errors="replace")


def hidden(shown: str, *command: str) -> None:
    """Run a command that changes something and has words that are nobody's; ``shown`` stands for it."""
    log.info("$ %s", shown)
    _call(command, None)


def do(*command: str, given: bytes | None = None) -> str:
    """Run a command that changes something."""
    log.info("$ %s", shlex.join(command))
    return _call(command, given).decode(errors="replace")


def tried(*command: str) -> bool:
    """Run a command whose failure does not matter, or is an answer."""
    log.debug("$ %s", shlex.join(command))
    try:
        _call(command, None)
    except Failed as error:
        log.debug("%s", error)
        return False
    return True


def _call(command: tuple[str, ...], given: bytes | None) -> bytes:
    try:
        done = subprocess.run(command, input=given, capture_output=True, check=False,
                              stdin=subprocess.DEVNULL if given is None else None)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is not installed") from None
    for line in done.stderr.decode(errors="replace").splitlines():
        log.debug("  %s", line)
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise Failed(f"{shlex.join(command)} failed ({done.returncode}): {words}")
    return done.stdout


class _Sink(logging.Handler):
    """Writes to consoles and to the log on the stick; what is gone (a console, the stick) is no reason to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            file.write(self.format(record).encode() + b"\r\n")


def consoles() -> list[Path]:
    """Every console that the kernel writes to: a screen, a serial line, a BMC."""
    active = Path("/sys/class/tty/console/active")
    return [Path("/dev") / name for name in active.read_text().split()] if active.exists() else []


def tell(*places: Path, level: int = logging.INFO) -> None:
    """Show what happens at these places too, with the seconds since the machine was started."""
    for place in places:
        sink = _Sink(place)
        sink.setLevel(level)
        sink.setFormatter(_Elapsed("%(elapsed)7.1f  %(message)s"))
        log.addHandler(sink)


class _Elapsed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.elapsed = time.clock_gettime(time.CLOCK_BOOTTIME)
        return super().format(record)
