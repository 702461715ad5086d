"""Making what leaves of raw data. Runs in a child process: a file that makes a parser fail takes that down, no more."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay_agent import __version__
from relay_agent.charset import Undecodable
from relay_agent.config_kspace import RouteKSpace
from relay_agent.dataset import Broken
from relay_agent.deidentify.residue import PATIENT
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from relay_agent.kspace import facts, protocol
from relay_agent.kspace.scrub import VERSIONS, Held, plan, scrub
from relay_agent.kspace.twix import NotTwix, layout

_PIXELS = 0x7FE00000
_BLOCK = 2**20
_PATIENCE, _PACE = 900, 20e6  # seconds of CPU for a file, and for so many bytes one more


@dataclass(frozen=True, slots=True)
class Task:
    """A file to be made: from which, how, and which DICOM files tell who must not be named in it."""

    source: Path
    sha256: str  # of the source, as it was picked up
    target: Path
    project: str
    settings: RouteKSpace
    scrub: bool
    dicom: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """What leaves: the file and its digests, and the report (no values)."""

    path: Path
    size: int
    md5: bytes
    sha256: bytes
    report: dict[str, Any]


def recipe_hash(settings: RouteKSpace, project: str, session: int, scrubbed: bool) -> str:
    """SHA-256 of all that decides what a file will be made of raw data."""
    facts = [scrubbed, sorted(settings.keep), sorted(settings.versions), project, session, __version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make(task: Task, key: bytes) -> Made | str:
    """Make one file, or say why not: words for people, without a value. ``OSError`` when it is to be tried again."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    allowed = used.ru_utime + used.ru_stime + _PATIENCE + task.source.stat().st_size / _PACE
    resource.setrlimit(resource.RLIMIT_CPU, (int(allowed), most))
    try:
        return _scrubbed(task, key) if task.scrub else _as_it_is(task)
    except FileNotFoundError:
        return "its file is missing from the store. Fetch it again, look after the disk, then 'retry'"
    except (Held, NotTwix) as error:
        return f"it must not leave: {error}"
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a fault of ours; without this it would be done again for ever, and nothing else
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (f"a fault of the agent ({type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}), "
                "please report it")


_DAMAGED = "its file is not what was picked up. Fetch it again, look after the disk, then 'retry'"


def _scrubbed(task: Task, key: bytes) -> Made | str:
    task.target.parent.mkdir(parents=True, exist_ok=True)
    task.target.unlink(missing_ok=True)
    known = sorted(identifiers(task.dicom))
    made = plan(task.source, UIDs(key, task.project), task.settings.keep, VERSIONS.union(task.settings.versions), known)
    done = scrub(task.source, made, task.target, md5=True)
    if done.check.sha256 != task.sha256:
        task.target.unlink()
        return _DAMAGED
    with task.target.open("rb") as file:
        os.fsync(file.fileno())
    told = facts.describe(task.target, done.check)
    return Made(task.target, done.check.size, bytes.fromhex(done.md5), bytes.fromhex(done.sha256), {
        "scrubbed": True, "kept": sorted(task.settings.keep), "searched_for_identifiers_of_the_session": bool(known),
        "replaced": [{"where": where, "what": kind, "count": count} for where, kind, count in made.report],
        "version": told.version, "protocol": told.name, "scanner": told.scanner})


def _as_it_is(task: Task) -> Made | str:
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with task.source.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            md5.update(block)
            sha256.update(block)
            size += len(block)
    if sha256.hexdigest() != task.sha256:
        return _DAMAGED
    return Made(task.source, size, md5.digest(), sha256.digest(), {"scrubbed": False})


def identifiers(files: Iterable[Path]) -> set[str]:
    """What DICOM files, as they were received, say of the patient. Files that have gone say nothing."""
    found: set[str] = set()
    for path in files:
        with suppress(FileNotFoundError, Broken):
            data = File.read(path, _PIXELS).dataset
            for tag in PATIENT:
                with suppress(Undecodable):
                    found.update((data.text(tag) or "").split("\\"))
    return {text.strip(" \0") for text in found} - {""}


def protocol_name(path: Path) -> str:
    """The protocol's name as the file has it; empty when it does not say. ``OSError``."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = layout(file, os.fstat(file).st_size)
        for _, _, text in protocol.texts(file, found.measurements[-1]):
            if name := protocol.first(text, "tProtocolName", "ProtocolName"):
                return name.decode("utf-8", "replace")
    except (NotTwix, protocol.Unreadable):
        pass
    finally:
        os.close(file)
    return ""
