"""From the prearchive to the archive: conflicts, merging, and what an archived session is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .prearchive import Key, Prearchive
from .store import Catalog, Store
from .web import Refusal

PRE_EXISTS = "Session already exists, retry with overwrite enabled"
SUBJECT_MOD = "Invalid modification of session subject via archive process."
UID_MOD = "Invalid modification of session UID via archive process."
MODALITY_MOD = (
    "Invalid modification of session modality via archive process.  Data may require a manual merge."
)
HAS_FILES = "Session already exists with matching files."


@dataclass(frozen=True, slots=True)
class Overwrite:
    """`overwrite` as XNAT parses it: any value but the four known ones merges, even `none`."""

    merge: bool = False
    override: bool = False
    files: bool = False

    @classmethod
    def parse(cls, value: str, files: bool = False) -> Overwrite:
        return cls(merge=bool(value), override=value.lower() in ("delete", "override"), files=files)


@dataclass(frozen=True, slots=True)
class Notice:
    code: int
    type: str
    message: str
    blocks: bool


@dataclass(frozen=True, slots=True)
class Destination:
    project: str
    subject: str
    label: str

    @property
    def parent(self) -> str:
        return f"archive/{self.project}/arc001/{self.label}"

    @property
    def uri(self) -> str:
        return f"/data/archive/projects/{self.project}/subjects/{self.subject}/experiments/{self.label}"


def session_id(row: Any) -> str:
    return f"XNAT_E{row['number']:05d}"


class Archive:
    def __init__(self, store: Store, catalog: Catalog, prearchive: Prearchive) -> None:
        self.store = store
        self.catalog = catalog
        self.prearchive = prearchive

    def session(self, key: str, project: str | None = None) -> Any | None:
        """An archived session by ID, or by label within a project."""
        number = int(key[6:]) if key.startswith("XNAT_E") and key[6:].isdigit() else -1
        return self.store.one(
            "SELECT * FROM session WHERE number=? OR (project=? AND label=?)", number, project, key
        )

    def subject(self, project: str, label: str) -> int:
        known = self.store.one("SELECT number FROM subject WHERE project=? AND label=?", project, label)
        if known:
            return int(known["number"])
        return self.store.run("INSERT INTO subject(project, label) VALUES(?,?)", project, label)

    def create(
        self, to: Destination, uid: str = "", modality: str = "", date: str = "", time: str = ""
    ) -> int:
        self.subject(to.project, to.subject)
        return self.store.run(
            "INSERT INTO session(project, label, subject, uid, modality, date, time) VALUES(?,?,?,?,?,?,?)",
            to.project,
            to.label,
            to.subject,
            uid,
            modality,
            date,
            time,
        )

    # conflicts

    def notices(self, key: Key, to: Destination, overwrite: Overwrite) -> list[Notice]:
        """Everything that speaks against archiving a row, with XNAT's codes, in the order it checks them."""
        row = self.prearchive.row(key)
        existing = self.session(to.label, to.project)
        if existing is None:
            return []
        found = [Notice(1, "CONFLICT", PRE_EXISTS, not overwrite.merge)]
        firm = not overwrite.override
        if existing["subject"] != to.subject:
            found.append(
                Notice(4, "FAIL", f"{SUBJECT_MOD}: {to.label} Already Exists for another Subject", firm)
            )
        if existing["uid"] and row["tag"] and existing["uid"] != row["tag"]:
            found.append(Notice(5, "CONFLICT", UID_MOD, firm))
        if existing["modality"] and row["modality"] and existing["modality"] != row["modality"]:
            found.append(Notice(19, "FAIL", MODALITY_MOD, firm))
        return (
            found
            + self._scan_notices(key.parent, to.parent)
            + self._file_notices(key.parent, to.parent, not (overwrite.files or overwrite.override))
        )

    def _scan_notices(self, source: str, target: str) -> list[Notice]:
        found: list[Notice] = []
        by_id = {scan["id"]: scan["uid"] for scan in self.catalog.scans(target)}
        by_uid = {uid: scan for scan, uid in by_id.items()}
        for scan in self.catalog.scans(source):
            text = f"Session already contains a scan ({scan['id']}) with the same "
            if by_id.get(scan["id"]) == scan["uid"]:
                found.append(Notice(16, "CONFLICT", text + "UID and number.", False))
            elif scan["id"] in by_id:
                found.append(Notice(17, "CONFLICT", text + "number, but a different UID.", False))
            if scan["uid"] in by_uid and by_uid[scan["uid"]] != scan["id"]:
                found.append(Notice(18, "CONFLICT", text + "UID, but a different number.", False))
        return found

    def _file_notices(self, source: str, target: str, blocks: bool) -> list[Notice]:
        uids = {scan["id"]: scan["uid"] for parent in (source, target) for scan in self.catalog.scans(parent)}
        there = self.catalog.files(target)
        names = {(uids.get(e.scan, e.scan), e.resource, e.name) for e in there}
        sops = {e.sop_uid: e.name for e in there if e.sop_uid}
        found: list[Notice] = []
        arriving = self.catalog.files(source)
        if any((uids.get(e.scan, e.scan), e.resource, e.name) in names for e in arriving):
            found.append(Notice(14, "CONFLICT", HAS_FILES, blocks))
        doubles = [e for e in arriving if e.sop_uid in sops and sops[e.sop_uid] != e.name]
        if doubles:
            text = f"{len(doubles)} files have a SOP instance UID that the session already contains."
            found.append(Notice(22, "CONFLICT", text, blocks))
        return found

    # archiving

    def archive(self, key: Key, to: Destination, overwrite: Overwrite) -> str:
        """Archive a row; the URI of the session. A conflict leaves the row in CONFLICT with a log entry."""
        with self.store.transaction():
            row = self.prearchive.lock(key, "ARCHIVING")
            blocking = [notice for notice in self.notices(key, to, overwrite) if notice.blocks]
            if not blocking:
                if self.session(to.label, to.project) is None:
                    self.create(to, row["tag"], row["modality"], row["scan_date"], row["scan_time"])
                    self.catalog.move_all(key.parent, to.parent)
                else:
                    self._merge(key.parent, to.parent, overwrite)
                self.prearchive.forget(key)
                return to.uri
            self.prearchive.fail(key, "CONFLICT", blocking[0].message)
        raise Refusal(409, blocking[0].message)

    def _merge(self, source: str, target: str, overwrite: Overwrite) -> None:
        replaced: set[int] = set()
        scans = {
            scan["id"]: self.catalog.scan_for(
                target, scan["id"], scan["uid"], scan["modality"], scan["description"]
            )
            for scan in self.catalog.scans(source)
        }
        for entry in self.catalog.files(source):
            scan = scans.get(entry.scan, entry.scan)
            number = self.catalog.ensure_resource(target, scan, entry.resource, "DICOM", "RAW")
            if overwrite.override and number not in replaced:
                replaced.add(number)
                for old in self.catalog.files(target, resource=str(number)):
                    self.catalog.remove_file(target, old)
            self.catalog.put(
                target,
                scan,
                entry.resource,
                entry.name,
                self.catalog.path(source, entry.scan, entry.resource, entry.name),
                size=entry.size,
                md5=entry.md5,
                sop_uid=entry.sop_uid,
                format=entry.format,
                content=entry.content,
                tags=entry.tags,
            )
