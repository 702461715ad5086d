"""Snapshots of the ledger: taken while it is in use, and put back when a newer release has changed its form.

What was received since a snapshot is found again from the files (:func:`relay_agent.book.reconcile`), what was
delivered since is asked of the servers. Of what only a ledger holds, :func:`restore` carries over what it can.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

from relay_agent.ledger import MIGRATIONS, LedgerError, note

# No file and no server can tell these again: keys and numbers of pseudonyms, and reports that callers wait for.
_KEPT = ("secret", "number", "commitment")


def take(ledger: Path, snapshot: Path) -> None:
    """Write a whole and durable copy of the ledger, whoever writes it meanwhile; replaces an older snapshot.

    :class:`LedgerError` when there is none, or no room.
    """
    partial = snapshot.with_name(f"{snapshot.name}.partial")
    try:
        with closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=ro", uri=True, timeout=60)) as source:
            partial.unlink(missing_ok=True)
            with closing(sqlite3.connect(partial)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE").fetchall()
        _replace(partial, snapshot)
    except (sqlite3.Error, OSError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LedgerError(f"no snapshot of {ledger} could be written to {snapshot}: {error}. Is it this box's ledger, "
                          "and is there room?") from None


def schema(ledger: Path) -> int | None:
    """The schema version that a ledger was written with; None when there is no ledger that can be read."""
    try:
        with closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=rw", uri=True, timeout=60)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        return None


def restore(ledger: Path, snapshot: Path) -> Path | None:
    """Put the snapshot in the place of a ledger that this release cannot read; where that one is kept.

    None when this release can read it: then nothing is done. Both services must be stopped. Cut off at any moment
    there is one ledger or the other, whole, and it may be done again.
    """
    version = schema(ledger)
    if version is not None and version <= len(MIGRATIONS):
        return None
    if (schema(snapshot) or 0) not in range(1, len(MIGRATIONS) + 1):
        raise LedgerError(f"{snapshot} is no snapshot that this release can read; restore one that it has written")
    kept = ledger.with_name(f"ledger-{'damaged' if version is None else f'schema{version}'}-{int(time.time())}.sqlite")
    partial = ledger.with_name("ledger.partial")
    shutil.copyfile(snapshot, partial)
    with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
        if version is not None:
            _fold(ledger)
            _carry_over(connection, ledger)
        note(connection, None, f"restored from a snapshot; what it replaced is kept as {kept.name}")
    if ledger.exists():
        os.link(ledger, kept)
    for rest in ("-wal", "-shm"):  # of a ledger that is past repair; they would be applied to the snapshot
        ledger.with_name(ledger.name + rest).unlink(missing_ok=True)
    _replace(partial, ledger)
    return kept


def _fold(ledger: Path) -> None:
    """Bring the write-ahead log into the file, so that the file alone is the ledger."""
    try:
        with closing(sqlite3.connect(ledger, timeout=5)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchall()
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{ledger} is in use ({error}): stop relay-receive and relay-work first") from None


def _carry_over(connection: sqlite3.Connection, ledger: Path) -> None:
    connection.execute("ATTACH ? AS newer", (str(ledger),))
    for table in _KEPT:
        ours, theirs = ([row[1] for row in connection.execute(f"PRAGMA {schema}.table_info({table})")]
                        for schema in ("main", "newer"))
        columns = ", ".join(name for name in ours if name in theirs)
        if columns:
            connection.execute(f"INSERT OR IGNORE INTO main.{table} ({columns}) SELECT {columns} FROM newer.{table}")
    connection.execute("DETACH newer")


def _replace(partial: Path, path: Path) -> None:
    """Rename, so that neither a crash nor a power cut leaves half of it."""
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
