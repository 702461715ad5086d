"""The ledger: the one place where state is kept (SQLite, write-ahead log).

Files are the promise to the scanner and the ledger is what is known about them: receiving makes a file durable,
answers, and writes the row a moment later. What a crash leaves unwritten is found again by
:func:`relay_agent.book.reconcile`. Rows hold UIDs, digests and routing labels; of patients, only what became a
label.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class State(StrEnum):
    """Where a shipment is."""

    GATHERING = "gathering"  # instances still arrive
    COMPLETE = "complete"  # quiet; identify and route are next
    DEIDENTIFY = "deidentify"  # its route's scripts have to run; then it is complete again
    HELD = "held"  # waits for a person: nothing takes it, or it must not go on; `reason` says why
    WAITING = "waiting"  # raw data: their session has not come, or is not delivered yet; `reason` says which
    REVIEW = "review"  # waits for a person because its route asks for review
    READY = "ready"  # being delivered to its destinations
    DELIVERED = "delivered"  # verified at every destination, files still here
    PURGED = "purged"  # verified at every destination, files gone, receipts kept
    REJECTED = "rejected"  # a person, or a person's script, decided that it does not go; files are kept


class Stop(StrEnum):
    """Where a delivery to one destination is."""

    WAITING = "waiting"  # to be sent, or to be tried again at `due`
    ARRIVED = "arrived"  # there, but not yet final (in the prearchive)
    VERIFIED = "verified"  # proved; there is a receipt
    STOPPED = "stopped"  # only a person can help; `error` says how


# Each migration brings the schema from its index to the next `user_version`; never edit one that was released.
MIGRATIONS = (
    """
    CREATE TABLE tally (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO tally VALUES ('received', 0), ('repeated', 0), ('unstaged', 0), ('quarantined', 0);

    CREATE TABLE association (
        id INTEGER PRIMARY KEY, receiver TEXT NOT NULL, calling_ae TEXT NOT NULL, peer TEXT NOT NULL,
        opened REAL NOT NULL, closed REAL, ended TEXT, acknowledged INTEGER NOT NULL DEFAULT 0,
        process INTEGER NOT NULL);
    CREATE INDEX association_open ON association(receiver) WHERE closed IS NULL;

    CREATE TABLE shipment (
        id INTEGER PRIMARY KEY, study_uid TEXT NOT NULL, receiver TEXT NOT NULL, supplement INTEGER NOT NULL,
        state TEXT NOT NULL, reason TEXT, opened REAL NOT NULL, last_arrival REAL NOT NULL, changed REAL NOT NULL,
        instances INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
        project TEXT, subject TEXT, session TEXT, auto_archive INTEGER, sources TEXT, route TEXT,
        released INTEGER NOT NULL DEFAULT 0,
        UNIQUE (study_uid, receiver, supplement));
    CREATE INDEX shipment_state ON shipment(state);

    CREATE TABLE instance (
        id INTEGER PRIMARY KEY, receiver TEXT NOT NULL, sop_instance TEXT NOT NULL, sop_class TEXT NOT NULL,
        transfer_syntax TEXT NOT NULL, digest BLOB NOT NULL, size INTEGER NOT NULL, path TEXT NOT NULL UNIQUE,
        via TEXT NOT NULL, calling_ae TEXT NOT NULL, association INTEGER, arrived REAL NOT NULL,
        copies INTEGER NOT NULL DEFAULT 1, shipment INTEGER REFERENCES shipment(id),
        series_uid TEXT, series_number TEXT, instance_number TEXT, modality TEXT, scanner_serial TEXT,
        conflict INTEGER, problem TEXT, purged REAL,
        sent_md5 BLOB, sent_sha256 BLOB, sent_size INTEGER,
        UNIQUE (digest, receiver));
    CREATE INDEX instance_sop ON instance(sop_instance);
    CREATE INDEX instance_shipment ON instance(shipment, series_uid);
    CREATE INDEX instance_unstaged ON instance(id) WHERE shipment IS NULL AND problem IS NULL;
    CREATE INDEX instance_problem ON instance(id) WHERE problem IS NOT NULL;
    CREATE INDEX instance_conflict ON instance(id) WHERE conflict IS NOT NULL;
    CREATE INDEX instance_association ON instance(association) WHERE association IS NOT NULL;
    CREATE TRIGGER instance_received AFTER INSERT ON instance BEGIN
        UPDATE tally SET value = value + 1 WHERE name = 'received';
        UPDATE tally SET value = value + 1 WHERE name = iif(NEW.problem IS NULL, 'unstaged', 'quarantined');
    END;
    CREATE TRIGGER instance_repeated AFTER UPDATE OF copies ON instance BEGIN
        UPDATE tally SET value = value + NEW.copies - OLD.copies WHERE name = 'repeated';
    END;
    CREATE TRIGGER instance_staged AFTER UPDATE OF shipment ON instance
        WHEN OLD.shipment IS NULL AND NEW.shipment IS NOT NULL BEGIN
        UPDATE tally SET value = value - 1 WHERE name = iif(OLD.problem IS NULL, 'unstaged', 'quarantined');
        UPDATE shipment SET instances = instances + 1, bytes = bytes + NEW.size,
            last_arrival = max(last_arrival, NEW.arrived) WHERE id = NEW.shipment;
    END;
    CREATE TRIGGER instance_quarantined AFTER UPDATE OF problem ON instance
        WHEN OLD.problem IS NULL AND NEW.problem IS NOT NULL AND NEW.shipment IS NULL BEGIN
        UPDATE tally SET value = value - 1 WHERE name = 'unstaged';
        UPDATE tally SET value = value + 1 WHERE name = 'quarantined';
    END;
    CREATE TRIGGER instance_cleared AFTER UPDATE OF problem ON instance
        WHEN OLD.problem IS NOT NULL AND NEW.problem IS NULL AND OLD.shipment IS NULL BEGIN
        UPDATE tally SET value = value - 1 WHERE name = 'quarantined';
        UPDATE tally SET value = value + 1 WHERE name = 'unstaged' AND NEW.shipment IS NULL;
    END;

    CREATE TABLE delivery (
        shipment INTEGER NOT NULL REFERENCES shipment(id), destination TEXT NOT NULL, state TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, error TEXT, failing_since REAL,
        sent INTEGER NOT NULL DEFAULT 0, location TEXT, changed REAL NOT NULL,
        PRIMARY KEY (shipment, destination)) WITHOUT ROWID;
    CREATE INDEX delivery_due ON delivery(destination, due) WHERE state IN ('waiting', 'arrived');

    CREATE TABLE receipt (
        id INTEGER PRIMARY KEY, shipment INTEGER NOT NULL REFERENCES shipment(id), destination TEXT NOT NULL,
        at REAL NOT NULL, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL);
    CREATE INDEX receipt_shipment ON receipt(shipment);

    CREATE TABLE event (
        id INTEGER PRIMARY KEY, at REAL NOT NULL, shipment INTEGER, actor TEXT NOT NULL, what TEXT NOT NULL);
    CREATE INDEX event_shipment ON event(shipment);

    CREATE TABLE commitment (
        id INTEGER PRIMARY KEY, transaction_uid TEXT NOT NULL, receiver TEXT NOT NULL, calling_ae TEXT NOT NULL,
        requested REAL NOT NULL, instances TEXT NOT NULL, answered REAL);

    CREATE TABLE alert (
        condition TEXT NOT NULL, subject TEXT NOT NULL, since REAL NOT NULL, told REAL, text TEXT NOT NULL,
        PRIMARY KEY (condition, subject)) WITHOUT ROWID;
    """,
    """
    ALTER TABLE shipment ADD COLUMN accession TEXT;
    ALTER TABLE shipment ADD COLUMN recipe TEXT;
    ALTER TABLE shipment ADD COLUMN approved TEXT;
    ALTER TABLE shipment DROP COLUMN released;

    CREATE TABLE made (
        instance INTEGER PRIMARY KEY REFERENCES instance(id), shipment INTEGER NOT NULL REFERENCES shipment(id),
        path TEXT NOT NULL, study_uid TEXT NOT NULL, series_uid TEXT NOT NULL, sop_instance TEXT NOT NULL,
        sop_class TEXT NOT NULL, series_number TEXT, instance_number TEXT, transfer_syntax TEXT NOT NULL,
        md5 BLOB NOT NULL, sha256 BLOB NOT NULL, size INTEGER NOT NULL, risks TEXT NOT NULL);
    CREATE INDEX made_shipment ON made(shipment);
    CREATE INDEX made_sop ON made(sop_instance);

    CREATE TABLE number (kind TEXT NOT NULL, value BLOB NOT NULL, number INTEGER NOT NULL,
        PRIMARY KEY (kind, value)) WITHOUT ROWID;
    CREATE TABLE secret (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;

    CREATE TRIGGER instance_moved AFTER UPDATE OF shipment ON instance
        WHEN OLD.shipment IS NOT NULL AND NEW.shipment IS NOT NULL AND OLD.shipment <> NEW.shipment BEGIN
        UPDATE shipment SET instances = instances - 1, bytes = bytes - OLD.size WHERE id = OLD.shipment;
        UPDATE shipment SET instances = instances + 1, bytes = bytes + NEW.size WHERE id = NEW.shipment;
    END;
    """,
    # Raw k-space data: a shipment of kind 'raw' has one instance (receiver: the source, digest: SHA-256 of the file,
    # study_uid: the same in hex) and one row in `raw`. `session` is the first shipment of the matched session.
    # What raw data are matched by stays in `trait` and `series_start` when the session's files are gone; names and
    # patient IDs are there as keyed hashes only. `listed` is what a scanner's back end held when it was last asked.
    """
    ALTER TABLE shipment ADD COLUMN kind TEXT NOT NULL DEFAULT 'session';
    CREATE TABLE raw (
        shipment INTEGER PRIMARY KEY REFERENCES shipment(id), instance INTEGER NOT NULL REFERENCES instance(id),
        name TEXT NOT NULL, origin TEXT NOT NULL, verdict TEXT NOT NULL, problem TEXT, facts TEXT NOT NULL,
        serial TEXT, start REAL, due REAL NOT NULL, found TEXT, session INTEGER REFERENCES shipment(id),
        series_uid TEXT, series_start REAL, score INTEGER, by_hand INTEGER NOT NULL DEFAULT 0,
        report TEXT, path TEXT, size INTEGER, md5 BLOB, sha256 BLOB);
    CREATE INDEX raw_session ON raw(session);
    CREATE INDEX raw_origin ON raw(origin);
    CREATE INDEX raw_serial ON raw(serial) WHERE series_start IS NOT NULL;
    CREATE TABLE trait (
        kind TEXT NOT NULL, value TEXT NOT NULL, study_uid TEXT NOT NULL, receiver TEXT NOT NULL,
        series_uid TEXT NOT NULL, PRIMARY KEY (kind, value, study_uid, receiver, series_uid)) WITHOUT ROWID;
    CREATE INDEX trait_study ON trait(study_uid, receiver);
    CREATE TABLE series_start (
        study_uid TEXT NOT NULL, receiver TEXT NOT NULL, series_uid TEXT NOT NULL, start REAL NOT NULL,
        PRIMARY KEY (study_uid, receiver, series_uid)) WITHOUT ROWID;
    CREATE TABLE listed (
        source TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL, changed REAL NOT NULL,
        first_seen REAL NOT NULL, last_seen REAL NOT NULL, wanted INTEGER NOT NULL DEFAULT 1, fetched REAL,
        attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, error TEXT,
        PRIMARY KEY (source, name)) WITHOUT ROWID;
    CREATE INDEX listed_unfetched ON listed(source, changed) WHERE fetched IS NULL AND wanted;
    """,
)


class LedgerError(Exception):
    """The ledger cannot be opened; the message says what to do."""


class Ledger:
    """One connection for each thread to the SQLite file; statements outside :meth:`write` read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._switch_to_wal()
            self._migrate()
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} cannot be opened: {error}. Are you the service's user, and is the disk sound? "
                              "Otherwise restore the ledger's snapshot") from None

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            connection.row_factory = sqlite3.Row
            # NORMAL: a commit costs no sync. A power cut may take the last commits, never consistency; what they
            # said about files is found again from the files, what they said about deliveries from the servers.
            connection.executescript("PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;"
                                     "PRAGMA cache_size = -32768;")
            self._local.connection = connection
        return connection

    def _switch_to_wal(self) -> None:
        """Once for the file. While another process does the same, SQLite says "locked" without waiting."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self._connection().execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _migrate(self) -> None:
        connection = self._connection()
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise LedgerError(f"{self.path} was written by a newer release (schema {version}, this one knows "
                              f"{len(MIGRATIONS)}). Install that release again, or restore the ledger's snapshot")
        for number in range(version, len(MIGRATIONS)):
            # The version is looked at again inside: receiver and worker may open a new ledger at the same moment.
            connection.execute("BEGIN IMMEDIATE")
            try:
                if connection.execute("PRAGMA user_version").fetchone()[0] == number:
                    for statement in _statements(MIGRATIONS[number]):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close this thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            del self._local.connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end, rolled back when anything is raised."""
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def moment(self) -> Iterator[None]:
        """All queries inside see the ledger as it was at the first of them; blocks nobody."""
        connection = self._connection()
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.execute("COMMIT")

    def settle(self) -> None:
        """Make everything committed so far proof against a power cut."""
        self._connection().execute("PRAGMA wal_checkpoint(PASSIVE)")

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self._connection().execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        row: sqlite3.Row | None = self._connection().execute(sql, values).fetchone()
        return row

    def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.one(sql, *values)
        return row[0] if row is not None else None


