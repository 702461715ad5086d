"""What every stage needs: commands with clear failures, progress, the folders, and Debian's mirrors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FILES = PROJECT / "image/files"
OUTPUT = PROJECT / "build/image"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relay-image"
SUITE = "trixie"
LOCK = PROJECT / "image/packages.lock"


def epoch() -> int:
    """The date of all that a build writes, in seconds since 1970: the day that the packages were locked."""
    for line in LOCK.read_text().splitlines() if LOCK.exists() else ():
        if line.startswith("date "):
            return int(datetime.fromisoformat(f"{line.split()[1]}T00:00:00+00:00").timestamp())
    return int(time.time()) // 86400 * 86400


EPOCH = epoch()
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/root",
               "SOURCE_DATE_EPOCH": str(EPOCH)}


class Failed(Exception):
    """The build cannot go on; the text says why and what to do."""


def run(*command: str | Path, **options: object) -> str:
    """Run a command in an environment that is the same everywhere; what it printed.

    Raises Failed with the end of what the command said.
    """
    words = [str(word) for word in command]
    options.setdefault("env", ENVIRONMENT)
    done = subprocess.run(words, text=True, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])
        raise Failed(f"{' '.join(words)[:300]} failed:\n{said}")
    return str(done.stdout)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is being done and, when it is done, how long it took."""
    start = time.monotonic()
    print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True, file=sys.stderr)


def room(folder: Path, needed: int) -> None:
    """Raise Failed where less than ``needed`` bytes are free; a disk that fills half way tells less plainly."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Failed(f"{free / 1e9:.1f} GB are free for {folder}, and building needs {needed / 1e9:.0f} GB there; "
                     "nothing was built. Make room, or name another folder: with --output for the image, with "
                     "XDG_CACHE_HOME in the environment for the cache")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tag(*facts: object) -> str:
    """Short name for what is made from these facts, for the cache."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def mirrors() -> dict[str, str]:
    """Addresses of Debian and of its security updates by label, as this machine's own apt has them."""
    lines = run("apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Origin: Debian").splitlines()
    found = {label: address for label, _, address in (line.partition("|") for line in lines)}
    if "Debian" not in found:
        raise Failed("apt knows no Debian mirror; name one in /etc/apt/sources.list.d and run: apt-get update")
    return found
