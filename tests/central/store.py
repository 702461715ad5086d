"""What survives a restart: an SQLite index beside the files it describes."""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

SCHEMA = """
CREATE TABLE IF NOT EXISTS setting(key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS token(alias TEXT PRIMARY KEY, secret TEXT, user TEXT, expires REAL);
CREATE TABLE IF NOT EXISTS row(
    project TEXT, timestamp TEXT, folder TEXT, name TEXT, tag TEXT, subject TEXT, status TEXT,
    scan_date TEXT, scan_time TEXT, modality TEXT, uploaded TEXT, lastmod TEXT, touched REAL,
    autoarchive TEXT, prevent_anon INTEGER, prevent_auto_commit INTEGER,
    SOURCE TEXT, VISIT TEXT, PROTOCOL TEXT, TIMEZONE TEXT, built INTEGER DEFAULT 0,
    PRIMARY KEY(project, timestamp, folder), UNIQUE(project, tag, name));
CREATE TABLE IF NOT EXISTS log(parent TEXT, at TEXT, entry TEXT);
CREATE TABLE IF NOT EXISTS subject(
    number INTEGER PRIMARY KEY, project TEXT, label TEXT, UNIQUE(project, label));
CREATE TABLE IF NOT EXISTS session(
    number INTEGER PRIMARY KEY, project TEXT, label TEXT, subject TEXT, uid TEXT, modality TEXT,
    date TEXT, time TEXT, UNIQUE(project, label));
CREATE TABLE IF NOT EXISTS scan(
    parent TEXT, id TEXT, uid TEXT, modality TEXT, description TEXT, PRIMARY KEY(parent, id));
CREATE TABLE IF NOT EXISTS resource(
    number INTEGER PRIMARY KEY, parent TEXT, scan TEXT, label TEXT, format TEXT, content TEXT,
    UNIQUE(parent, scan, label));
CREATE TABLE IF NOT EXISTS file(
    resource INTEGER, name TEXT, size INTEGER, md5 TEXT, sop_uid TEXT, format TEXT, content TEXT, tags TEXT,
    PRIMARY KEY(resource, name));
"""


class Store:
    """One connection, one lock: the index is small and every use of it is short."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("incoming", "cache"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(root / "index.sqlite", check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        # Being killed is part of the job, a power cut is not: the page cache survives the former.
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and alone; nests."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def run(self, sql: str, *values: Any) -> int:
        """Execute; the number of rows changed, or for a single INSERT the new row id."""
        with self._lock:
            cursor = self._db.execute(sql, values)
            inserted = sql.startswith("INSERT") and cursor.rowcount == 1
            return (cursor.lastrowid or 0) if inserted else cursor.rowcount

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        with self._lock:
            row: sqlite3.Row | None = self._db.execute(sql, values).fetchone()
            return row

    def setting(self, key: str, default: str = "") -> str:
        row = self.one("SELECT value FROM setting WHERE key=?", key)
        return str(row["value"]) if row else default

    def set(self, key: str, value: str) -> None:
        self.run("REPLACE INTO setting VALUES(?,?)", key, value)


def safe(segment: str) -> str:
    """A label or file name as one path segment that cannot leave its folder."""
    cleaned = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", segment)
    return cleaned if cleaned.strip(".") else "_"


class Staged(NamedTuple):
    """Data that were written and are not entered yet."""

    path: Path
    size: int
    md5: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored file, with what its catalogue says about it."""

    scan: str
    resource: str
    number: int
    name: str
    size: int
    md5: str
    sop_uid: str
    format: str
    content: str
    tags: str


