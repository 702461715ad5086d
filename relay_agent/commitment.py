"""Storage commitment reports over an association of their own, to callers that expect them there (PS3.4 Annex J).

The receiver opens no connections; the worker does, to the addresses in ``commitment_to``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from io import BytesIO

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association as Outgoing
from pynetdicom.presentation import build_role

from relay_agent import dimse
from relay_agent.book import ROWS_BY, safety
from relay_agent.config import Config
from relay_agent.dicom import file_header
from relay_agent.ledger import Ledger
from relay_agent.negotiate import COMMITMENT
from relay_agent.scu import no_delay, undisturbed
from relay_agent.spool import Spool

log = logging.getLogger(__name__)

INSTANCE = "1.2.840.10008.1.20.1.1"  # Storage Commitment Push Model SOP Instance

_GIVE_UP = 7 * 86400.0  # a caller that was away this long asks again


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
    ae = AE(ae_title=ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    ae.connection_timeout = 10
    ae.add_requested_context(COMMITMENT)
    # We stay the SCP although we ask for the association (PS3.7 section D.3.3.4).
    association = ae.associate(host, int(port), ae_title=called, ext_neg=[build_role(COMMITMENT, scp_role=True)],
                               evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)])
    if not association.is_established:
        log.warning("a storage commitment report waits: its caller is not reachable", extra={"peer": peer})
        return False
    try:
        with undisturbed(association):
            return _say(association, transaction, instances, reasons)
    finally:
        association.release()


def _say(association: Outgoing, transaction: str, instances: list[tuple[str, str]], reasons: list[int]) -> bool:
    try:
        _, report = event_report(1, transaction, instances, reasons)
        status, _ = association.send_n_event_report(report, 2 if any(reasons) else 1, COMMITMENT, INSTANCE)
        return bool(status) and status.Status == 0
    except (RuntimeError, ValueError) as error:
        log.warning("a storage commitment report waits: %s", type(error).__name__)
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


def decode(data: bytes, transfer_syntax: str) -> Dataset:
    """A data set from the wire."""
    head = file_header("", "", transfer_syntax, "", "")
    return dcmread(BytesIO(head + data))


def encode(data: Dataset, transfer_syntax: str) -> bytes:
    """A data set for the wire, in one of the two uncompressed little endian syntaxes."""
    buffer = DicomBytesIO()
    buffer.is_little_endian = True
    buffer.is_implicit_VR = transfer_syntax != ExplicitVRLittleEndian
    write_dataset(buffer, data)
    encoded: bytes = buffer.getvalue()
    return encoded
