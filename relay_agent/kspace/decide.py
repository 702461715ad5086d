"""Decide: which session raw data belong to, and whether they may go. Changes nothing; :func:`apply` does.

A person's word stands. What found no session yet is matched again whenever it is looked at, and leaves only after every
shipment of its session was delivered.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from relay_agent.config import Config, Route
from relay_agent.config_destinations import XNAT
from relay_agent.kspace import keep, match, sidecar
from relay_agent.kspace.make import protocol_name, recipe_hash
from relay_agent.kspace.pickup import OPAQUE
from relay_agent.kspace.twix import Verdict
from relay_agent.ledger import Ledger, State, Stop, move
from relay_agent.package import set_digest
from relay_agent.units import show_duration

_DECIDED = (State.READY, State.DELIVERED, State.PURGED)
_OVER = (State.DELIVERED, State.PURGED, State.REJECTED)
_LABELS = ("project", "subject", "session")


@dataclass(frozen=True, slots=True)
class Found:
    """The session of raw data: its first shipment, the series, and how both were found."""

    session: sqlite3.Row
    series_uid: str | None
    score: int | None
    told: dict[str, Any]  # state and candidates, for people
    pair: float | None = None  # start of the series by DICOM's clock, to learn the offset from


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of raw data."""

    state: State
    what: str
    found: Found | None = None
    told: dict[str, Any] | None = None  # candidates, where there is no session
    route: Route | None = None
    approved: str | None = None
    seen: float = 0.0  # when the shipment last moved before this was decided


def due(ledger: Ledger) -> list[int]:
    """The raw shipments that are to be decided, again or for the first time."""
    return [row["id"] for row in ledger.all(
        "SELECT s.id FROM shipment s JOIN raw r ON r.shipment = s.id WHERE s.state IN (?, ?) OR (s.state = ? AND "
        "r.session IS NULL) ORDER BY s.id", State.COMPLETE, State.WAITING, State.HELD)]


def decide(config: Config, ledger: Ledger, shipment: int, now: float | None = None) -> Decision:
    """What is to become of one raw shipment at ``now`` (seconds since 1970)."""
    head = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    raw = ledger.one("SELECT * FROM raw WHERE shipment = ?", shipment)
    if head is None or raw is None:
        raise KeyError(shipment)
    found = _find(config, ledger, head, raw, time.time() if now is None else now)
    decision = found if isinstance(found, Decision) else _may_go(config, ledger, head, raw, found)
    return replace(decision, seen=head["changed"])


def _find(config: Config, ledger: Ledger, head: sqlite3.Row, raw: sqlite3.Row, now: float) -> Found | Decision:
    if raw["verdict"] == Verdict.INCOMPLETE:
        return Decision(State.HELD, f"not whole: {raw['problem']}. Have it fetched or exported again")
    if raw["by_hand"]:
        session = ledger.one("SELECT * FROM shipment WHERE id = ?", raw["session"])
        assert session is not None
        return Found(session, raw["series_uid"], None, {"state": "by hand", "candidates": []})
    if raw["verdict"] in (OPAQUE, Verdict.NOT_TWIX):
        return _by_labels(config, ledger, head, raw, now)
    return _by_match(config, ledger, head, raw, now)


def _by_labels(config: Config, ledger: Ledger, head: sqlite3.Row, raw: sqlite3.Row, now: float) -> Found | Decision:
    """The session of a file in another format, by what its path said."""
    what = f"{raw['verdict']}: {raw['problem']}" if raw["problem"] else "in another format"
    labels = {name: head[name] for name in _LABELS if head[name]}
    if "session" not in labels:
        return Decision(State.HELD, f"{what}. No route's kspace.opaque says where it goes; {_assign(head)}, or reject")
    rows = ledger.all("SELECT * FROM shipment WHERE kind = 'session' AND supplement = 0 AND state <> ? AND "
                      f"{' AND '.join(f'{name} = ?' for name in labels)} ORDER BY id", State.REJECTED, *labels.values())
    if not rows:
        return _wait(config, raw, now, f"no session has the labels of its path; {_assign(head)}")
    if len({tuple(row[name] for name in _LABELS) for row in rows}) > 1:
        numbers = ", ".join(str(row["id"]) for row in rows)
        return Decision(State.HELD, f"several sessions have the labels of its path, shipments {numbers}; "
                        f"{_assign(head)}")
    return Found(rows[0], None, None, {"state": "by its path", "candidates": []})


