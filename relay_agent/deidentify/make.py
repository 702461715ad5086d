"""Making one de-identified instance of one received: scripts, labels, the search for what they left.

Runs in child processes: a decoder that crashes on a broken image takes one of those down, not the agent.
"""

from __future__ import annotations

import hashlib
import hmac
import resource
import sqlite3
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from relay_agent import dicom, instance
from relay_agent.charset import Undecodable
from relay_agent.dataset import Broken, show
from relay_agent.deidentify import residue, risk
from relay_agent.deidentify.recipe import Recipe, load
from relay_agent.deidentify.script import Context, Failed, Rejected
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from relay_agent.ledger import Ledger

_LABELS = "labels into headers"
_PATIENCE = 900  # seconds of CPU for one instance: a decoder that never ends takes its process with it
_RESIDUE = "search for residues"


@dataclass(frozen=True, slots=True)
class Task:
    """One instance to be made: its number in the ledger, the SHA-256 of its data set, files."""

    instance: int
    digest: bytes
    source: Path
    target: Path


@dataclass(frozen=True, slots=True)
class Made:
    """A de-identified instance as the ledger keeps it; ``risks`` are kinds of :mod:`relay_agent.deidentify.risk`."""

    instance: int
    path: Path
    study_uid: str
    series_uid: str
    sop_instance: str
    sop_class: str
    series_number: str
    instance_number: str
    transfer_syntax: str
    md5: bytes
    sha256: bytes
    size: int
    risks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An instance that is not made: ``rejected`` by a script, or failed; ``why`` holds no value."""

    instance: int
    why: str
    rejected: bool
    damaged: bool = False


def make_all(recipe: Recipe, key: bytes, ledger: Path, now: datetime, tasks: Sequence[Task]) -> list[Made | Refusal]:
    """Make several instances, one after the other, in this process."""
    numbers = Numbers(ledger, key)
    results: list[Made | Refusal] = []
    for task in tasks:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + _PATIENCE, most))
        results.append(make(recipe, key, numbers, now, task))
    return results


def make(recipe: Recipe, key: bytes, numbers: Numbers, now: datetime, task: Task) -> Made | Refusal:
    """Make one instance and write its file; nothing is written when it is refused."""
    try:
        try:
            buffer = instance.read(task.source)
        except FileNotFoundError:
            return Refusal(task.instance, "is missing from the spool", False, damaged=True)
        except OSError as error:
            return Refusal(task.instance, f"cannot be read ({error.strerror})", False, damaged=True)
        file = File.parse(buffer)
        if hashlib.sha256(memoryview(buffer)[file.offset:]).digest() != task.digest:
            return Refusal(task.instance, "is not what was received", False, damaged=True)
        risks = deidentify(recipe, file, context(recipe, key, now, numbers))
        data = file.dataset
        for tag in (dicom.STUDY, dicom.SERIES, dicom.SOP):
            uid = data.text(int(tag, 16))
            if uid and not dicom.UID.fullmatch(uid):  # it becomes part of names over there
                raise Failed(f"the scripts make {show(int(tag, 16))} something that is no UID")
        task.target.unlink(missing_ok=True)
        written = file.write(task.target)
        return Made(task.instance, task.target, data.text(0x0020000D) or "", data.text(0x0020000E) or "",
                    data.text(0x00080018) or "", data.text(0x00080016) or "", (data.text(0x00200011) or "").strip(),
                    (data.text(0x00200013) or "").strip(), file.transfer_syntax, written.md5, written.sha256,
                    written.size, tuple(sorted({found.kind for found in risks})))
    except Rejected as rejected:
        return Refusal(task.instance, str(rejected), True)
    except (Failed, Broken, Undecodable) as error:
        return Refusal(task.instance, str(error), False)
    except MemoryError:
        return Refusal(task.instance, "its pixels need more memory than a process may take", False)
    except RecursionError:
        return Refusal(task.instance, "its sequences are nested too deeply", False)
    except (OSError, sqlite3.Error):  # no room, a ledger that is locked: all of it is done again
        raise
    except Exception as error:  # a fault of ours; without this it would be done again for ever, and nothing else
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Refusal(task.instance, f"a fault of the agent ({type(error).__name__} at {Path(frame.filename).name}:"
                       f"{frame.lineno}), please report it", False)


def context(recipe: Recipe, key: bytes, now: datetime, numbers: Numbers | None = None) -> Context:
    """What the scripts of a recipe are told."""
    return Context(UIDs(key, recipe.project or ""), recipe.project, recipe.subject, recipe.session, now,
                   numbers.number if numbers else None)


def deidentify(recipe: Recipe, file: File, context: Context) -> list[risk.Risk]:
    """Apply a recipe to an object in place; the pixel risks that are left.

    Raises :class:`Failed`, :class:`Rejected`.
    """
    found, risks = apply(recipe, file, context)
    if found:
        raise Failed(f"{some(found)}; extend the script, or list the tag in the route's keep if the project may "
                     "have it", _RESIDUE)
    return risks


def apply(recipe: Recipe, file: File, context: Context) -> tuple[list[residue.Residue], list[risk.Risk]]:
    """As :func:`deidentify`; the residues and the pixel risks that are left."""
    identifiers = residue.identifiers(file.dataset, recipe.search, recipe.labels)
    # Of the object as it came: a script may delete the very elements that tell of the risk.
    before = risk.risks(file.dataset, file.transfer_syntax)
    for step in recipe.steps:
        load(step).apply(file, context)
    context.rule = _LABELS
    for tag, text in recipe.headers:
        try:
            file.dataset.put_text(tag, text)
        except Undecodable:
            raise Failed(f"the text for {show(tag)} does not fit the character set of the object", _LABELS) from None
    found = residue.search(file.dataset, identifiers, recipe.keep)
    return found, risk.risks(file.dataset, file.transfer_syntax, before, file.painted)


def some(found: Sequence[residue.Residue]) -> str:
    """Residues for people: the first, and how many more."""
    return f"{found[0]}, and {len(found) - 1} more" if len(found) > 1 else str(found[0])


class Numbers:
    """Running numbers that scripts give to values (CTP ``@integer``), in the ledger; values only as keyed hashes."""

    def __init__(self, ledger: Path, key: bytes) -> None:
        self._path = ledger
        self._key = key
        self._ledger: Ledger | None = None

    def number(self, kind: str, value: str) -> int:
        """The number of a value; a new one gets the next."""
        self._ledger = self._ledger or Ledger(self._path)
        hidden = hmac.digest(self._key, f"number\0{kind}\0{value}".encode(), "sha256")
        with self._ledger.write() as connection:
            connection.execute("INSERT OR IGNORE INTO number SELECT ?1, ?2, coalesce(max(number), 0) + 1 FROM number "
                               "WHERE kind = ?1", (kind, hidden))
            return int(connection.execute("SELECT number FROM number WHERE kind = ? AND value = ?",
                                          (kind, hidden)).fetchone()["number"])
