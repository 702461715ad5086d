"""Pick-up of raw data: from the landing directory or by hand into the store and the ledger.

A file is moved, not copied, where it lies on the store's file system. The file is at its place before its row is
written; :func:`recover` puts what a crash left without a row back into the landing directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from relay_agent.book import alive
from relay_agent.config import Config
from relay_agent.config_kspace import KSpaceSource
from relay_agent.deidentify.key import box_key
from relay_agent.journal import sync_folder
from relay_agent.kspace import facts, protocol, room
from relay_agent.kspace.keep import facts_of, hidden
from relay_agent.kspace.twix import NotTwix, Verdict, check, layout
from relay_agent.ledger import Ledger, State, move, note
from relay_agent.spool import PARTIAL, Spool
from relay_agent.stage import Landing

log = logging.getLogger(__name__)

_LABEL = re.compile(r"[A-Za-z0-9_-]+")
_OURS = re.compile(r"[0-9a-f]{64}\.dat")  # a file of the store, put back by recover()
_STALE_LOCK = 86400.0  # seconds: whoever wrote it was interrupted
_SETTLED = 5.0  # seconds after which a file in the store must have its row


@dataclass(frozen=True, slots=True)
class Inspected:
    """What one reading of a file told. ``verdict`` is one of twix.Verdict, or opaque."""

    stamp: tuple[int, int, int]  # inode, bytes, time of the last change (ns)
    verdict: str
    problem: str
    sha256: str
    facts: str  # JSON, see keep.facts_of
    uid: int | None = None  # MeasUID of the imaging scan


OPAQUE = "opaque"
Look = Callable[[Path, bool, bytes], Inspected]


def inspect(path: Path, opaque: bool, key: bytes) -> Inspected:
    """Read a file once: is it whole, what is its digest, what does it say of itself? ``OSError``."""
    status = path.stat()
    found = check(path)
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if opaque:
        return Inspected(stamp, OPAQUE, "", found.sha256, "{}")
    if not found.measurements:
        return Inspected(stamp, found.verdict, found.reason, found.sha256, "{}")
    try:
        said = facts.raw(path, found)
    except protocol.Unreadable as error:
        return Inspected(stamp, found.verdict, found.reason or str(error), found.sha256, "{}")
    uids = [one.uid for one in found.measurements]
    scan = hidden(key, "scan", f"{sorted(said.frames)} {said.serial} {uids}") if said.frames and any(uids) else ""
    told = facts_of(key, said, scan=scan, measurements=uids, readouts=[one.readouts for one in found.measurements],
                    adjustment=facts.is_adjustment(said.protocol))
    return Inspected(stamp, found.verdict, found.reason, found.sha256, told, uids[-1])


class Changed(Exception):
    """The file was changed while it was looked at: somebody still writes it."""


def enter(found: Inspected, path: Path, below: str, source: KSpaceSource, config: Config, ledger: Ledger, key: bytes,
          via: str) -> int | None:
    """Bring an inspected file into store and ledger; the number of its shipment, None when it was here already.

    ``below`` is its path below the landing directory, source first. Durable when this returns; the file has gone from
    ``path`` then. Raises :class:`Changed`, ``OSError``.
    """
    digest = bytes.fromhex(found.sha256)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    status = path.stat()
    if (status.st_ino, status.st_size, status.st_mtime_ns) != found.stamp:
        raise Changed
    row = ledger.one("SELECT id, path, purged FROM instance WHERE digest = ? AND receiver = ?", digest, source.name)
    if row is not None:
        if row["purged"] is None and not (config.spool / row["path"]).exists():  # it was lost, or a crash came between
            _place(path, config.spool / row["path"])
            return None
        with ledger.write() as connection:
            connection.execute("UPDATE instance SET copies = copies + 1 WHERE id = ?", (row["id"],))
        path.unlink()
        return None
    stored = f"{source.name}/{time.strftime('%Y%m%d', time.gmtime())}/{found.sha256}.dat"
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", path.suffix) else ".dat"
    _place(path, config.kspace_spool / stored)
    with ledger.write() as connection:
        return _record(connection, found, stored, suffix, below, source, config, key, via)


def _place(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    for folder in (target.parent, target.parent.parent, target.parent.parent.parent):
        sync_folder(folder)


def _record(connection: sqlite3.Connection, found: Inspected, stored: str, suffix: str, below: str,
            source: KSpaceSource, config: Config, key: bytes, via: str) -> int:
    now, size = time.time(), found.stamp[1]
    number = connection.execute(
        "INSERT INTO instance (receiver, sop_instance, sop_class, transfer_syntax, digest, size, path, via, calling_ae,"
        " arrived) VALUES (?, '', '', '', ?, ?, ?, ?, '', ?)",
        (source.name, bytes.fromhex(found.sha256), size, f"../kspace/spool/{stored}", via, now)).lastrowid
    labels = {} if found.verdict not in (OPAQUE, Verdict.NOT_TWIX) else _labels(config, below)
    shipment = connection.execute(
        "INSERT INTO shipment (study_uid, receiver, supplement, kind, state, opened, last_arrival, changed, project, "
        "subject, session, sources) VALUES (?, ?, 0, 'raw', ?, ?, ?, ?, ?, ?, ?, ?)",
        (found.sha256, source.name, State.COMPLETE, now, now, now, labels.get("project"), labels.get("subject"),
         labels.get("session"), json.dumps(dict.fromkeys(labels, "its path")))).lastrowid
    assert shipment is not None
    connection.execute("UPDATE instance SET shipment = ? WHERE id = ?", (shipment, number))
    said = json.loads(found.facts)
    origin = hidden(key, "file", below)
    name = f"MID{found.uid:05}_{found.sha256[:12]}.dat" if found.uid is not None else f"{found.sha256[:12]}{suffix}"
    connection.execute(
        "INSERT INTO raw (shipment, instance, name, origin, verdict, problem, facts, serial, start, due) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (shipment, number, name, origin, found.verdict, found.problem or None, found.facts, said.get("serial"),
         said.get("start"), now + config.kspace.deadline))
    note(connection, shipment, f"picked up from {source.name} ({via}): {found.verdict}, {size} bytes")
    if found.verdict in (Verdict.COMPLETE, Verdict.ABORTED):
        for old in connection.execute(
                "SELECT s.id FROM raw r JOIN shipment s ON s.id = r.shipment WHERE r.verdict = ? AND s.state = ? AND "
                "s.receiver = ? AND (r.origin = ? OR json_extract(r.facts, '$.scan') = ?)",
                (Verdict.INCOMPLETE, State.HELD, source.name, origin, said.get("scan") or "-")).fetchall():
            move(connection, old["id"], State.REJECTED, f"shipment {shipment} is the whole file",
                 reason=f"shipment {shipment} is the whole file")
    return shipment


def _labels(config: Config, below: str) -> dict[str, str]:
    """Labels of the session that a file in another format belongs to, from where it was put."""
    for route in config.route:
        for pattern in route.kspace.opaque if route.kspace else ():
            if match := re.fullmatch(pattern, below):
                found = {"project": route.assign_project, **match.groupdict()}
                labels = {name: text for name in ("project", "subject", "session") if (text := found.get(name))}
                return labels if all(_LABEL.fullmatch(text) for text in labels.values()) else {}
    return {}


def is_raw(path: Path) -> bool:
    """Whether a file is Siemens raw data, whole or not; ``OSError``."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        layout(file, os.fstat(file).st_size)
    except NotTwix:
        return False
    finally:
        os.close(file)
    return True