def _by_match(config: Config, ledger: Ledger, head: sqlite3.Row, raw: sqlite3.Row, now: float) -> Found | Decision:
    said = keep.raw_of(raw["facts"])
    source = next((one for one in config.kspace.source if one.name == head["receiver"]), None)
    titles = source.receivers if source else ()
    sessions = keep.candidates(ledger, said, [one.name for one in config.receiver if one.ae_title in titles])
    offset = keep.clock(ledger, said.serial)
    result = match.match(said, sessions, offset.seconds if offset else 0.0)
    told = {"state": result.state.value, "offset": offset.seconds if offset else None, "candidates": [
        {"shipment": int(one.session), "score": one.score, "reasons": list(one.reasons),
         "series": [{"uid": each.uid, "number": each.number} for each in one.series]} for one in result.candidates]}
    if not result.candidates:
        return replace(_wait(config, raw, now, f"no session was found; {_assign(head)}"), told=told)
    best = result.candidates[0]
    names = ", ".join(f"{one.session} (score {one.score})" for one in result.candidates)
    session = ledger.one("SELECT * FROM shipment WHERE id = ?", int(best.session))
    assert session is not None
    if result.state is match.State.MATCHED:
        pair = keep.pair(said, next(one for one in sessions if one.name == best.session))
        apart = {one.uid: keep.set_apart(ledger, session, one.uid) for one in best.series}
        going = [uid for uid, shipment in apart.items() if shipment is None]
        found = Found(session, going[0] if going else None, best.score, told, pair)
        if apart and not going and session["state"] != State.REJECTED:  # its pictures do not go, so neither do these
            return Decision(State.HELD, f"its series was set apart as shipment {min(filter(None, apart.values()))}; "
                            f"reject it, or {_assign(head)}", found)
        return found
    if any(one.shares_uid for one in result.candidates):
        return Decision(State.HELD, f"it may belong to shipments {names}; {_assign(head)}", told=told)
    route = next((route for route in config.route if route.name == session["route"]), None)
    if now >= raw["due"] and len(result.candidates) == 1 and route and route.kspace and (
            route.kspace.unmatched == "ship"):
        return Found(session, None, best.score, told)
    return replace(_wait(config, raw, now, f"no UID tells its session, it may be that of shipment {names}; "
                         f"{_assign(head)}"), told=told)


def _assign(head: sqlite3.Row) -> str:
    return f"relay-agent assign {head['id']} --to SHIPMENT"


def _wait(config: Config, raw: sqlite3.Row, now: float, why: str) -> Decision:
    if now < raw["due"]:
        return Decision(State.WAITING, f"its session may still come: {why}")
    return Decision(State.HELD, f"within {show_duration(config.kspace.deadline)} {why}")


def _may_go(config: Config, ledger: Ledger, head: sqlite3.Row, raw: sqlite3.Row, found: Found) -> Decision:
    session, its = found.session, f"its session, shipment {found.session['id']},"
    if session["state"] == State.REJECTED:
        return Decision(State.HELD, f"{its} is rejected", found)
    if session["state"] not in _DECIDED:
        return Decision(State.WAITING, f"{its} is {session['state']}", found)
    route = next((route for route in config.route if route.name == session["route"]), None)
    if route is None:
        return Decision(State.HELD, f"the configuration no longer has the route of {its.rstrip(',')}", found)
    settings = route.kspace
    if settings is None:
        return Decision(State.REJECTED, f"route {route.name} delivers no raw data (it has no kspace table)", found)
    is_twix = raw["verdict"] not in (OPAQUE, Verdict.NOT_TWIX)
    if not is_twix and settings.scrub and not settings.opaque:
        return Decision(State.HELD, f"it cannot be de-identified, and route {route.name} takes no other formats "
                        "(kspace.opaque)", found, None, route)
    unwanted = _unwanted(config, ledger, head, raw, route) if is_twix else ""
    if unwanted:
        return Decision(State.REJECTED, unwanted, found, None, route)
    recipe = recipe_hash(settings, session["project"] or "", session["id"], settings.scrub and is_twix)
    if raw["path"] is None or head["recipe"] != recipe:
        return Decision(State.DEIDENTIFY, "to be scrubbed" if settings.scrub and is_twix else "its digests are taken",
                        found, None, route)
    labels = {name: session[name] for name in _LABELS}
    digest = set_digest(ledger, {**dict(head), **labels, "route": route.name})
    if route.review and head["approved"] != digest:
        return Decision(State.REVIEW, f"route {route.name} asks for review", found, None, route)
    late = next((row for row in keep.shipments(ledger, session) if row["state"] not in _OVER), None)
    if late is not None:
        return Decision(State.WAITING, f"waits until {its} is delivered"
                        + (f" with shipment {late['id']}" if late["id"] != session["id"] else ""), found, None, route)
    return Decision(State.READY, f"route {route.name}", found, None, route, digest if route.review else None)