class Catalog:
    """Scans, resources and files of a parent: a prearchive row, an archived session, a project, …

    A parent is named by its folder below the root, so the place of every file follows from the index.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def path(self, parent: str, scan: str, resource: str, name: str) -> Path:
        folder = self.store.root / parent
        folder = folder / "SCANS" / safe(scan) if scan else folder / "RESOURCES"
        return folder.joinpath(safe(resource), *(safe(part) for part in name.split("/") if part))

    def stage(self, data: bytes) -> Path:
        """Write data where a rename will put it in place; the index lock is not held meanwhile."""
        return self.stage_stream(io.BytesIO(data)).path

    def stage_stream(self, stream: BinaryIO) -> Staged:
        """The same of data of any size."""
        path = self.store.root / "incoming" / secrets.token_hex(12)
        md5, size = hashlib.md5(usedforsecurity=False), 0
        with path.open("wb", buffering=0) as out:
            while block := stream.read(1 << 20):
                out.write(block)
                md5.update(block)
                size += len(block)
        return Staged(path, size, md5.hexdigest())

    def scans(self, parent: str) -> list[Any]:
        rows = self.store.all("SELECT * FROM scan WHERE parent=?", parent)
        return sorted(rows, key=lambda row: (not row["id"].isdigit(), row["id"].zfill(12)))

    def scan_for(self, parent: str, number: str, uid: str, modality: str, description: str) -> str:
        """Scan with this series UID; a number taken by another series gets `-MR1`, `-MR2`, …"""
        known = self.store.one("SELECT id FROM scan WHERE parent=? AND uid=?", parent, uid)
        if known:
            return str(known["id"])
        wanted, suffix = number or uid, 0
        while self.store.one("SELECT 1 FROM scan WHERE parent=? AND id=?", parent, wanted):
            suffix += 1
            wanted = f"{number}-{modality or 'OT'}{suffix}"
        self.store.run("INSERT INTO scan VALUES(?,?,?,?,?)", parent, wanted, uid, modality, description)
        return wanted

    def resources(self, parent: str, scan: str | None = None) -> list[Any]:
        return self.store.all(
            "SELECT r.*, count(f.name) AS files, coalesce(sum(f.size), 0) AS bytes FROM resource r"
            " LEFT JOIN file f ON f.resource = r.number WHERE r.parent=? AND (? IS NULL OR r.scan=?)"
            " GROUP BY r.number",
            parent,
            scan,
            scan,
        )

    def resource(self, parent: str, scan: str, key: str) -> Any | None:
        """A resource by label or by number, as XNAT accepts either."""
        return self.store.one(
            "SELECT * FROM resource WHERE parent=? AND scan=? AND (label=? OR number=?)",
            parent,
            scan,
            key,
            int(key) if key.isdigit() else -1,
        )

    def ensure_resource(self, parent: str, scan: str, label: str, format: str = "", content: str = "") -> int:
        known = self.resource(parent, scan, label)
        if known:
            return int(known["number"])
        return self.store.run(
            "INSERT INTO resource(parent, scan, label, format, content) VALUES(?,?,?,?,?)",
            parent,
            scan,
            label,
            format,
            content,
        )

    def files(self, parent: str, scan: str | None = None, resource: str | None = None) -> list[Entry]:
        rows = self.store.all(
            "SELECT r.scan, r.label AS resource, r.number, f.name, f.size, f.md5, f.sop_uid, f.format,"
            " f.content, f.tags FROM file f JOIN resource r ON r.number = f.resource"
            " WHERE r.parent=? AND (? IS NULL OR r.scan=?)"
            " AND (? IS NULL OR r.label=? OR CAST(r.number AS TEXT)=?) ORDER BY r.scan, r.label, f.name",
            parent,
            scan,
            scan,
            resource,
            resource,
            resource,
        )
        return [Entry(**dict(row)) for row in rows]

    def file(self, number: int, name: str) -> Any | None:
        return self.store.one("SELECT * FROM file WHERE resource=? AND name=?", number, name)

    def put(
        self,
        parent: str,
        scan: str,
        resource: str,
        name: str,
        staged: Path,
        *,
        size: int,
        md5: str,
        sop_uid: str = "",
        format: str = "",
        content: str = "",
        tags: str = "",
    ) -> None:
        """Move a staged file into place and enter it, replacing one of the same name."""
        number = self.ensure_resource(parent, scan, resource, format, content)
        path = self.path(parent, scan, resource, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(path)
        self.store.run(
            "REPLACE INTO file VALUES(?,?,?,?,?,?,?,?)",
            number,
            name,
            size,
            md5,
            sop_uid,
            format,
            content,
            tags,
        )

    def remove_file(self, parent: str, entry: Entry) -> None:
        self.store.run("DELETE FROM file WHERE resource=? AND name=?", entry.number, entry.name)
        self.path(parent, entry.scan, entry.resource, entry.name).unlink(missing_ok=True)

    def remove_resource(self, parent: str, number: int) -> None:
        for entry in self.files(parent, resource=str(number)):
            self.remove_file(parent, entry)
        self.store.run("DELETE FROM resource WHERE number=?", number)

    def move_all(self, parent: str, new: str) -> None:
        """Rename a parent that keeps everything it has (a move, or the first archiving of a session)."""
        source, target = self.store.root / parent, self.store.root / new
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            source.rename(target)
        for table in ("scan", "resource", "log"):
            self.store.run(f"UPDATE {table} SET parent=? WHERE parent=?", new, parent)

    def drop(self, parent: str) -> None:
        self.store.run(
            "DELETE FROM file WHERE resource IN (SELECT number FROM resource WHERE parent=?)", parent
        )
        for table in ("scan", "resource", "log"):
            self.store.run(f"DELETE FROM {table} WHERE parent=?", parent)
        shutil.rmtree(self.store.root / parent, ignore_errors=True)
