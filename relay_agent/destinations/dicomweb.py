"""Delivery to a DICOMweb archive: STOW-RS to send, QIDO-RS to look, WADO-RS to prove (PS3.18 chapter 10)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import requests

from relay_agent import dicom
from relay_agent.config import ConfigError, secret
from relay_agent.config_destinations import DICOMweb
from relay_agent.destinations import DeliveryError, Finding, Proof, Retry, Stopped
from relay_agent.destinations.dicom import meaning
from relay_agent.destinations.multipart import Multipart, read_parts
from relay_agent.destinations.web import Web
from relay_agent.package import Item, Manifest, content
from relay_agent.throttle import Throttle

_JSON = "application/dicom+json"
# "*" is the stored transfer syntax; without it an archive may decompress what it gives back (PS3.18 section 8.7.3.5.2)
_INSTANCES = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_BLOCK = 2**20
_PAGE = 1000  # instances asked for at a time

# Attributes of the answer to STOW-RS (PS3.18 table 10.5.3-1) and of QIDO-RS
_SOP, _REFERENCED, _FAILED, _OTHER_FAILURES = "00080018", "00081199", "00081198", "0008119A"
_REFERENCED_SOP, _REASON, _WARNING = "00081155", "00081197", "00081196"
_ALREADY_THERE = frozenset({0x0111, 0xB00E})  # duplicate SOP instance (PS3.7 C.5.5); Azure's code for the same

_CREDENTIAL = "Write a valid user:password into the credential file, or give this account the right to store and read"


class DICOMwebDestination:
    """See :class:`relay_agent.destinations.Destination`.

    What lasts until somebody mends the server or the line, and then goes away by itself (a wrong credential too), is
    :class:`Retry`; an instance or a part that this server will not take however often it is sent is :class:`Stopped`.
    """

    def __init__(self, config: DICOMweb, throttle: Throttle) -> None:
        self._config = config
        self._throttle = throttle
        self._web = Web(config, None)
        self._replaced: set[tuple[str, str]] = set()  # new versions that the server took in this run

    trouble = ""  # its credential does not expire

    def idle(self) -> None:
        """Nothing here expires."""

    # The verbs

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        """The items that the archive does not list; new versions are fetched and compared, as both have one UID."""
        listed = self._listed(manifest.study_uid)
        out = [item for item in manifest.items if item.sop_instance not in listed]
        kept = 0
        for item in manifest.items:
            if item.replaces and item.sop_instance in listed and not self._retrieved(manifest, item):
                out.append(item)
                kept += (item.sop_instance, item.sha256) in self._replaced
        if kept:
            self._replaced.clear()
            raise Stopped(f"{self._web.host}: took new versions of {kept} instances and still gives back the old ones. "
                          "Delete those there or allow it to overwrite, then 'retry'")
        return out

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        """STOW-RS of one part; raises unless the answer names each of its instances as stored."""
        self._throttle.limit()  # raises outside all windows, before a request is begun
        body = Multipart([item.path for item in part], self._throttle)
        answer = self._ask("POST", f"/studies/{manifest.study_uid}", body=body,
                           headers={"Content-Type": body.content_type, "Accept": _JSON})
        if answer.status_code == 413:
            raise Stopped(f"{self._web.failure(answer, 'a part')}: it is too large for the server or a proxy; set a "
                          "smaller part_size, then 'retry'")
        if answer.status_code == 415:
            raise Stopped(f"{self._web.failure(answer, 'a part')}: it does not take these SOP Classes or transfer "
                          "syntaxes; allow them there, then 'retry'")
        if answer.status_code not in (200, 202, 400, 409):
            raise Retry(self._web.failure(answer, "a part"))
        return self._stored(answer, part)

    def finish(self, manifest: Manifest) -> str:
        """Nothing is left to do: STOW-RS is final."""
        return f"studies/{manifest.study_uid}"

    def prove(self, manifest: Manifest, location: str) -> Sequence[Proof]:
        """Fetch back and compare all instances, or with ``verify = "sample"`` one of each series and list the rest."""
        proofs: dict[int, Proof] = {}
        if self._config.verify == "sample":
            listed = self._listed(manifest.study_uid)
            seen: set[str] = set()
            for item in manifest.items:
                if item.replaces or item.series_uid not in seen:
                    seen.add(item.series_uid)
                    proofs |= self._retrieved(manifest, item)
                elif item.sop_instance in listed:
                    proofs[item.id] = Proof(item.sop_instance, "find")
        else:
            for series, items in groupby(sorted(manifest.items, key=_series_of), key=_series_of):
                proofs |= self._series(manifest, series, list(items))
        lacking = len(manifest.items) - len(proofs)
        if lacking:
            raise Retry(f"{self._web.host}: {lacking} of {len(manifest.items)} instances are not there as they were "
                        "sent")
        return [proofs[item.id] for item in manifest.items]

    def check(self) -> Iterator[Finding]:
        """Reachability, credential, and that it is DICOMweb that answers."""
        try:
            answer = self._ask("GET", "/studies", params={"limit": "1"}, headers={"Accept": _JSON})
            if answer.status_code == 200:
                self._web.json(answer, "QIDO-RS")
        except DeliveryError as error:
            yield Finding(False, str(error), "mend this, then check again")
            return
        yield Finding(answer.status_code in (200, 204), f"{self._web.host}: QIDO-RS was answered {answer.status_code}",
                      "check url: it must be the base address of DICOMweb, without /studies")

    # Talking to the archive

    def _ask(self, method: str, path: str, **request: Any) -> requests.Response:
        """A request with the credential as it is in its file now, so that mending the file is enough."""
        try:
            self._web.auth = secret(self._config.credential) if self._config.credential else None
        except ConfigError as error:
            raise Retry(str(error)) from None
        answer = self._web.ask(method, path, **request)
        if answer.status_code in (401, 403):
            raise Retry(f"{self._web.host}: answered {answer.status_code}. {_CREDENTIAL}")
        if answer.is_redirect:
            raise Retry(f"{self._web.host}: sends us elsewhere ({answer.status_code}); does a proxy ask for a login, "
                        "or is url out of date?")
        return answer

    def _listed(self, study: str) -> set[str]:
        """SOP Instance UIDs of the study (QIDO-RS, PS3.18 section 10.6), page by page."""
        listed: set[str] = set()
        offset = 0
        while True:
            answer = self._ask("GET", f"/studies/{study}/instances", headers={"Accept": _JSON}, params={
                "includefield": _SOP, "limit": str(_PAGE), "offset": str(offset)})
            if answer.status_code in (204, 404):
                return listed
            if answer.status_code != 200:
                raise Retry(self._web.failure(answer, "QIDO-RS"))
            rows = self._web.json(answer, "QIDO-RS")
            if not isinstance(rows, list):
                raise Retry(f"{self._web.host}: QIDO-RS was answered with no list")
            page = {_first(row, _SOP) for row in rows if isinstance(row, dict)}
            # A server may give fewer than asked for, or all of them at every page: only a page of nothing new ends it.
            if page <= listed:
                return listed
            listed |= page
            offset += len(rows)

    def _stored(self, answer: requests.Response, part: Sequence[Item]) -> str:
        """What the answer to STOW-RS says; status codes alone say nothing (an Orthanc with a full disk answers 200)."""
        outcome = _dataset(answer)
        if answer.status_code >= 400 and not outcome:
            raise Retry(self._web.failure(answer, "a part"))
        references = list(_sequence(outcome, _REFERENCED))
        stored = {_first(row, _REFERENCED_SOP) for row in references}
        reasons = {_first(row, _REFERENCED_SOP): _number(row, _REASON) for row in _sequence(outcome, _FAILED)}
        others = Counter(_number(row, _REASON) for row in _sequence(outcome, _OTHER_FAILURES))
        lacking = [item for item in part if item.sop_instance not in stored
                   and (item.replaces or reasons.get(item.sop_instance) not in _ALREADY_THERE)]
        self._replaced |= {(item.sop_instance, item.sha256) for item in part if item.replaces and item not in lacking}
        if not lacking:
            warned = sum(_WARNING in row for row in references)
            return f"{answer.status_code} {len(part)} stored" + (f", {warned} with warnings" if warned else "")
        counts = Counter(reasons.get(item.sop_instance) for item in lacking)
        if others and counts.pop(None, 0):
            counts += others
        message = (f"{self._web.host}: answered {answer.status_code} and did not store {len(lacking)} of {len(part)} "
                   "instances: " + "; ".join(f"{count} × {_words(reason)}" for reason, count in counts.items()))
        if any(reason is None or (reason not in _ALREADY_THERE and meaning(reason)[0]) for reason in counts):
            raise Retry(message)
        raise Stopped(message)

    # Fetching back (WADO-RS, PS3.18 section 10.4)

    def _series(self, manifest: Manifest, series: str, items: Sequence[Item]) -> dict[int, Proof]:
        """Proofs from the series as a whole; one by one when the server or the line cannot do that."""
        proofs: dict[int, Proof] = {}
        try:
            if not self._compare(f"/studies/{manifest.study_uid}/series/{series}", items, proofs):
                return proofs
        except Retry:  # what came before the line broke is proved; if it stays broken, the next request tells
            pass
        for item in items:
            if item.id not in proofs:
                proofs |= self._retrieved(manifest, item)
        return proofs

    def _retrieved(self, manifest: Manifest, item: Item) -> dict[int, Proof]:
        proofs: dict[int, Proof] = {}
        path = f"/studies/{manifest.study_uid}/series/{item.series_uid}/instances/{item.sop_instance}"
        refusal = self._compare(path, [item], proofs)
        if refusal:
            raise Retry(refusal)
        return proofs

    def _compare(self, path: str, items: Sequence[Item], proofs: dict[int, Proof]) -> str:
        """Add proofs of the items that came back as they were sent; how the server refused the request, if it did.

        One instance at a time lies in a temporary file.
        """
        wanted = {item.sop_instance: item for item in items}
        answer = self._ask("GET", path, headers={"Accept": _INSTANCES}, stream=True)
        with answer, tempfile.TemporaryDirectory(prefix="relay-") as folder:
            if answer.status_code in (204, 404, 410):
                return ""  # nothing there
            if answer.status_code != 200:
                return self._web.failure(answer, "WADO-RS")
            file = Path(folder) / "instance"
            try:
                for _ in read_parts(answer.headers.get("Content-Type", ""), answer.iter_content(_BLOCK), file):
                    self._compare_one(path, file, wanted, proofs)
            except requests.RequestException as error:
                raise Retry(self._web.words(error)) from error
            except EOFError:
                raise Retry(f"{self._web.host}: the answer is cut off") from None
        return ""

    @staticmethod
    def _compare_one(path: str, file: Path, wanted: Mapping[str, Item], proofs: dict[int, Proof]) -> None:
        try:
            meta = dicom.read_meta(file)
        except dicom.NotDICOM:
            return
        item = wanted.get(meta.sop_instance)
        how = _same(item, file, meta) if item else ""
        if item and how:
            where = f"{path.partition('/instances/')[0]}/instances/{item.sop_instance}".lstrip("/")
            proofs[item.id] = Proof(item.sop_instance, how, where, file.stat().st_size)


def _same(item: Item, file: Path, meta: dicom.Meta) -> str:
    """How the file proves to be the item: by the data set's bytes, by its content, or not at all (empty)."""
    ours = dicom.read_meta(item.path)
    if (ours.transfer_syntax == meta.transfer_syntax
            and dicom.data_set_digest(file, meta.offset) == dicom.data_set_digest(item.path, ours.offset)):
        return "bytes"
    if item.replaces:  # versions may differ in their headers alone, which content does not cover
        return ""
    try:
        # The server may have changed headers or their encoding.
        return "content" if content(file) == content(item.path) else ""
    except Exception:  # whatever a broken data set makes the parser do
        return ""


