"""The prearchive: rows, their life cycle, and the filing of received instances."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .dicom import Header, template_name
from .store import Catalog, Store
from .web import Refusal

SIBLINGS = 3  # name, then name_1 … name_3
QUIET = ("READY", "CONFLICT", "ERROR", "RECEIVING", "RECEIVING_INTERRUPT")
CODES = {"0": "Manual", "4": "AutoArchive", "5": "AutoArchiveOverwrite"}


@dataclass(frozen=True, slots=True)
class Key:
    project: str
    timestamp: str
    folder: str

    @property
    def parent(self) -> str:
        return f"prearchive/{self.project}/{self.timestamp}/{self.folder}"

    @property
    def url(self) -> str:
        return f"/prearchive/projects/{self.project}/{self.timestamp}/{self.folder}"

    @classmethod
    def from_url(cls, url: str) -> Key:
        """Key in `[/data]/prearchive/projects/P/TS/FOLDER`."""
        parts = url.strip("/").removeprefix("data/").split("/")
        if len(parts) != 5 or parts[:2] != ["prearchive", "projects"]:
            raise Refusal(400, "src uri is invalid.")
        return cls(*parts[2:])


@dataclass(slots=True)
class Ticket:
    """Where an upload says its instances belong, and how to treat them."""

    project: str
    subject: str
    name: str
    autoarchive: str | None = None
    prevent_anon: bool = False
    prevent_auto_commit: bool = False
    rename: bool = False
    timestamp: str = ""
    folder: str = ""
    extra: dict[str, str] = field(default_factory=dict)  # SOURCE, VISIT, PROTOCOL, TIMEZONE


def now() -> str:
    return datetime.now().isoformat(" ", "milliseconds")


class Prearchive:
    def __init__(self, store: Store, catalog: Catalog) -> None:
        self.store = store
        self.catalog = catalog
        # What a kill cut off in the middle would stay as it is for ever; the staff of a real one resets its status.
        self.store.run("UPDATE row SET status='RECEIVING' WHERE status IN ('BUILDING', 'RECEIVING_INTERRUPT')")

    # rows

    def row(self, key: Key) -> Any:
        row = self.store.one(
            "SELECT * FROM row WHERE project=? AND timestamp=? AND folder=?",
            key.project,
            key.timestamp,
            key.folder,
        )
        if row is None:
            raise Refusal(404, f"The session {key.folder} in {key.project}/{key.timestamp} does not exist.")
        return row

    def rows(self, projects: list[str] | None = None, tag: str = "") -> list[dict[str, Any]]:
        chosen = [
            row
            for row in self.store.all("SELECT * FROM row ORDER BY timestamp")
            if (projects is None or row["project"] in projects) and tag in ("", row["tag"])
        ]
        return [self.describe(row) for row in chosen]

    @staticmethod
    def describe(row: Any) -> dict[str, Any]:
        """A row as XNAT lists it."""
        hidden = {"touched", "built", "folder", "modality"}
        shown = {key: value for key, value in dict(row).items() if key not in hidden}
        for flag in ("prevent_anon", "prevent_auto_commit"):
            shown[flag] = "true" if row[flag] else "false"
        key = Key(row["project"], row["timestamp"], row["folder"])
        return shown | {"folderName": row["folder"], "url": key.url}

    def update(self, key: Key, **values: Any) -> None:
        columns = ", ".join(f"{column}=?" for column in values)
        self.store.run(
            f"UPDATE row SET {columns}, lastmod=? WHERE project=? AND timestamp=? AND folder=?",
            *values.values(),
            now(),
            key.project,
            key.timestamp,
            key.folder,
        )

    def lock(self, key: Key, status: str) -> Any:
        """Take a row for an operation; 409 when another has it."""
        with self.store.transaction():
            row = self.row(key)
            if row["status"] not in QUIET:
                raise Refusal(409, "session document locked")
            self.update(key, status=status)
            return row

    def log(self, key: Key, entry: str) -> None:
        self.store.run("INSERT INTO log VALUES(?,?,?)", key.parent, now(), entry)

    def logs(self, key: Key) -> list[Any]:
        return self.store.all("SELECT at, entry FROM log WHERE parent=? ORDER BY rowid", key.parent)

    def fail(self, key: Key, status: str, entry: str) -> None:
        with self.store.transaction():
            self.update(key, status=status)
            self.log(key, entry)

    def forget(self, key: Key) -> None:
        with self.store.transaction():
            self.catalog.drop(key.parent)
            self.store.run(
                "DELETE FROM row WHERE project=? AND timestamp=? AND folder=?",
                key.project,
                key.timestamp,
                key.folder,
            )

    # receiving

    def _claim(self, ticket: Ticket, header: Header) -> Key:
        """The row for an instance: the existing one if it is free, else a new one or a sibling."""
        for suffix in range(SIBLINGS + 1):
            name = f"{ticket.name}_{suffix}" if suffix else ticket.name
            row = self.store.one(
                "SELECT * FROM row WHERE project=? AND tag=? AND name=?",
                ticket.project,
                header.study_uid,
                name,
            )
            if row is None:
                return self._create(ticket, header, name)
            key = Key(row["project"], row["timestamp"], row["folder"])
            if row["status"] == "BUILDING":
                self.update(key, status="RECEIVING_INTERRUPT", touched=time.time())
                return key
            if row["status"] in QUIET:
                status = row["status"] if row["status"].startswith("RECEIVING") else "RECEIVING"
                self.update(key, status=status, touched=time.time())
                return key
        raise Refusal(400, "Concurrent file sends of the same data is not supported.")

    def _create(self, ticket: Ticket, header: Header, name: str) -> Key:
        moment = datetime.now()
        timestamp, folder = ticket.timestamp, ticket.folder or name
        if not timestamp:
            timestamp = f"{moment:%Y%m%d_%H%M%S}{moment.microsecond // 1000:03d}"
            while self.store.one("SELECT 1 FROM row WHERE timestamp=?", timestamp):
                timestamp = f"{timestamp[:-9]}{int(timestamp[-9:]) + 1:09d}"
        values: dict[str, Any] = {
            "project": ticket.project,
            "timestamp": timestamp,
            "folder": folder,
            "name": name,
            "tag": header.study_uid,
            "subject": ticket.subject,
            "status": "RECEIVING",
            "scan_date": _date(header.study_date),
            "scan_time": _time(header.study_time),
            "modality": header.modality,
            "uploaded": now(),
            "lastmod": now(),
            "touched": time.time(),
            "autoarchive": ticket.autoarchive,
            "prevent_anon": int(ticket.prevent_anon),
            "prevent_auto_commit": int(ticket.prevent_auto_commit),
        } | ticket.extra
        marks = ", ".join("?" for _ in values)
        self.store.run(f"INSERT INTO row({', '.join(values)}) VALUES({marks})", *values.values())
        return Key(ticket.project, timestamp, folder)

    def accept(self, ticket: Ticket, header: Header, name: str, data: bytes, md5: str = "") -> Key:
        """File one instance. Re-sending it under the same name replaces the file.

        A digest may be given that is not that of the data: bit rot after the catalogue was written.
        """
        digest = md5 or hashlib.md5(data, usedforsecurity=False).hexdigest()
        staged = self.catalog.stage(data)
        with self.store.transaction():
            key = self._claim(ticket, header)
            scan = self.catalog.scan_for(
                key.parent,
                header.series_number,
                header.series_uid,
                header.modality,
                header.series_description,
            )
            number = self.catalog.ensure_resource(key.parent, scan, "DICOM", "DICOM", "RAW")
            taken = self.catalog.file(number, name)
            if ticket.rename or not name or (taken and taken["sop_uid"] != header.sop_uid):
                name = template_name(header)
            self.catalog.put(
                key.parent,
                scan,
                "DICOM",
                name,
                staged,
                size=len(data),
                md5=digest,
                sop_uid=header.sop_uid,
                format="DICOM",
                content="RAW",
            )
        return key

    # building

    def build(self, key: Key, pause: float = 0.0) -> str:
        """Build the session document; the status it ends in."""
        self.lock(key, "BUILDING")
        time.sleep(pause)
        with self.store.transaction():
            if self.row(key)["status"] == "RECEIVING_INTERRUPT":  # more came while we were at it
                status = "RECEIVING"
            elif self.catalog.files(key.parent):
                status = "READY"
            else:
                status = "ERROR"
                self.log(key, "No scans were found in the session.")
            self.update(key, status=status, built=1)
        return status

    def idle_rows(self, idle: float) -> list[Key]:
        """Rows the auto-builder would take: quiet for long enough, and nobody asked it to keep away."""
        rows = self.store.all(
            "SELECT * FROM row WHERE status='RECEIVING' AND touched<=? AND NOT prevent_auto_commit"
            " AND coalesce(SOURCE, '') != 'uploader'",
            time.time() - idle,
        )
        return [Key(row["project"], row["timestamp"], row["folder"]) for row in rows]

    def move(self, key: Key, project: str) -> Key:
        with self.store.transaction():
            row = self.lock(key, "MOVING")
            new = Key(project, key.timestamp, key.folder)
            if self.store.one(
                "SELECT 1 FROM row WHERE project=? AND tag=? AND name=?", project, row["tag"], row["name"]
            ):
                raise Refusal(409, "The session already exists in the destination project.")
            self.catalog.move_all(key.parent, new.parent)
            self.update(key, project=project, status=row["status"])
            return new


def _date(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:8]}" if len(value) >= 8 else ""


def _time(value: str) -> str:
    return f"{value[:2]}:{value[2:4]}:{value[4:6]}" if len(value) >= 6 else ""
