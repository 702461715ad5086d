"""Purge: files are forgotten once every destination's arrival was proved and their retention is over."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from relay_agent.ledger import Ledger, State, move, note
from relay_agent.spool import Spool


def purge(ledger: Ledger, spool: Spool, made: Path, retention: float, now: float | None = None, raw: Path | None = None
          ) -> int:
    """Delete the files of delivered shipments past their retention (seconds); how many shipments.

    ``made`` and ``raw`` are the folders with what de-identification made of them, of sessions and of raw data.

    Files first, then the ledger: cut off in between, it is done again.
    """
    now = time.time() if now is None else now
    rows = ledger.all("SELECT id FROM shipment WHERE state = ? AND changed <= ? LIMIT 20", State.DELIVERED,
                      now - retention)
    for row in rows:
        _delete(ledger, spool, (made, raw), row["id"])
        with ledger.write() as connection:
            connection.execute("UPDATE instance SET purged = ? WHERE shipment = ?", (now, row["id"]))
            move(connection, row["id"], State.PURGED, "files deleted, receipts kept")
    return len(rows)


def discard(ledger: Ledger, spool: Spool, raw: Path, after: float, now: float | None = None) -> int:
    """Delete raw data that were rejected so long ago (seconds), as the configuration allows; how many."""
    now = time.time() if now is None else now
    rows = ledger.all("SELECT s.id FROM shipment s WHERE s.kind = 'raw' AND s.state = ? AND s.changed <= ? AND EXISTS "
                      "(SELECT 1 FROM instance i WHERE i.shipment = s.id AND i.purged IS NULL) LIMIT 20",
                      State.REJECTED, now - after)
    for row in rows:
        _delete(ledger, spool, (raw,), row["id"])
        with ledger.write() as connection:
            connection.execute("UPDATE instance SET purged = ? WHERE shipment = ?", (now, row["id"]))
            note(connection, row["id"], "files deleted: no route wants them (kspace.discard)")
    return len(rows)


def _delete(ledger: Ledger, spool: Spool, made: Sequence[Path | None], shipment: int) -> None:
    spool.remove(part["path"] for part in ledger.all("SELECT path FROM instance WHERE shipment = ?", shipment))
    for folder in filter(None, made):
        shutil.rmtree(folder / str(shipment), ignore_errors=True)