# Answers (DICOM JSON Model, PS3.18 Annex F; Native DICOM Model, PS3.19 Annex A)


def _dataset(answer: requests.Response) -> dict[str, Any]:
    """The answer's data set in the shape of the DICOM JSON Model; empty when it has none."""
    try:
        if "xml" in answer.headers.get("Content-Type", ""):
            # Expat bounds the expansion of entities and fetches none.
            return _from_xml(ElementTree.fromstring(answer.content))  # noqa: S314
        data = answer.json()
    except (ValueError, ElementTree.ParseError):
        return {}
    data = data[0] if isinstance(data, list) and data else data
    return data if isinstance(data, dict) else {}


def _from_xml(element: ElementTree.Element) -> dict[str, Any]:
    return {str(child.get("tag")): {"Value": [_from_xml(item) for item in child.findall("{*}Item")]
                                    or [value.text for value in child.findall("{*}Value")]} for child in element}


def _sequence(data: dict[str, Any], tag: str) -> Iterator[dict[str, Any]]:
    return (row for row in _values(data, tag) if isinstance(row, dict))


def _values(data: dict[str, Any], tag: str) -> list[Any]:
    element = data.get(tag)
    return element.get("Value") or [] if isinstance(element, dict) else []


def _first(data: dict[str, Any], tag: str) -> str:
    return str(next(iter(_values(data, tag)), ""))


def _number(data: dict[str, Any], tag: str) -> int | None:
    text = _first(data, tag)
    return int(text) if text.isdecimal() else None


def _words(reason: int | None) -> str:
    if reason is None:
        return "no reason given"
    if reason in _ALREADY_THERE:
        return f"{reason:04X}, another version is there: allow it to be overwritten or delete it there, then 'retry'"
    return f"{reason:04X}, {meaning(reason)[1]}"


def _series_of(item: Item) -> str:
    return item.series_uid
