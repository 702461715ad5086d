"""What happens to the instances of one import request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import identify
from .commit import commit
from .dicom import Header, NotDicom, apply_site_script, read_header
from .prearchive import CODES, Key, Ticket
from .unpack import BadArchive, members
from .web import Refusal, Request, Upload

if TYPE_CHECKING:
    from .central import Central


class Importer:
    def __init__(self, central: Central, request: Request, handler: str) -> None:
        self.central = central
        self.request = request
        self.handler = handler
        self.archived = False
        self.destination = request.get("dest").strip("/").removeprefix("data/").split("/")
        # Given to DICOM-zip, a destination implies a commit, and a commit implies Ignore-Unparsable.
        self.commits = request.get("action") == "commit" or (
            handler != "gradual-DICOM" and self.destination != [""]
        )
        self.lenient = self.commits or request.flag("Ignore-Unparsable")
        self.faults = {
            name: fault
            for name in (
                "empty-list",
                "400-wrap",
                "disk-full",
                "concurrent-400",
                "wrong-project",
                "drop-instances",
                "corrupt-instances",
                "truncate-instances",
            )
            if (fault := central.strike(name, request))
        }

    def run(self, upload: Upload) -> list[str]:
        """URIs of the sessions the upload went to; none if everything was filtered away."""
        if "concurrent-400" in self.faults:
            raise Refusal(400, "Concurrent file sends of the same data is not supported.")
        if "empty-list" in self.faults:
            return []
        keys: dict[Key, Header] = {}
        for index, (name, data) in enumerate(self._entries(upload)):
            accepted = self._accept(index, name, data)
            if accepted:
                keys.setdefault(*accepted)
        if self.handler == "SI" and len(keys) != 1:  # the legacy importer takes exactly one session
            for key in keys:
                self.central.prearchive.forget(key)
            raise Refusal(
                400,
                "Upload included files for multiple imaging sessions."
                if keys
                else "Upload did not include parseable files for session generation.",
            )
        return list(dict.fromkeys(self._finish(key, header) for key, header in keys.items()))

    def _entries(self, upload: Upload) -> Iterator[tuple[str, bytes]]:
        upload.stream.seek(0)
        if self.handler == "gradual-DICOM":
            yield upload.name, upload.stream.read()
            return
        if upload.name == "upload":  # octet-stream: nothing tells XNAT that it is a zip
            raise Refusal(400, "Unable to identify upload format.")
        try:
            yield from members(upload.stream, upload.name)
        except BadArchive as error:
            raise Refusal(400, f"Unable to read the uploaded archive: {error}") from error

    def _accept(self, index: int, path: str, data: bytes) -> tuple[Key, Header] | None:
        name = path.rsplit("/", 1)[-1]
        for fault in ("400-wrap", "disk-full"):  # XNAT reports a full disk in the same words as a bad file
            if fault in self.faults and index >= self.faults[fault]["after"]:
                raise Refusal(400, f"unable to read DICOM object {name}")
        try:
            header = read_header(data)
        except NotDicom:
            if self.lenient and self.handler != "gradual-DICOM":
                return None
            raise Refusal(400, f"unable to read DICOM object {name}") from None
        ticket = self._ticket(header)
        if self.central.store.setting("site_anon") == "true" and not ticket.prevent_anon:
            data = apply_site_script(data, ticket.project, ticket.subject, ticket.name)
        if self._hits("drop-instances", index):
            return None
        md5 = ""
        if self._hits("truncate-instances", index):
            data = data[: int(len(data) * self.faults["truncate-instances"]["keep"])]
        if self._hits("corrupt-instances", index):
            if self.faults["corrupt-instances"]["silent"]:
                md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            data = data[:-1] + bytes(
                [data[-1] ^ 0xFF]
            )  # the last byte is pixel data, the header stays legible
        return self.central.prearchive.accept(ticket, header, name, data, md5), header

    def _hits(self, fault: str, index: int) -> bool:
        return fault in self.faults and index < int(self.faults[fault]["k"])

    def _ticket(self, header: Header) -> Ticket:
        get, request = self.request.get, self.request
        place = dict(zip(self.destination[1::2], self.destination[2::2], strict=False))
        archive = self.destination[0] == "archive"
        pinned = self.destination[3:] if self.destination[0] == "prearchive" else []
        project = self._project(get("PROJECT_ID", "project", default=place.get("projects", "")), header)
        subject = get("SUBJECT_ID", "subject", default=place.get("subjects", "") if archive else "")
        session = (place.get("experiments", "") if archive else "") or get("EXPT_LABEL", "session")
        return Ticket(
            project=project,
            subject=identify.label(subject or identify.subject_label(header)),
            name=identify.label(session or identify.session_label(header)) or "dicom_upload",
            autoarchive=self._autoarchive(header),
            prevent_anon=request.flag("prevent_anon"),
            prevent_auto_commit=request.flag("prevent_auto_commit"),
            rename=request.flag("rename"),
            timestamp=identify.label(get("PREARC_TIMESTAMP", default="".join(pinned[:1]))),
            folder=identify.label(get("PREARC_SESSION_FOLDER", default="".join(pinned[1:2]))),
            extra={name: get(name) for name in ("SOURCE", "VISIT", "PROTOCOL", "TIMEZONE")},
        )

    def _project(self, wanted: str, header: Header) -> str:
        """The project asked for, else the one the header names, else the Unassigned folder."""
        if "wrong-project" in self.faults:
            return str(self.faults["wrong-project"]["project"])
        known = self.central.projects
        return next(
            (name for name in [wanted, *identify.project_candidates(header)] if name in known), "Unassigned"
        )

    def _autoarchive(self, header: Header) -> str | None:
        wish = self.request.get("AA", "auto-archive").lower()
        if not wish and self.destination != [""]:
            wish = "true" if self.destination[0] == "archive" else "false"
        asked = wish == "true" if wish else identify.auto_archive(header)
        return None if asked is None else CODES["4" if asked else "0"]

    def _finish(self, key: Key, header: Header) -> str:
        direct = self.request.flag("Direct-Archive") and key.project != "Unassigned"
        if direct and self.central.archive.session(key.folder, key.project) is None:
            # XNAT keeps such a session open until it is idle; here it is archived at once.
            self.request.query["AA"] = ["true"]
            commit(self.central, self.request, key)
            return f"/xapi/direct-archive/{key.project}/{header.study_uid}/{key.folder}"
        if not self.commits:
            return f"/data{key.url}"
        try:
            archived, uri = commit(self.central, self.request, key)
        except Refusal as refusal:
            if self.handler == "SI":
                raise
            raise Refusal(400, f"unable to archive for the Prearchive session: {refusal.text}") from refusal
        self.archived |= archived
        return uri
