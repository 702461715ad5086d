"""Delivery to a central XNAT: zip streams into the prearchive, commit, look in the archive.

The sequence is that of XNAT's own desktop client (DICOM-zip, explicit labels, no auto-commit), made to be repeated
at any point: before anything is sent, and after anything that is unclear, the server is asked what it holds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import requests
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from relay_agent import dicom
from relay_agent.config_destinations import XNAT
from relay_agent.destinations import Finding, Proof, Retry, Stopped, Waiting
from relay_agent.destinations.account import Account, short
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.xnat_raw import XNATRaw
from relay_agent.package import Compression, Item, Manifest, blocks, content, zip_stream
from relay_agent.throttle import Throttle

log = logging.getLogger(__name__)

_BUSY = ("BUILDING", "ARCHIVING", "MOVING", "DELETING", "SEPARATING", "QUEUED", "_", "RECEIVING_INTERRUPT")
_IN_MEMORY = 64 * 2**20  # of a downloaded scan, before it goes to a temporary file


@dataclass(frozen=True, slots=True)
class _File:
    """A file as XNAT lists it; ``md5`` is empty where the site has checksums switched off."""

    name: str
    size: int
    md5: str
    address: str


class XNATDestination(Account):
    """See :class:`relay_agent.destinations.Destination`."""

    def __init__(self, config: XNAT, throttle: Throttle, tokens: Tokens, scratch: Path,
                 projects: Sequence[str] = ()) -> None:
        super().__init__(config, tokens)
        self._throttle = throttle
        self._scratch = scratch
        self._projects = projects
        self._compression = Compression(config.compression)
        self._took: set[int] = set()  # new versions that XNAT took in this run

    def raw(self) -> XNATRaw:
        """Where raw data go at the same XNAT: the same token, and within the same bandwidth and windows."""
        own = self._config.kspace
        return XNATRaw(self._config, Throttle(own.bandwidth, own.windows, self._throttle), self._tokens, self._scratch)

    # The verbs

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        """The items that neither prearchive nor archive holds.

        Where no digest can tell a new version from the old one, it is sent at least once in a run.
        """
        rows, experiment, files = self._held(manifest)
        if location and "/prearchive/" in location and not rows and experiment is None:
            raise Stopped("the session waited in the prearchive and is gone from there, and it is not in the archive "
                          "under its labels. Ask the central site; 'retry' sends it again, 'reject' ends it")
        found = match(manifest, files, self._rewrites(manifest.project))
        return [item for item in manifest.items if item.id not in found or (
            item.replaces and found[item.id].md5 != item.md5 and item.id not in self._took)]

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        """POST one zip; raises unless XNAT names the session in the prearchive that took it."""
        self._throttle.limit()  # raises outside all windows, before a request with labels in it is begun
        deflate = self._compression.deflate()
        start = time.monotonic()
        params = {"import-handler": "DICOM-zip", "PROJECT_ID": manifest.project, "SUBJECT_ID": manifest.subject,
                  "EXPT_LABEL": manifest.session, "rename": "true", "prevent_auto_commit": "true",
                  "SOURCE": "uploader", "AA": "true" if self._wants_archive(manifest) else "false"}
        if self._config.prevent_anon:
            params["prevent_anon"] = "true"
        if manifest.supplement:
            params["overwrite"] = "append"
        body = self._throttle.paced(blocks(zip_stream(part, deflate)))
        answer = self._ask("POST", "/data/services/import", body=body, params=params,
                           headers={"Content-Type": "application/zip"})
        self._compression.learn(deflate, sum(item.size for item in part), time.monotonic() - start)
        uris = self._imported(answer, part)
        wrong = [uri for uri in uris if f"/projects/{manifest.project}/" not in uri + "/"]
        if wrong:
            raise Stopped("XNAT put the session elsewhere, not into the project of the route: "
                          "the project does not exist there or this account may not create sessions in it. Move or "
                          "delete that session in the prearchive, correct the project, then 'retry'")
        self._took.update(item.id for item in part if item.replaces)
        return f"{answer.status_code} {short(' '.join(uris))}"

    def finish(self, manifest: Manifest) -> str:
        """Commit what waits in the prearchive; the archive's (or, where that is accepted, prearchive's) address."""
        rows = self._rows(manifest)
        experiment = self._experiment(manifest)
        for row in rows:
            self._require_idle(row)
            url = f"/data{row['url']}"
            if not self._wants_archive(manifest):
                self._build(row)
                if self._config.accept_prearchive:
                    return url
                raise Waiting("in the prearchive, waits to be archived there", url)
            if experiment is None and row["status"] not in ("CONFLICT", "ERROR"):
                self._commit(row)
            if experiment is not None or self._rows(manifest):
                self._archive(manifest, row)
            experiment = self._experiment(manifest)
        if experiment is None:
            raise Retry("XNAT does not show the session in its archive yet", after=10)
        return f"/data/experiments/{experiment}"

    def prove(self, manifest: Manifest, location: str) -> Sequence[Proof]:
        """Compare every instance with what lies in the archive, by MD5 or by fetching it."""
        if "/prearchive/" in location:
            files = [file for row in self._rows(manifest) for file in self._prearchived(row)]
        else:
            experiment = self._experiment(manifest)
            if experiment is None:
                raise Retry("the session is not in the archive any more")
            files = self._archived(experiment)
        found = match(manifest, files, self._rewrites(manifest.project))
        proofs = {item.id: Proof(item.sop_instance, "md5", found[item.id].name, found[item.id].size)
                  for item in manifest.items if item.id in found and found[item.id].md5 == item.md5}
        rest = {item: found[item.id] for item in manifest.items if item.id in found and item.id not in proofs}
        if rest:
            proofs |= self._fetch(rest)
        lacking = len(manifest.items) - len(proofs)
        if lacking:
            raise Retry(f"{lacking} of {len(manifest.items)} instances are not in the archive as they were sent")
        return [proofs[item.id] for item in manifest.items]

    def check(self) -> Iterator[Finding]:
        """Version, account, token and rights."""
        answer = self._web.ask("GET", "/xapi/siteConfig/buildInfo")
        version = self._web.json(answer, "the version").get("version", "unknown") if answer.ok else "unknown"
        yield Finding(answer.ok, f"{self._web.host}: XNAT {version}", "check url: it must be XNAT's base address")
        try:
            self._tokens.current(self._issue)
            answer = self._ask("GET", "/data/auth")
        except Retry as error:
            yield Finding(False, str(error), "write a valid user:password or alias:secret into the credential file")
            return
        yield Finding(answer.status_code == 200, f"{self._web.host}: logged in",
                      "write a valid user:password or alias:secret into the credential file")
        if self._tokens.trouble:
            yield Finding(False, self._tokens.trouble, "log in again: write a new alias:secret into the credential")
        writable = {str(row.get("id") or row.get("ID")) for row in self._list(
            "/data/projects", permissions="edit", dataType="xnat:subjectData")}
        for project in self._projects:
            yield Finding(project in writable, f"project {project}: may create sessions",
                          f"give this account the member role in project {project}, or create the project")
            if self._rewrites(project):
                yield Finding(True, f"project {project}: XNAT's own scripts change headers there, so arrival is proved "
                                    f"by fetching back ({self._config.verify})")

    # Looking

    def _rows(self, manifest: Manifest) -> list[dict[str, Any]]:
        """This session's rows in the prearchive, oldest first (a busy session gets siblings).

        A row of this study under other labels is not ours: to commit it would archive under those.
        """
        name = re.compile(re.escape(manifest.session) + r"(_\d)?")
        rows = self._list(f"/data/prearchive/projects/{quote(manifest.project)}")
        return sorted((row for row in rows if row.get("tag") == manifest.study_uid and name.fullmatch(
            str(row.get("name"))) and row.get("subject") == manifest.subject), key=lambda row: str(row["timestamp"]))

    def _experiment(self, manifest: Manifest) -> str | None:
        """ID of the archived session; :class:`Stopped` when its label belongs to another study."""
        found = self._session(manifest)
        return str(found["data_fields"]["ID"]) if found is not None else None

    def _held(self, manifest: Manifest) -> tuple[list[dict[str, Any]], str | None, list[_File]]:
        """The session's rows in the prearchive, its ID in the archive, and what files both have.

        XNAT may be moving it from the one to the other, as a commit does that went on after its time-out. Looked at in
        another order, or in the middle of that, it would seem to be nowhere and would be sent again.
        """
        rows = self._rows(manifest)
        files: list[_File] = []
        for row in rows:
            self._require_idle(row)
            files += self._prearchived(row)
        experiment = self._experiment(manifest)
        if experiment is not None:
            files += self._archived(experiment)
        if rows and self._rows(manifest) != rows:
            raise Retry("the session changed in XNAT while it was looked at")
        return rows, experiment, files

    def _archived(self, experiment: str) -> list[_File]:
        base = f"/data/experiments/{quote(experiment)}/scans"
        files: list[_File] = []
        for scan in self._list(base):
            place = f"{base}/{quote(str(scan['ID']))}"
            files += [_file(row) for row in self._list(f"{place}/files")]
        return files

    def _prearchived(self, row: Mapping[str, Any]) -> list[_File]:
        base = f"/data{row['url']}/scans"
        files: list[_File] = []
        for scan in self._list(base):
            place = f"{base}/{quote(str(scan['ID']))}"
            for resource in self._list(f"{place}/resources"):
                label = str(resource.get("label") or "DICOM")
                files += [_file(row) for row in self._list(f"{place}/resources/{quote(label)}/files")]
        return files

    def _rewrites(self, project: str) -> bool:
        """Whether XNAT's own scripts may change the headers of what is sent there."""
        paths = [f"/xapi/anonymize/projects/{quote(project)}/enabled"]
        if not self._config.prevent_anon:
            paths.append("/xapi/anonymize/site/enabled")
        for path in paths:
            answer = self._ask("GET", path)
            if answer.status_code >= 500 or "html" in answer.headers.get("Content-Type", ""):
                raise Retry(self._web.failure(answer, f"GET {path}"))
            # An account that may not ask is told nothing; then a digest that differs proves nothing either way.
            if answer.status_code != 200 or answer.text.strip().strip('"').lower() != "false":
                return True
        return False

    def _wants_archive(self, manifest: Manifest) -> bool:
        return self._config.archive if manifest.auto_archive is None else manifest.auto_archive

    # Answers that mean more than their number

    def _imported(self, answer: requests.Response, part: Sequence[Item]) -> list[str]:
        text = answer.text
        if answer.status_code != 200:
            if "Concurrent file sends" in text:
                raise Retry(f"{self._web.host}: XNAT is still busy with the same data", after=30)
            words = self._web.failure(answer, "the upload")
            if answer.status_code == 403:
                raise Retry(f"{words}: this account may not create sessions in the project; give it the member role")
            if answer.status_code == 413:
                raise Stopped(f"{words}: a proxy refuses parts of this size; set a smaller part_size, then 'retry'")
            # XNAT wraps everything in 400, a full disk too; it does not prove that a file is bad.
            raise Retry(words)
        if "html" in answer.headers.get("Content-Type", ""):
            raise Retry(f"{self._web.host}: a web page came instead of XNAT's answer; does a proxy ask for a login?")
        uris = [line.strip() for line in text.splitlines() if line.strip()]
        if not uris:
            raise Stopped(f"XNAT answered 200 and stored nothing of series {part[0].series_number or '?'}: its series "
                          "import filter or an anonymisation script refuses it. Ask the central site; then 'retry'")
        if text.lstrip().startswith("{") or not all(uri.startswith(("/data/", "/xapi/")) for uri in uris):
            raise Retry(f"{self._web.host}: the upload was answered with something else than addresses; taken as not "
                        "stored")
        return uris

    def _require_idle(self, row: Mapping[str, Any]) -> None:
        status = str(row["status"])
        if status != "RECEIVING" and status.startswith(_BUSY):
            raise Retry(f"XNAT is at work on the session ({status}). Where that has no end, as after a restart in the "
                        "middle of it, somebody there has to reset the session's status in the prearchive", after=10)

    def _build(self, row: Mapping[str, Any]) -> None:
        if row["status"] == "RECEIVING":
            answer = self._ask("POST", f"/data{row['url']}", params={"action": "build"})
            if not answer.ok:
                raise Retry(self._web.failure(answer, "the request to build the session"))

    def _commit(self, row: Mapping[str, Any]) -> None:
        answer = self._ask("POST", f"/data{row['url']}", params={"action": "commit", "SOURCE": "uploader"})
        # 301 archived; 200 only built (the caller looks again); 404 somebody else did it meanwhile
        if answer.status_code in (200, 301, 302, 303, 404):
            return
        if answer.status_code == 409 and "lock" in answer.text.lower():
            raise Retry("XNAT is at work on the session (locked)", after=10)
        if answer.status_code == 409:
            return  # a conflict: _archive() finds out which
        raise Retry(self._web.failure(answer, "the commit"))

    def _archive(self, manifest: Manifest, row: Mapping[str, Any], overwrite: bool = False) -> None:
        """Archive a row that commit left behind; merges only into the archive's own session of this study."""
        data = {"src": str(row["url"]), "project": manifest.project, "subject": manifest.subject,
                "session": manifest.session, "overwrite": "append"}
        overwrite = overwrite or any(item.replaces for item in manifest.items)
        if overwrite:
            data["overwrite_files"] = "true"
        answer = self._ask("POST", "/data/services/archive", params=data)
        if answer.status_code in (200, 301, 303, 404):
            return
        if answer.status_code in (403, 423) and ("progress" in answer.text or answer.status_code == 423):
            raise Retry("XNAT is at work on the session (locked)", after=10)
        if answer.status_code != 409:
            raise Retry(self._web.failure(answer, "the request to archive"))
        left = next((other for other in self._rows(manifest) if other["url"] == row["url"]), None)
        if left is None:
            return  # archived by somebody else; the caller looks
        self._require_idle(left)
        if overwrite or not self._twice(manifest, left):
            raise Stopped(f"{self._web.failure(answer, 'the request to archive')}. The session's log in XNAT's "
                          "prearchive says more; settle the conflict there, then 'retry'")
        self._archive(manifest, left, overwrite=True)

    def _twice(self, manifest: Manifest, row: Mapping[str, Any]) -> bool:
        """Whether all that a row would overwrite in the archive is there already, byte for byte."""
        experiment = self._experiment(manifest)
        there = {file.name: file.md5 for file in self._archived(experiment)} if experiment is not None else {}
        both = [file for file in self._prearchived(row) if file.name in there]
        return bool(both) and all(file.md5 and file.md5 == there[file.name] for file in both)

    # Fetching back

    def _fetch(self, rest: Mapping[Item, _File]) -> dict[int, Proof]:
        """Proofs by content for items whose digest proves nothing; :class:`Stopped` when the content is another."""
        wanted = {item.sop_instance: item for item in rest}
        if self._config.verify == "sample":
            first = {item.series_uid: file for item, file in reversed(list(rest.items()))}
            fetched = (part for file in first.values() for part in self._download(file.address))
        else:
            # By resource, not by scan: raw data may lie beside the DICOM.
            fetched = (part for place in sorted({file.address.partition("/files/")[0] for file in rest.values()})
                       for part in self._download(f"{place}/files", format="zip"))
        proofs: dict[int, Proof] = {}
        other: set[int] = set()
        for name, size, sop, digest in fetched:
            item = wanted.get(sop)
            if item is not None and digest == content(item.path):
                proofs[item.id] = Proof(sop, "content", name, size)
            elif item is not None:
                other.add(item.id)
        if other - proofs.keys():
            self._took -= other
            raise Stopped(f"{len(other - proofs.keys())} of {len(rest)} instances in XNAT are not what was sent, by "
                          "their pixels or content: damaged there, or changed by the central site. Ask there; what is "
                          "deleted there is sent again by 'retry'")
        if self._config.verify == "sample":
            sampled = {item.series_uid for item in rest if item.id in proofs}
            listed = {item.id: Proof(item.sop_instance, "listed", file.name, file.size)
                      for item, file in rest.items() if item.series_uid in sampled}
            return {**listed, **proofs}
        return proofs

    def _download(self, path: str, **params: str) -> Iterator[tuple[str, int, str, bytes]]:
        """Name, size, SOP Instance UID and content digest of a DICOM file, or of each in a zip."""
        answer = self._ask("GET", path, params=params, stream=True)
        if answer.status_code != 200:
            raise Retry(self._web.failure(answer, "the fetch for comparison"))
        with answer, tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(self._scratch)) as spool:
            try:
                for block in answer.iter_content(2**20):
                    spool.write(block)
                if not params:
                    yield from _instance(path.rpartition("/")[2], spool)
                    return
                with zipfile.ZipFile(spool) as archive:
                    for entry in archive.infolist():
                        with archive.open(entry) as file:
                            yield from _instance(entry.filename, file)
            except requests.RequestException as error:
                raise Retry(self._web.words(error)) from error
            except zipfile.BadZipFile:
                raise Retry(f"{self._web.host}: what was fetched for comparison is no whole zip") from None
            except OSError as error:
                raise Retry(f"what was fetched for comparison cannot be written here: {error.strerror}") from error