def upload(path: Path, below: Path, source: KSpaceSource, config: Config, ledger: Ledger) -> str | None:
    """Take in a copy of a file; why it will be held, or None. Durable when this returns; ``OSError``."""
    key = box_key(config, ledger)
    work = _copied(path, source.name, config)
    try:
        found = inspect(work, source.opaque, key)
        enter(found, work, f"{source.name}/{below}", source, config, ledger, key, "upload")
    finally:
        work.unlink(missing_ok=True)
    if found.verdict in (Verdict.INCOMPLETE, Verdict.NOT_TWIX):
        return f"{found.verdict}: {found.problem}; it is kept, and held"
    return None


def _copied(path: Path, source: str, config: Config) -> Path:
    """A copy in the store, under a name that says who is writing it."""
    size = path.stat().st_size
    if size > room.left(config):
        raise OSError(errno.ENOSPC, "raw data may not take more of the disk (kspace.reserve, kspace.quota)", str(path))
    folder = config.kspace_spool / source
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"{PARTIAL}{os.getpid()}-{time.monotonic_ns()}{path.suffix}"
    try:
        shutil.copyfile(path, work)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    return work


class RawLanding(Landing):
    """The landing directory of raw data, a folder for each source."""

    def __init__(self, config: Config, ledger: Ledger, key: bytes, look: Look) -> None:
        super().__init__(config, ledger, Spool(config.kspace_spool, 0), config.kspace_landing,
                         [source.name for source in config.kspace.source])
        self._sources = {source.name: source for source in config.kspace.source}
        self._key, self._look = key, look
        self._not_whole: dict[Path, tuple[int, int]] = {}

    def _files(self, unread: dict[str, str]) -> Iterator[Path]:
        for path in super()._files(unread):
            if path.name.startswith(".") or path.suffix == ".lock":
                continue
            if not fits(path.name, self._sources[self._name_of(path)]):
                unread[str(path)] = "its name is none of raw data (kspace.source patterns)"
            elif (age := _locked(path)) is None:
                yield path
            elif age > _STALE_LOCK:
                unread[str(path)] = "its .lock is older than a day: whoever wrote it was interrupted"

    def _take(self, path: Path, state: tuple[int, int], present: dict[Path, tuple[tuple[int, int], float]]) -> int:
        waits = (state, time.monotonic())
        source = self._sources[self._name_of(path)]
        old = abs(time.time() - state[1] / 1e9) >= self._config.kspace.incomplete_after
        if _being_written(path) or (self._not_whole.get(path) == state and not old):
            present[path] = waits
            return 0
        try:
            found = self._look(path, source.opaque, self._key)
            if found.verdict == Verdict.INCOMPLETE and not old:
                self._not_whole[path] = state
                present[path] = waits
                return 0
            below = str(path.relative_to(self._folder))
            if self._name_of(path) != below.partition("/")[0]:
                below = f"{source.name}/{below}"
            enter(found, path, below, source, self._config, self._ledger, self._key, "landing")
        except Changed:
            return 0
        except OSError as error:
            log.error("raw data in the landing directory cannot be taken in: %s", error.strerror)
            present[path] = waits
            self._failing[str(path)] = str(error.strerror)
            return 0
        self._failing.pop(str(path), None)
        self._not_whole.pop(path, None)
        self._tidy(path.parent)
        return 1


