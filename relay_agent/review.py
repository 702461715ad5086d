"""Review: what a person decides about a shipment. Everything here is written into the audit trail with a name."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence

from relay_agent.config import Config
from relay_agent.kspace.twix import Verdict
from relay_agent.ledger import Ledger, State, Stop, move, note, set_apart
from relay_agent.package import set_digest


class Refused(Exception):
    """The shipment is not in a state for this; the message says what would be."""


_OPEN = (State.GATHERING, State.COMPLETE, State.DEIDENTIFY, State.WAITING, State.HELD, State.REVIEW)


def _shipment(connection: sqlite3.Connection, shipment: int, *states: State) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM shipment WHERE id = ?", (shipment,)).fetchone()
    if row is None:
        raise Refused(f"there is no shipment {shipment}; see relay-agent list")
    if row["state"] not in states:
        raise Refused(f"shipment {shipment} is {row['state']}; this is for shipments that are {', '.join(states)}")
    return row


def assign(config: Config, ledger: Ledger, shipment: int, actor: str, *, project: str | None = None,
           subject: str | None = None, session: str | None = None, accession: str | None = None,
           route: str | None = None) -> None:
    """Give a shipment labels or a route by hand; it is then routed again, and its supplements follow.

    Also one whose deliveries wait or have stopped: what of it lies in a prearchive under the old labels stays there.
    """
    labels = {"project": project, "subject": subject, "session": session, "accession": accession}
    labels = {name: value for name, value in labels.items() if value is not None}
    for name, value in labels.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", value or ""):
            raise Refused(f"the {name} {value!r} has characters that XNAT does not take; use letters, digits, _ and -")
    if route is not None and route not in {r.name for r in config.route}:
        raise Refused(f"there is no route {route}; the configuration has {', '.join(r.name for r in config.route)}")
    with ledger.write() as connection:
        if connection.execute("SELECT 1 FROM raw WHERE shipment = ?", (shipment,)).fetchone():
            raise Refused("raw data go where their session goes: relay-agent assign "
                          f"{shipment} --to SHIPMENT [--series NUMBER]")
        row = _shipment(connection, shipment, State.HELD, State.REVIEW, State.COMPLETE, State.DEIDENTIFY,
                        State.READY)
        for delivery in connection.execute("SELECT * FROM delivery WHERE shipment = ?", (shipment,)):
            if delivery["state"] not in (Stop.WAITING, Stop.STOPPED):
                raise Refused(f"shipment {shipment} is {delivery['state']} at {delivery['destination']} under its "
                              "labels; have them changed there")
        _withdraw(connection, shipment)
        _put(connection, row, labels, route)
        move(connection, shipment, State.COMPLETE, "assigned " + ", ".join([*labels, *(["route"] if route else [])]),
             actor=actor)
        _wake_supplements(connection, row, actor)


def assign_raw(ledger: Ledger, shipment: int, actor: str, session: int, series: str | None = None) -> None:
    """Say which session raw data belong to, and which of its series (number or UID); none: the session as a whole."""
    with ledger.write() as connection:
        if connection.execute("SELECT 1 FROM shipment WHERE id = ? AND kind = 'session'", (shipment,)).fetchone():
            raise Refused(f"shipment {shipment} is a session; --to is for raw data")
        _shipment(connection, shipment, State.HELD, State.WAITING, State.REVIEW, State.COMPLETE, State.DEIDENTIFY,
                  State.READY, State.REJECTED)
        if connection.execute("SELECT 1 FROM raw WHERE shipment = ? AND verdict = ?",
                              (shipment, Verdict.INCOMPLETE)).fetchone():
            raise Refused(f"shipment {shipment} is not whole and cannot go; have it fetched or exported again")
        if connection.execute("SELECT 1 FROM delivery WHERE shipment = ? AND (state = ? OR sent)",
                              (shipment, Stop.VERIFIED)).fetchone():
            raise Refused(f"shipment {shipment} is there already, or on its way; have it moved there")
        to = connection.execute("SELECT * FROM shipment WHERE id = ? AND kind = 'session'", (session,)).fetchone()
        if to is None:
            raise Refused(f"there is no session {session}; see relay-agent list")
        first = connection.execute("SELECT id FROM shipment WHERE study_uid = ? AND receiver = ? ORDER BY supplement "
                                   "LIMIT 1", (to["study_uid"], to["receiver"])).fetchone()["id"]
        uid = _series(connection, to, series) if series else None
        _withdraw(connection, shipment)
        connection.execute("UPDATE raw SET session = ?, series_uid = ?, score = NULL, series_start = NULL, by_hand = 1 "
                           "WHERE shipment = ?", (first, uid, shipment))
        move(connection, shipment, State.COMPLETE, f"assigned to shipment {first}" + (f", series {series}" if series
             else ""), actor=actor)


def _series(connection: sqlite3.Connection, session: sqlite3.Row, series: str) -> str:
    rows = connection.execute(
        "SELECT DISTINCT series_uid FROM instance WHERE shipment IN (SELECT id FROM shipment WHERE study_uid = ? AND "
        "receiver = ?) AND ? IN (series_uid, series_number)", (session["study_uid"], session["receiver"], series)
        ).fetchall()
    if len(rows) != 1:
        raise Refused(f"the session has {len(rows)} series {series}; give a UID as relay-agent show {session['id']} "
                      "prints it")
    return str(rows[0]["series_uid"])


def _put(connection: sqlite3.Connection, row: sqlite3.Row, labels: dict[str, str | None], route: str | None) -> None:
    given = [*labels, *(["route"] if route else [])]
    sources = {**json.loads(row["sources"] or "{}"), **dict.fromkeys(given, "a person")}
    for name, value in labels.items():
        connection.execute(f"UPDATE shipment SET {name} = ? WHERE id = ?", (value, row["id"]))
    connection.execute("UPDATE shipment SET sources = ?, route = coalesce(?, route) WHERE id = ?",
                       (json.dumps(sources), route, row["id"]))


def _withdraw(connection: sqlite3.Connection, shipment: int) -> None:
    """Forget what of a shipment was not delivered yet, for it to be routed again."""
    connection.execute("DELETE FROM delivery WHERE shipment = ? AND state <> ?", (shipment, Stop.VERIFIED))


def _require_undelivered(connection: sqlite3.Connection, shipment: int, action: str) -> None:
    if connection.execute("SELECT 1 FROM delivery WHERE shipment = ? AND state = ?",
                          (shipment, Stop.VERIFIED)).fetchone():
        raise Refused(f"shipment {shipment} was delivered to a destination already; {action} cannot take that back")


def _wake_supplements(connection: sqlite3.Connection, row: sqlite3.Row, actor: str) -> None:
    """Have supplements routed again; those that are ready have not been sent, as they wait for this one."""
    for other in connection.execute(
            "SELECT id FROM shipment WHERE study_uid = ? AND receiver = ? AND supplement > ? AND state IN (?, ?, ?, ?)",
            (row["study_uid"], row["receiver"], row["supplement"], State.COMPLETE, State.HELD, State.REVIEW,
             State.READY)).fetchall():
        _withdraw(connection, other["id"])
        move(connection, other["id"], State.COMPLETE, f"follows shipment {row['id']}", actor=actor)


def release(ledger: Ledger, shipment: int, actor: str, digest: str | None = None) -> str:
    """Approve a shipment that waits for review: exactly this set of instances, under these labels; its digest.

    With the digest of what was looked at, a set that has changed since is refused.
    """
    with ledger.write() as connection:
        approved = set_digest(ledger, _shipment(connection, shipment, State.REVIEW))
        if digest is not None and digest != approved:
            raise Refused(f"shipment {shipment} has changed since {digest[:16]}… was looked at; look at it again")
        connection.execute("UPDATE shipment SET approved = ? WHERE id = ?", (approved, shipment))
        move(connection, shipment, State.COMPLETE, f"released, set {approved[:16]}…", actor=actor)
        return approved


def exclude(ledger: Ledger, shipment: int, series: Sequence[str], actor: str, reason: str) -> int:
    """Set series apart that are not to go; the number of the rejected shipment that holds them now."""
    with ledger.write() as connection:
        row = _shipment(connection, shipment, State.REVIEW, State.HELD)
        if row["kind"] == "raw":
            raise Refused(f"shipment {shipment} is one file of raw data; reject it instead")
        _require_undelivered(connection, shipment, "exclude")
        found = {part["series_uid"] for part in connection.execute(
            "SELECT DISTINCT series_uid FROM instance WHERE shipment = ?", (shipment,))}
        unknown = [uid for uid in series if uid not in found]
        if unknown or len(found) == len(set(series)):
            raise Refused(f"shipment {shipment} has no series {unknown[0]}; see relay-agent review show {shipment}"
                          if unknown else "these are all its series; reject the shipment instead")
        numbers = [part["id"] for part in connection.execute(
            f"SELECT id FROM instance WHERE shipment = ? AND series_uid IN ({', '.join('?' * len(series))})",
            (shipment, *series))]
        apart = set_apart(connection, row["id"], numbers, _given(reason), actor)
        _withdraw(connection, shipment)
        move(connection, shipment, State.COMPLETE, f"without {len(set(series))} series", actor=actor)
        _wake_supplements(connection, row, actor)
        return apart


def reject(ledger: Ledger, shipment: int, actor: str, reason: str) -> None:
    """Decide that a shipment does not go, whoever approved it before.

    Its files are kept; ``retry`` takes the decision back, and it is then looked at again.
    """
    with ledger.write() as connection:
        row = _shipment(connection, shipment, *_OPEN, State.READY)
        _require_undelivered(connection, shipment, "reject")
        _withdraw(connection, row["id"])
        connection.execute("UPDATE shipment SET approved = NULL WHERE id = ?", (shipment,))
        move(connection, shipment, State.REJECTED, reason, reason=_given(reason), actor=actor)


def _given(reason: str) -> str:
    if not reason.strip():
        raise Refused("say why; the reason goes into the audit trail")
    return reason


def retry(ledger: Ledger, shipment: int, actor: str) -> None:
    """Try again now: a held or rejected shipment is routed again, stopped and waiting deliveries are due."""
    with ledger.write() as connection:
        row = _shipment(connection, shipment, State.HELD, State.WAITING, State.REJECTED, State.READY)
        if row["state"] == State.READY:
            connection.execute(
                "UPDATE delivery SET due = 0, error = NULL, state = ?, location = iif(state = ?, NULL, location) "
                "WHERE shipment = ? AND state IN (?, ?, ?)",
                (Stop.WAITING, Stop.STOPPED, shipment, Stop.WAITING, Stop.STOPPED, Stop.ARRIVED))
            note(connection, shipment, "to be tried again now", actor)
        else:
            move(connection, shipment, State.COMPLETE, "to be routed again", actor=actor)
            _wake_supplements(connection, row, actor)


def retry_quarantined(ledger: Ledger, instance: int, actor: str) -> None:
    """Look at a quarantined instance again, for example after an update."""
    with ledger.write() as connection:
        changed = connection.execute("UPDATE instance SET problem = NULL WHERE id = ? AND problem IS NOT NULL "
                                     "AND shipment IS NULL", (instance,)).rowcount
        if not changed:
            raise Refused(f"instance {instance} is not in quarantine; see relay-agent list --quarantined")
        note(connection, None, f"instance {instance} is looked at again", actor)