def match(manifest: Manifest, files: Iterable[_File], rewriting: bool) -> dict[int, _File]:
    """Which listed file is which item, by item id: by MD5, else by name.

    XNAT names a file as it came (``<SOP Instance UID>.dcm``) or by its template
    ``StudyInstanceUID-SeriesNumber-InstanceNumber-hash``. Unless the server's scripts rewrite headers, a file of
    the right name with another digest or size is a damaged one and counts as absent.
    """
    by_md5: dict[str, _File] = {}
    by_name: dict[str, list[_File]] = {}
    for file in files:
        if file.md5:
            by_md5[file.md5] = file
        stem = file.name.removesuffix(".dcm")
        key = stem.rpartition("-")[0] if stem.startswith(f"{manifest.study_uid}-") else stem
        by_name.setdefault(key, []).append(file)
    found: dict[int, _File] = {}
    taken: set[_File] = set()
    for item in manifest.items:
        if item.md5 in by_md5:
            found[item.id] = by_md5[item.md5]
            taken.add(by_md5[item.md5])
    for item in manifest.items:
        if item.id in found:
            continue
        template = f"{manifest.study_uid}-{item.series_number}-{item.instance_number}"
        for file in [*by_name.get(item.sop_instance, []), *by_name.get(template, [])]:
            if file not in taken and (rewriting or (not file.md5 and file.size == item.size)):
                found[item.id] = file
                taken.add(file)
                break
    return found


def _instance(name: str, file: IO[bytes]) -> Iterator[tuple[str, int, str, bytes]]:
    """What :meth:`XNATDestination._download` says of a file; nothing of snapshots and catalogues."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with contextlib.suppress(InvalidDicomError, AttributeError):
        data = dcmread(file)
        yield name, size, str(data.SOPInstanceUID), dicom.content_digest(data)


def _file(row: Mapping[str, Any]) -> _File:
    uri = str(row.get("URI"))
    return _File(str(row["Name"]), int(row.get("Size") or 0), str(row.get("digest") or "").lower(),
                 quote(uri if uri.startswith("/data/") else f"/data{uri}"))
