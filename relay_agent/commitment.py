"""Storage commitment reports over an association of their own, to callers that expect them there (PS3.4 Annex J).

The receiver opens no connections; the worker does, to the addresses in ``commitment_to``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from relay_agent import dicom, dimse, scu
from relay_agent.book import ROWS_BY, safety
from relay_agent.config import Config
from relay_agent.ledger import Ledger
from relay_agent.negotiate import COMMITMENT
from relay_agent.spool import Spool

log = logging.getLogger(__name__)

INSTANCE = "1.2.840.10008.1.20.1.1"  # Storage Commitment Push Model SOP Instance

_GIVE_UP = 7 * 86400.0  # a caller that was away this long asks again
_CONNECT, _ANSWER = 10.0, 30.0  # seconds


def report_due(config: Config, ledger: Ledger, spool: Spool) -> int:
    """Send the reports that are due; how many went. A caller that is away is tried again at the next call."""
    sent = 0
    away: set[str] = set()
    for row in ledger.all("SELECT * FROM commitment WHERE answered IS NULL AND requested BETWEEN ? AND ?",
                          time.time() - _GIVE_UP, time.time() - ROWS_BY):
        receiver = next((r for r in config.receiver if r.name == row["receiver"]), None)
        peer = next((p for p in receiver.commitment_to if p.partition("@")[0] == row["calling_ae"]), None) \
            if receiver else None
        if receiver is None or peer is None or peer in away:
            continue
        instances = [(sop_class, instance) for sop_class, instance in json.loads(row["instances"])]
        reasons = safety(ledger, spool, row["receiver"], instances)
        if _report(receiver.ae_title, peer, row["transaction_uid"], instances, reasons):
            with ledger.write() as connection:
                connection.execute("UPDATE commitment SET answered = ? WHERE id = ?", (time.time(), row["id"]))
            sent += 1
        else:  # the others that wait for the same caller would only wait for it as long again
            away.add(peer)
    return sent


def _report(ae_title: str, peer: str, transaction: str, instances: list[tuple[str, str]], reasons: list[int]) -> bool:
    called, _, where = peer.partition("@")
    host, _, port = where.rpartition(":")
    command, report = event_report(1, transaction, instances, reasons)
    try:
        # We stay the SCP although we ask for the association (PS3.7 section D.3.3.4).
        with scu.Association(scu.connect(host, int(port), _CONNECT), called, ae_title,
                             [(COMMITMENT, (ExplicitVRLittleEndian, ImplicitVRLittleEndian))], provided=[COMMITMENT],
                             negotiation=_ANSWER, answer=_ANSWER) as association:
            context = association.context(COMMITMENT)
            if context is None:
                log.warning("a storage commitment report waits: its caller does not take it", extra={"peer": peer})
                return False
            return association.ask(COMMITMENT, command, [dicom.encode(report, context.transfer_syntax)]).status == 0
    except (OSError, scu.Rejected, scu.HungUp):
        log.warning("a storage commitment report waits: its caller is not reachable", extra={"peer": peer})
    except scu.Broken:
        log.warning("a storage commitment report waits: its caller did not answer", extra={"peer": peer})
    return False


def event_report(message_id: int, transaction: str, instances: Sequence[tuple[str, str]],
                      reasons: Sequence[int]) -> tuple[bytes, Dataset]:
    """The N-EVENT-REPORT-RQ of PS3.4 section J.3.3: command set and data set."""
    report = Dataset()
    report.TransactionUID = transaction
    safe: list[Dataset] = []
    failed: list[Dataset] = []
    for (sop_class, instance), reason in zip(instances, reasons, strict=True):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        if reason:
            item.FailureReason = reason
        (failed if reason else safe).append(item)
    if safe:
        report.ReferencedSOPSequence = safe
    if failed:
        report.FailedSOPSequence = failed
    command = dimse.encode({
        dimse.AFFECTED_CLASS: COMMITMENT, dimse.COMMAND_FIELD: dimse.N_EVENT_REPORT_RQ,
        dimse.MESSAGE_ID: message_id, dimse.DATA_SET_TYPE: 1, dimse.AFFECTED_INSTANCE: INSTANCE,
        dimse.EVENT_TYPE: 2 if failed else 1})
    return command, report
