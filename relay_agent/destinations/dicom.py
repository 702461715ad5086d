"""Delivery to another Storage SCP: C-STORE (PS3.4 Annex B), proved by C-FIND (PS3.4 Annex C) or by the status alone.

The data set goes out byte for byte as it lies in the spool; nothing is decoded or encoded on the way.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections import Counter, deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, StoragePresentationContexts, _config, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import P_DATA, MaximumLengthNotification
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as STUDY_ROOT_FIND
from pynetdicom.sop_class import Verification

from relay_agent.config import DICOM
from relay_agent.destinations import DeliveryError, Finding, Proof, Retry, Stopped
from relay_agent.destinations.web import words
from relay_agent.dicom import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from relay_agent.package import Item, Manifest
from relay_agent.scu import no_delay, undisturbed
from relay_agent.throttle import Throttle

# Files are sent as they are, in PDUs read from disk one by one; identifiers of queries stay out of the log.
_config.STORE_SEND_CHUNKED_DATASET = True
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False

_CONNECT, _ANSWER = 30.0, 300.0  # seconds; an archive may take its time over a large instance
_CONTEXTS = 128  # of an association: their IDs are odd and of one byte (PS3.8 section 9.3.2.2)
_PDU = 2**20  # largest to send, whatever more the peer would take
_WAITING = 4  # PDUs in memory

_BROKEN = f"the association broke, or no answer came within {_ANSWER:.0f} s"

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
        # pynetdicom picks a context by its SOP Class, so each class is there once.
        for syntax, group in groupby(sorted(part, key=by_syntax), key=by_syntax):
            items = list(group)
            classes = sorted({item.sop_class for item in items})
            for start in range(0, len(classes), _CONTEXTS):
                some = classes[start:start + _CONTEXTS]
                self._store([item for item in items if item.sop_class in some],
                            [build_context(uid, syntax) for uid in some], refused, warned)
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
        contexts = [build_context(Verification), build_context(STUDY_ROOT_FIND),
                    *StoragePresentationContexts[:_CONTEXTS - 2]]
        try:
            with self._associated(contexts) as association:
                taken = {str(context.abstract_syntax) for context in association.accepted_contexts}
                echo = association.send_c_echo() if Verification in taken else Dataset()
        except DeliveryError as error:
            yield Finding(False, str(error), "mend this, then check again")
            return
        yield Finding(True, f"{self._where}: takes associations from {self._config.calling_ae_title}")
        yield Finding(echo.get("Status") == 0, f"{self._where}: C-ECHO", "the peer must answer C-ECHO; see its log")
        if self._config.verify == "find":
            yield Finding(STUDY_ROOT_FIND in taken, f"{self._where}: C-FIND (Study Root)",
                          'allow our AE title to query there, or set verify = "status"')
        stored = len(taken - {Verification, STUDY_ROOT_FIND})
        yield Finding(stored > 0, f"{self._where}: takes {stored} of {len(contexts) - 2} storage SOP Classes",
                      "allow our AE title to store there")

    # C-STORE

    def _store(self, items: Sequence[Item], contexts: Sequence[PresentationContext], refused: Counter[str],
               warned: Counter[str]) -> None:
        try:
            with self._associated(contexts) as association:
                taken = {str(context.abstract_syntax) for context in association.accepted_contexts}
                for number, item in enumerate(items):
                    if item.sop_class not in taken:
                        refused[_no_context(item)] += 1
                        continue
                    self._throttle.limit()  # raises when the window has closed
                    answer = association.send_c_store(item.path, msg_id=number % 0xFFFF + 1)
                    if "Status" not in answer:
                        raise Retry(f"{self._where}: {_BROKEN}; what was not acknowledged is sent again")
                    status = int(answer.Status)
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

    # C-FIND

    def _listed(self, manifest: Manifest) -> set[str] | None:
        """SOP Instance UIDs that the peer has of the study's series; None when it takes no queries."""
        listed: set[str] = set()
        try:
            with self._associated([build_context(STUDY_ROOT_FIND)]) as association:
                for series in sorted({item.series_uid for item in manifest.items}):
                    listed |= self._listed_of(association, manifest.study_uid, series)
        except _NoContext:
            return None
        return listed

    def _listed_of(self, association: Association, study: str, series: str) -> set[str]:
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        query.StudyInstanceUID, query.SeriesInstanceUID, query.SOPInstanceUID = study, series, ""
        listed: set[str] = set()
        for status, match in association.send_c_find(query, STUDY_ROOT_FIND):
            if "Status" not in status:
                break
            if status.Status == 0:
                return listed
            if status.Status not in _PENDING:
                raise Retry(f"{self._where}: C-FIND was answered {status.Status:04X}, {meaning(status.Status)[1]}")
            listed.add(str(match.get("SOPInstanceUID", "")) if match else "")
        raise Retry(f"{self._where}: {_BROKEN} to C-FIND")

    def _there(self, item: Item, listed: set[str] | None) -> bool:
        acknowledged = _key(item) in self._stored
        if listed is None:
            return acknowledged
        # A list does not tell which version is there.
        return item.sop_instance in listed and (acknowledged or not item.replaces)

    # Associations

    @contextmanager
    def _associated(self, contexts: Sequence[PresentationContext]) -> Iterator[Association]:
        """An association; aborted when the block raises. :class:`Retry` when there is none to be had."""
        tls = (self._tls(), self._config.host) if self._config.tls_ca else None
        ae = AE(ae_title=self._config.calling_ae_title)
        ae.implementation_class_uid, ae.implementation_version_name = UID(IMPLEMENTATION_UID), IMPLEMENTATION_NAME
        ae.connection_timeout = ae.acse_timeout = _CONNECT
        ae.dimse_timeout, ae.network_timeout = _ANSWER, None
        association = ae.associate(self._config.host, self._config.port, list(contexts), self._config.ae_title,
                                   max_pdu=2**18, tls_args=tls, evt_handlers=[(evt.EVT_CONN_OPEN, _tune)])
        if not association.is_established:
            answer = association.acceptor.primitive
            if answer is not None and answer.result == 0:
                raise _NoContext
            raise Retry(self._rejected(answer) if answer is not None else self._unreachable())
        for item in association.acceptor.user_information:
            if isinstance(item, MaximumLengthNotification):  # 0 is "no limit": a whole instance in memory
                item.maximum_length_received = min(item.maximum_length_received or _PDU, _PDU)
        association.dul.to_provider_queue = _Outbox(association.dul, self._throttle)
        try:
            with undisturbed(association):
                yield association
        except RuntimeError:  # pynetdicom's, when the association ended between two requests
            association.abort()
            raise Retry(f"{self._where}: {_BROKEN}") from None
        except BaseException:
            association.abort()
            raise
        association.release()

    def _tls(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=str(self._config.tls_ca))
        except OSError:  # ssl.SSLError is one too
            raise Retry(f"tls_ca = {self._config.tls_ca} cannot be used: name a PEM file of CAs") from None

    def _rejected(self, answer: Any) -> str:
        reason = (answer.result, answer.result_source, answer.diagnostic)
        why = _REJECTED.get(reason, "see its log").format(ours=self._config.calling_ae_title,
                                                         theirs=self._config.ae_title)
        return f"{self._where} rejected the association ({'/'.join(map(str, reason))}): {why}"

    def _unreachable(self) -> str:
        """Why there was no answer: pynetdicom does not tell, so another connection is tried."""
        try:
            with socket.create_connection((self._config.host, self._config.port), _CONNECT) as plain:
                if self._config.tls_ca:
                    with self._tls().wrap_socket(plain, server_hostname=self._config.host):
                        pass
        except OSError as error:
            return words(self._where, error, _CONNECT)
        return (f"{self._where} takes connections and hung up on our request for an association: is our AE title "
                f"{self._config.calling_ae_title} on its list, and is it a DICOM port "
                f"{'with' if self._config.tls_ca else 'without'} TLS (tls_ca)?")


class _NoContext(Exception):
    """The peer took the association and none of its presentation contexts."""


class _Outbox(queue.Queue[Any]):
    """What waits to be sent on an association: a few PDUs, and no faster than the throttle allows.

    pynetdicom's own queue has no end: an instance would be read into memory as fast as the disk can, and the time
    to wait for its answer would begin long before it is on its way.
    """

    def __init__(self, sender: threading.Thread, throttle: Throttle) -> None:
        super().__init__(_WAITING)
        self._sender = sender
        self._throttle = throttle

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Wait for room; what is put after the connection was lost is dropped, as there it would be never sent."""
        if isinstance(item, P_DATA):
            deque(self._throttle.paced(value for _, value in item.presentation_data_value_list), maxlen=0)
        while self._sender.is_alive():
            try:
                return super().put(item, timeout=0.5)
            except queue.Full:
                continue


def _tune(event: evt.Event) -> None:
    """Send small PDUs at once, and notice a peer that reads no more."""
    no_delay(event)
    event.assoc.dul.socket.socket.settimeout(_ANSWER)


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