def made_as_configured(config: Config, ledger: Ledger, head: sqlite3.Row) -> bool:
    """Whether what was made of raw data is what the configuration would have made now."""
    raw = ledger.one("SELECT * FROM raw WHERE shipment = ?", head["id"])
    route = next((route for route in config.route if route.name == head["route"]), None)
    if raw is None or raw["session"] is None or raw["path"] is None or route is None or route.kspace is None:
        return False
    return bool(head["recipe"] == recipe_hash(route.kspace, head["project"] or "", raw["session"], route.kspace.scrub
                                              and raw["verdict"] not in (OPAQUE, Verdict.NOT_TWIX)))


def _unwanted(config: Config, ledger: Ledger, head: sqlite3.Row, raw: sqlite3.Row, route: Route) -> str:
    settings = route.kspace
    assert settings is not None
    if keep.is_adjustment(raw):
        return "" if settings.adjustments else (f"an adjustment of the scanner, and route {route.name} wants none "
                                                "(kspace.adjustments)")
    if head["bytes"] < settings.smallest:
        return f"smaller than route {route.name} wants raw data to be (kspace.smallest)"
    if settings.protocols:
        path = ledger.value("SELECT path FROM instance WHERE shipment = ?", head["id"])
        try:
            name = protocol_name(config.spool / path)
        except OSError:  # it is missing: making it will say so
            return ""
        if not any(re.fullmatch(pattern, name) for pattern in settings.protocols):
            return f"route {route.name} does not want its protocol (kspace.protocols)"
    return ""


def apply(config: Config, ledger: Ledger, shipment: int, decision: Decision) -> bool:
    """Write a decision into the ledger; a ready shipment gets its sidecar and deliveries. Whether anything moved."""
    found = decision.found
    if decision.state is State.READY and found is not None:
        sidecar.write(config, ledger, shipment, found.session, found.series_uid, found.told)
    with ledger.write() as connection:
        head = connection.execute("SELECT * FROM shipment WHERE id = ? AND changed = ?", (shipment, decision.seen)
                                  ).fetchone()
        if head is None or (head["state"], head["reason"]) == (decision.state, decision.what):
            return False
        _keep(connection, shipment, decision)
        reason = decision.what if decision.state not in (State.READY, State.DEIDENTIFY) else None
        move(connection, shipment, decision.state, decision.what, reason=reason)
        if decision.state is State.READY and decision.route is not None:
            connection.execute("UPDATE shipment SET approved = ? WHERE id = ?", (decision.approved, shipment))
            connection.executemany(
                "INSERT OR IGNORE INTO delivery (shipment, destination, state, changed) VALUES (?, ?, ?, ?)",
                [(shipment, name, Stop.WAITING, time.time()) for name in _takers(config, decision.route)])
    return True


def _takers(config: Config, route: Route) -> Sequence[str]:
    return [name for name in route.destinations if isinstance(config.destination_named(name), XNAT)]


def _keep(connection: sqlite3.Connection, shipment: int, decision: Decision) -> None:
    """What was found, and the labels that come with it."""
    found = decision.found
    told = found.told if found else decision.told
    connection.execute("UPDATE raw SET found = coalesce(?, found), session = ?, series_uid = ?, score = ?, "
                       "series_start = ? WHERE shipment = ?",
                       (json.dumps(told) if told is not None else None, *(
                           (found.session["id"], found.series_uid, found.score, found.pair) if found else [None] * 4),
                        shipment))
    if found is None:
        return
    sources = dict.fromkeys((*_LABELS, "route"), f"shipment {found.session['id']}")
    connection.execute("UPDATE shipment SET project = ?, subject = ?, session = ?, auto_archive = ?, route = ?, "
                       "sources = ? WHERE id = ?",
                       (*(found.session[name] for name in (*_LABELS, "auto_archive", "route")), json.dumps(sources),
                        shipment))
