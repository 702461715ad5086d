"""Storage commitment reports over an association of their own, to callers that expect them there (PS3.4 Annex J).

The receiver opens no connections; the worker does, to the addresses in ``commitment_to``.
"""

from __future__ import annotations

import json
import logging
import time

from pynetdicom import AE, evt
from pynetdicom.association import Association as Outgoing
from pynetdicom.presentation import build_role

from relay_agent.association import COMMITMENT, COMMITMENT_INSTANCE, commitment_report
from relay_agent.config import Config
from relay_agent.ledger import Ledger
from relay_agent.receive import ROWS_BY, safety
from relay_agent.scu import no_delay, undisturbed
from relay_agent.spool import Spool

log = logging.getLogger(__name__)

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
        _, report = commitment_report(1, transaction, instances, reasons)
        status, _ = association.send_n_event_report(report, 2 if any(reasons) else 1, COMMITMENT, COMMITMENT_INSTANCE)
        return bool(status) and status.Status == 0
    except (RuntimeError, ValueError) as error:
        log.warning("a storage commitment report waits: %s", type(error).__name__)
        return False