def fits(name: str, source: KSpaceSource) -> bool:
    """Whether a file is raw data by its name."""
    return _OURS.fullmatch(name) is not None or any(fnmatch(name.lower(), one.lower()) for one in source.patterns)


def _locked(path: Path) -> float | None:
    """Seconds since somebody marked a file as being written (Yarra RDS: a file beside it), None without a mark."""
    for lock in (path.with_name(f"{path.name}.lock"), path.with_suffix(".lock")):
        with suppress(FileNotFoundError):
            return abs(time.time() - lock.stat().st_mtime)
    return None


def _being_written(path: Path) -> bool:
    """Whether somebody has it open for writing, as far as the system tells: of files of other users it does not."""
    try:
        with path.open("rb") as file:
            fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False


def recover(config: Config, ledger: Ledger) -> int:
    """Put files of the store that have no row back into the landing directory; how many. Copies cut off go."""
    known = {row[0] for row in ledger.all("SELECT path FROM instance WHERE path > '../kspace/' AND path < '../kspace0' "
                                            "AND purged IS NULL")}
    found = 0
    for source in config.kspace.source:
        for path in sorted((config.kspace_spool / source.name).rglob("*")):
            with suppress(FileNotFoundError):
                if path.is_dir() or time.time() - path.stat().st_ctime < _SETTLED:
                    continue
                if path.name.startswith(PARTIAL):
                    if not alive(path.name):
                        path.unlink()
                elif f"../kspace/spool/{path.relative_to(config.kspace_spool)}" not in known:
                    path.rename(config.kspace_landing / source.name / path.name)
                    found += 1
    if found:
        log.warning("%d raw data files were found that a crash had kept out of the ledger", found)
    return found
