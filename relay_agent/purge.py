"""Purge: files are forgotten once every destination's arrival was proved and their retention is over."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from relay_agent.ledger import Ledger, State, move
from relay_agent.spool import Spool


def purge(ledger: Ledger, spool: Spool, made: Path, retention: float, now: float | None = None) -> int:
    """Delete the files of delivered shipments past their retention (seconds); how many shipments.

    ``made`` is the folder with what was made of them by de-identification.

    Files first, then the ledger: cut off in between, it is done again.
    """
    now = time.time() if now is None else now
    rows = ledger.all("SELECT id FROM shipment WHERE state = ? AND changed <= ? LIMIT 20", State.DELIVERED,
                      now - retention)
    for row in rows:
        spool.remove(part["path"] for part in ledger.all("SELECT path FROM instance WHERE shipment = ?", row["id"]))
        shutil.rmtree(made / str(row["id"]), ignore_errors=True)
        with ledger.write() as connection:
            connection.execute("UPDATE instance SET purged = ? WHERE shipment = ?", (now, row["id"]))
            move(connection, row["id"], State.PURGED, "files deleted, receipts kept")
    return len(rows)
