"""Delivery of raw k-space data to a central XNAT, as files of a resource of their scan or session.

What stands before an XNAT cuts requests after 100 s. So a file that takes longer goes in pieces beside which a manifest
lies, and somebody over there joins them (:mod:`relay_agent.kspace.join`). Before anything is sent, and after anything
that is unclear, XNAT is asked what it holds; only what is missing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from relay_agent.config_destinations import XNAT
from relay_agent.destinations import Finding, Proof, Retry
from relay_agent.destinations.account import Account
from relay_agent.destinations.pieces import Step
from relay_agent.destinations.resource import Listed, Resource
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.upload import Upload, Way
from relay_agent.package import Item, Manifest
from relay_agent.throttle import Throttle

_NOT_YET = 900.0  # seconds between looks for a session that is not in the archive


class XNATRaw(Account):
    """See :class:`relay_agent.destinations.Destination`; for manifests of raw data."""

    def __init__(self, config: XNAT, throttle: Throttle, tokens: Tokens, scratch: Path) -> None:
        super().__init__(config, tokens)
        self._throttle = throttle
        self._way = Way(Step(config.kspace.piece_time, config.part_size), config.kspace.single_request, config.streams,
                        config.kspace.compression == "zstd", scratch, lambda _: None)
        self._uploads: dict[Item, Upload] = {}  # of the manifest that is under way

    def listen(self, go_on: Callable[[int], None]) -> None:
        """Have ``go_on`` called before each request, with the bytes that arrived since; it may wait, or raise."""
        self._way.go_on = go_on

    # The verbs

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        """The files that the resource does not hold, neither whole nor in pieces."""
        resource = self._resource(manifest)
        there = self._files(resource) if resource else {}
        return [upload.item for upload in self._of(manifest) if not upload.held(there)]

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        """Send what is missing of these files; how they went."""
        resource = self._require_resource(manifest)
        resource.make()
        told = [f"{upload.item.sop_instance} {upload.send(resource, lambda: self._files(resource))}"
                for upload in self._of(manifest) if upload.item in part]
        return f"200 {', '.join(told)}"

    def finish(self, manifest: Manifest) -> str:
        """Delete what an earlier try left behind: pieces of a file that is there whole, or that overlap."""
        resource = self._require_resource(manifest)
        there = self._files(resource)
        for upload in self._of(manifest):
            for path in upload.spare(there):
                resource.delete(path)
        return resource.place

    def prove(self, manifest: Manifest, location: str) -> Sequence[Proof]:
        """Compare each file, or each of its pieces, with what lies in the resource: by MD5, or by fetching it."""
        resource = self._require_resource(manifest)
        there = self._files(resource)
        return [self._prove(upload, resource, there) for upload in self._of(manifest)]

    def check(self) -> Iterator[Finding]:
        """Nothing beyond what is checked of the account."""
        yield from ()

    # Looking

    def _of(self, manifest: Manifest) -> list[Upload]:
        self._uploads = {item: self._uploads.get(item) or Upload(item, self._way) for item in manifest.items}
        return list(self._uploads.values())

    def _require_resource(self, manifest: Manifest) -> Resource:
        resource = self._resource(manifest)
        if resource is None:
            raise Retry(f"{self._web.host}: the session that these raw data belong to is not in the archive",
                        after=_NOT_YET)
        return resource

    def _resource(self, manifest: Manifest) -> Resource | None:
        """The resource that takes the files; None while the session is not in the archive."""
        session = self._session(manifest)
        if session is None:
            return None
        place = f"/data/experiments/{quote(str(session['data_fields']['ID']), safe='')}"
        if manifest.scan or manifest.series_uid:
            scans = [one["data_fields"] for child in session.get("children", ()) if child.get("field") == "scans/scan"
                     for one in child["items"]]
            # XNAT gives a series whose number is taken another ID, so the UID comes first.
            found = ([scan["ID"] for scan in scans if manifest.series_uid and scan.get("UID") == manifest.series_uid]
                     or [scan["ID"] for scan in scans if str(scan["ID"]) == manifest.scan])
            if not found:
                raise Retry(f"{self._web.host}: the session has no scan of the series that these raw data belong to",
                            after=_NOT_YET)
            place += f"/scans/{quote(str(found[0]), safe='')}"
        return Resource(f"{place}/resources/{quote(manifest.resource, safe='')}", self._ask, self._web, self._throttle)

    def _files(self, resource: Resource) -> dict[str, Listed]:
        """What the resource holds, by path within it."""
        rows = self._list(f"{resource.place}/files")
        return {str(row.get("URI")).partition("/files/")[2] or str(row.get("Name")): Listed(
            int(row.get("Size") or 0), str(row.get("digest") or "").lower()) for row in rows}

    # Proof

    def _prove(self, upload: Upload, resource: Resource, there: Mapping[str, Listed]) -> Proof:
        item = upload.item
        if upload.whole(there):
            listed = there[item.sop_instance]
            if not listed.md5:
                self._require_same(resource, item.sop_instance, item.size, item.md5)
            return Proof(item.sop_instance, "md5" if listed.md5 else "bytes", item.sop_instance, listed.size)
        if not upload.held(there):
            raise Retry("raw data are not in the archive as they were sent")
        chosen, _ = upload.pieces(there)
        upload.require_content(chosen)
        unsure = [piece for piece in chosen if not there[upload.path(piece)].md5]
        for piece in unsure if self._config.verify == "whole" else unsure[:1]:
            sent = upload.sent(piece)
            self._require_same(resource, upload.path(piece), sent.size, sent.md5)
        return Proof(item.sop_instance, "bytes" if unsure else "md5", f"{len(chosen)} pieces",
                     sum(there[upload.path(piece)].size for piece in chosen))

    @staticmethod
    def _require_same(resource: Resource, path: str, size: int, md5: str) -> None:
        if resource.fetch(path) != (size, md5):
            resource.delete(path)  # by its size it would pass for a good one
            raise Retry("raw data in XNAT are not what was sent, but damaged there; they are deleted and sent again")