def _statements(script: str) -> Iterator[str]:
    """Split a script at the ends of its statements; triggers hold semicolons of their own."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def note(connection: sqlite3.Connection, shipment: int | None, what: str, actor: str = "agent") -> None:
    """Write a line into the audit trail, inside the transaction that it tells of."""
    connection.execute("INSERT INTO event (at, shipment, actor, what) VALUES (?, ?, ?, ?)",
                       (time.time(), shipment, actor, what))


def move(connection: sqlite3.Connection, shipment: int, state: State, what: str, *, reason: str | None = None,
         actor: str = "agent") -> None:
    """Bring a shipment into another state and say so in the audit trail."""
    connection.execute("UPDATE shipment SET state = ?, reason = ?, changed = ? WHERE id = ?",
                       (state, reason, time.time(), shipment))
    note(connection, shipment, f"{state}: {what}", actor)


def set_apart(connection: sqlite3.Connection, shipment: int, instances: Sequence[int], reason: str,
              actor: str = "agent") -> int:
    """Take instances out of a shipment into a rejected one of the same study, where a person finds them; its number."""
    now = time.time()
    apart = connection.execute(
        "INSERT INTO shipment (study_uid, receiver, supplement, state, opened, last_arrival, changed, project, "
        "subject, session, sources, route) SELECT study_uid, receiver, (SELECT count(*) FROM shipment o WHERE "
        "o.study_uid = s.study_uid AND o.receiver = s.receiver), ?, ?, last_arrival, ?, project, subject, session, "
        "sources, route FROM shipment s WHERE id = ?", (State.REJECTED, now, now, shipment)).lastrowid
    assert apart is not None
    connection.executemany("DELETE FROM made WHERE instance = ?", [(number,) for number in instances])
    connection.executemany("UPDATE instance SET shipment = ? WHERE id = ?", [(apart, number) for number in instances])
    move(connection, apart, State.REJECTED, f"set apart from shipment {shipment}", reason=reason, actor=actor)
    note(connection, shipment, f"{len(instances)} instances set apart as shipment {apart}: {reason}", actor)
    return apart


@dataclass(frozen=True, slots=True)
class Balance:
    """received = delivered + held + quarantined + rejected + on its way, in instances."""

    received: int
    delivered: int
    held: int
    quarantined: int
    rejected: int
    on_its_way: int

    @property
    def difference(self) -> int:
        """What is unaccounted for; anything but 0 is an alarm."""
        return self.received - (self.delivered + self.held + self.quarantined + self.rejected + self.on_its_way)


CATEGORY = {State.GATHERING: "on_its_way", State.COMPLETE: "on_its_way", State.READY: "on_its_way",
            State.DEIDENTIFY: "on_its_way", State.WAITING: "on_its_way",
            State.HELD: "held", State.REVIEW: "held", State.REJECTED: "rejected",
            State.DELIVERED: "delivered", State.PURGED: "delivered"}


def balance(ledger: Ledger) -> Balance:
    """The sum as the ledger has it now; costs a pass over shipments, not over instances."""
    counts = dict.fromkeys(("delivered", "held", "rejected", "on_its_way"), 0)
    with ledger.moment():
        tally = {row["name"]: row["value"] for row in ledger.all("SELECT name, value FROM tally")}
        for state, instances in ledger.all("SELECT state, sum(instances) FROM shipment GROUP BY state"):
            counts[CATEGORY[State(state)]] += instances
    counts["on_its_way"] += tally["unstaged"]
    return Balance(received=tally["received"], quarantined=tally["quarantined"], **counts)


def recount(ledger: Ledger) -> int:
    """How many instances the rows themselves have more or fewer than the sums say; anything but 0 is an alarm.

    The sums are kept by triggers, so :func:`balance` cannot see a row that was deleted or changed by other means.
    This can; it costs a pass over an index of all instances.
    """
    with ledger.moment():
        told = {row["name"]: row["value"] for row in ledger.all("SELECT name, value FROM tally")}
        sums = {row["id"]: row["instances"] for row in ledger.all("SELECT id, instances FROM shipment")}
        rows = {row["shipment"]: row["n"] for row in ledger.all(
            "SELECT shipment, count(*) AS n FROM instance WHERE shipment IS NOT NULL GROUP BY shipment")}
        for place, sign in (("unstaged", "IS NULL"), ("quarantined", "IS NOT NULL")):
            rows[place] = ledger.value(f"SELECT count(*) FROM instance WHERE shipment IS NULL AND problem {sign}")
    sums |= {place: told[place] for place in ("unstaged", "quarantined")}
    misplaced = sum(abs(rows.get(place, 0) - sums.get(place, 0)) for place in rows.keys() | sums.keys())
    return int(max(misplaced, abs(sum(rows.values()) - told["received"])))
