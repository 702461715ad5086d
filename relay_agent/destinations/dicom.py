"""Delivery to another Storage SCP: C-STORE (PS3.4 Annex B), proved by C-FIND (PS3.4 Annex C) or by the status alone.

The data set goes out byte for byte as it lies in the spool; nothing is decoded or encoded on the way.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter, deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import StoragePresentationContexts

from relay_agent import dicom, dimse, scu
from relay_agent.config_destinations import DICOM
from relay_agent.destinations import DeliveryError, Finding, Proof, Retry, Stopped
from relay_agent.destinations.web import words
from relay_agent.negotiate import VERIFICATION
from relay_agent.package import Item, Manifest
from relay_agent.throttle import Throttle

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model

_CONNECT, _ANSWER = 30.0, 300.0  # seconds; an archive may take its time over a large instance
_LIST = 1800.0  # seconds for all answers to one query
_CONTEXTS = 128  # of an association: their IDs are odd and of one byte (PS3.8 section 9.3.2.2)
_BLOCK = 2**18  # bytes that are read and sent at a time, in PDUs as long as the peer likes
_PLAIN = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))

_BROKEN = f"the association broke, or no answer came within {_ANSWER:.0f} s"

_Proposed = tuple[str, Sequence[str]]  # SOP Class and transfer syntaxes

_WARNINGS = frozenset({0xB000, 0xB006, 0xB007})
_PENDING = frozenset({0xFF00, 0xFF01})

# (result, source, reason), PS3.8 table 9-21
_REJECTED = {
    (1, 1, 2): "it does not know the DICOM application context; is another service listening there?",
    (1, 1, 3): "it does not know us: add our AE title {ours} (and this box's address) to its list",
    (1, 1, 7): "it does not go by the AE title {theirs}: correct ae_title",
    (2, 3, 1): "it is busy",
    (2, 3, 2): "it has too many associations: lower streams",
}

# (codes, whether to try again, words)
_FAILURES: tuple[tuple[Container[int], bool, str], ...] = (
    ({*range(0xA700, 0xA800), 0x0213}, True, "out of resources: is its disk full?"),
    ({0x0110}, True, "processing failure: see its log"),
    ({0x0118, 0x0122, 0xA800}, False, "SOP Class not supported: allow it at the peer or route these series elsewhere, "
                                      "then 'retry'"),
    ({0xC122}, False, "transfer syntax not supported: allow it at the peer, then 'retry'"),
    ({0x0124}, False, "not authorised: allow our account or AE title to store there, then 'retry'"),
    (range(0xA900, 0xAA00), False, "data set does not match its SOP Class: see the peer's log, then 'retry'"),
    (range(0xC000, 0xD000), False, "cannot understand the data set: see the peer's log, then 'retry'"),
)


class DICOMDestination:
    """See :class:`relay_agent.destinations.Destination`.

    What lasts until somebody mends the peer or the line, and then goes away by itself, is :class:`Retry`; an instance
    that this peer will not take however often it is sent is :class:`Stopped`.
    """

    def __init__(self, config: DICOM, throttle: Throttle) -> None:
        self._config = config
        self._throttle = throttle
        self._where = f"{config.ae_title}@{config.host}:{config.port}"
        self._stored: set[tuple[str, str]] = set()  # what the peer acknowledged in this run and is not proved yet

    trouble = ""  # its credential does not expire

    def idle(self) -> None:
        """Nothing here expires."""

    # The verbs

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        """The items that the peer does not list, or did not acknowledge. A repeated C-STORE does no harm."""
        listed = self._listed(manifest) if self._config.verify == "find" else None
        return [item for item in manifest.items if not self._there(item, listed)]

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        """C-STORE over associations of one transfer syntax each; how many were stored, and with which warnings.

        Raises :class:`Stopped` when instances were refused for good, after all others were sent.
        """
        refused: Counter[str] = Counter()
        warned: Counter[str] = Counter()
        by_syntax = attrgetter("transfer_syntax")
        for syntax, group in groupby(sorted(part, key=by_syntax), key=by_syntax):
            items = list(group)
            classes = sorted({item.sop_class for item in items})
            for start in range(0, len(classes), _CONTEXTS):
                some = classes[start:start + _CONTEXTS]
                self._store([item for item in items if item.sop_class in some],
                            [(uid, (syntax,)) for uid in some], refused, warned)
        if refused:
            raise Stopped(f"{self._where}: {sum(refused.values())} of {len(part)} instances were refused: "
                          + "; ".join(f"{why} ({count})" for why, count in refused.items()))
        return f"0000 {len(part)} stored" + "".join(f", {count} with warning {code}" for code, count in warned.items())

    def finish(self, manifest: Manifest) -> str:
        """Nothing is left to do: C-STORE is final."""
        return f"{self._where}/{manifest.study_uid}"

    def prove(self, manifest: Manifest, location: str) -> Sequence[Proof]:
        """C-FIND at IMAGE level, or the statuses of this run, as configured."""
        how = self._config.verify
        listed = self._listed(manifest) if how == "find" else None
        if how == "find" and listed is None:
            raise Stopped(f"{self._where} does not answer C-FIND (Study Root) to {self._config.calling_ae_title}. "
                          'Allow it there, or set verify = "status", then \'retry\'')
        lacking = sum(not self._there(item, listed) for item in manifest.items)
        if lacking:
            what = "listed" if how == "find" else "acknowledged since the agent was started"
            raise Retry(f"{self._where}: {lacking} of {len(manifest.items)} instances are not {what}")
        self._stored -= {_key(item) for item in manifest.items}
        return [Proof(item.sop_instance, how) for item in manifest.items]

    def check(self) -> Iterator[Finding]:
        """Association, C-ECHO, C-FIND and the common storage contexts."""
        storage = [str(context.abstract_syntax) for context in StoragePresentationContexts[:_CONTEXTS - 2]]
        contexts = [(uid, _PLAIN) for uid in (VERIFICATION, STUDY_ROOT_FIND, *storage)]
        try:
            with self._associated(contexts) as association:
                taken = {context.abstract_syntax for context in association.contexts.values()}
                echoed = VERIFICATION in taken and not association.ask(
                    VERIFICATION, dimse.request(dimse.C_ECHO_RQ, 1, VERIFICATION)).status
        except DeliveryError as error:
            yield Finding(False, str(error), "mend this, then check again")
            return
        yield Finding(True, f"{self._where}: takes associations from {self._config.calling_ae_title}")
        yield Finding(echoed, f"{self._where}: C-ECHO", "the peer must answer C-ECHO; see its log")
        if self._config.verify == "find":
            yield Finding(STUDY_ROOT_FIND in taken, f"{self._where}: C-FIND (Study Root)",
                          'allow our AE title to query there, or set verify = "status"')
        stored = len(taken - {VERIFICATION, STUDY_ROOT_FIND})
        yield Finding(stored > 0, f"{self._where}: takes {stored} of {len(storage)} storage SOP Classes",
                      "allow our AE title to store there")

    # C-STORE

    def _store(self, items: Sequence[Item], contexts: Sequence[_Proposed], refused: Counter[str],
               warned: Counter[str]) -> None:
        try:
            with self._associated(contexts) as association:
                for number, item in enumerate(items):
                    if association.context(item.sop_class) is None:
                        refused[_no_context(item)] += 1
                        continue
                    self._throttle.limit()  # raises when the window has closed
                    status = association.ask(
                        item.sop_class, dimse.request(dimse.C_STORE_RQ, number % 0xFFFF + 1, item.sop_class,
                                                      item.sop_instance), self._data_set(item.path)).status
                    if status in _WARNINGS:
                        warned[f"{status:04X}"] += 1
                    elif status:
                        again, why = meaning(status)
                        if again:
                            raise Retry(f"{self._where}: C-STORE was answered {status:04X}, {why}")
                        refused[f"{status:04X}, {why}"] += 1
                        continue
                    self._stored.add(_key(item))
        except _NoContext:
            refused.update(_no_context(item) for item in items)

    def _data_set(self, path: Path) -> Iterator[bytes]:
        """A file's data set, no faster than the throttle allows; little of it is in memory at a time."""
        with path.open("rb", buffering=0) as file:
            file.seek(dicom.read_meta(path).offset)
            while block := file.read(_BLOCK):
                deque(self._throttle.paced([block]), maxlen=0)
                yield block

    # C-FIND

    def _listed(self, manifest: Manifest) -> set[str] | None:
        """SOP Instance UIDs that the peer has of the study's series; None when it takes no queries."""
        listed: set[str] = set()
        try:
            with self._associated([(STUDY_ROOT_FIND, _PLAIN)]) as association:
                for number, series in enumerate(sorted({item.series_uid for item in manifest.items})):
                    listed |= self._listed_of(association, number % 0xFFFF + 1, manifest.study_uid, series)
        except _NoContext:
            return None
        return listed

    def _listed_of(self, association: scu.Association, number: int, study: str, series: str) -> set[str]:
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        query.StudyInstanceUID, query.SeriesInstanceUID, query.SOPInstanceUID = study, series, ""
        context = association.context(STUDY_ROOT_FIND)
        assert context is not None  # it is the only one that was asked for
        listed: set[str] = set()
        until = time.monotonic() + _LIST
        answer = association.ask(STUDY_ROOT_FIND, dimse.request(dimse.C_FIND_RQ, number, STUDY_ROOT_FIND),
                                 [dicom.encode(query, context.transfer_syntax)])
        while answer.status in _PENDING:
            if time.monotonic() > until:
                raise Retry(f"{self._where}: C-FIND was answered for {_LIST:.0f} s and no end was in sight")
            try:
                listed.add(str(dicom.decode(answer.data, context.transfer_syntax).get("SOPInstanceUID", "")))
            except Exception:  # whatever malformed bytes make the decoder do
                raise Retry(f"{self._where}: C-FIND was answered with what is no data set") from None
            answer = association.answer()
        if answer.status:
            raise Retry(f"{self._where}: C-FIND was answered {answer.status:04X}, {meaning(answer.status)[1]}")
        return listed

    def _there(self, item: Item, listed: set[str] | None) -> bool:
        acknowledged = _key(item) in self._stored
        if listed is None:
            return acknowledged
        # A list does not tell which version is there.
        return item.sop_instance in listed and (acknowledged or not item.replaces)

    # Associations

    @contextmanager
    def _associated(self, contexts: Sequence[_Proposed]) -> Iterator[scu.Association]:
        """An association; aborted when the block raises. :class:`Retry` when there is none to be had, or it breaks."""
        config = self._config
        try:
            tls = self._tls() if config.tls_ca else None
            association = scu.Association(
                scu.connect(config.host, config.port, _CONNECT, tls), config.ae_title, config.calling_ae_title,
                contexts, negotiation=_CONNECT, answer=_ANSWER)
        except scu.Rejected as rejected:
            raise Retry(self._rejected(rejected.reason)) from None
        except scu.HungUp:
            raise Retry(f"{self._where} takes connections and hung up on our request for an association: is our AE "
                        f"title {config.calling_ae_title} on its list, and is it a DICOM port "
                        f"{'with' if config.tls_ca else 'without'} TLS (tls_ca)?") from None
        except OSError as error:
            raise Retry(words(self._where, error, _CONNECT)) from None
        try:
            with association:
                if not association.contexts:
                    raise _NoContext
                yield association
        except scu.Broken:
            raise Retry(f"{self._where}: {_BROKEN}; what was not acknowledged is sent again") from None

    def _tls(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=str(self._config.tls_ca))
        except OSError:  # ssl.SSLError is one too
            raise Retry(f"tls_ca = {self._config.tls_ca} cannot be used: name a PEM file of CAs") from None

    def _rejected(self, reason: tuple[int, int, int]) -> str:
        why = _REJECTED.get(reason, "see its log").format(ours=self._config.calling_ae_title,
                                                         theirs=self._config.ae_title)
        return f"{self._where} rejected the association ({'/'.join(map(str, reason))}): {why}"


class _NoContext(Exception):
    """The peer took the association and none of its presentation contexts."""


def _key(item: Item) -> tuple[str, str]:
    return item.sop_instance, item.sha256


def _no_context(item: Item) -> str:
    return (f"SOP Class {_named(item.sop_class)} in transfer syntax {_named(item.transfer_syntax)} is not taken there; "
            "allow both at the peer, or route these series elsewhere, then 'retry'")


def _named(uid: str) -> str:
    name = UID(uid).name
    return uid if name == uid else f"{uid} ({name})"


def meaning(status: int) -> tuple[bool, str]:
    """A failure of C-STORE, C-FIND or STOW-RS: whether to try again, and words (PS3.4 B.2.3, PS3.7 Annex C)."""
    return next(((again, what) for codes, again, what in _FAILURES if status in codes),
                (False, "refused: see the peer's log, then 'retry'"))
