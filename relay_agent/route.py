"""Identify and route: whose a complete session is, where it goes, and what has to happen before."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from relay_agent.config import Config, Identify, Route
from relay_agent.config_destinations import XNAT
from relay_agent.deidentify.recipe import Unusable, recipe_of
from relay_agent.deidentify.work import is_made, oddity, recipe_for
from relay_agent.dicom import NotDICOM
from relay_agent.header import read_header
from relay_agent.identify import COMMENT_TAGS, Identity, extract, identify, needed_tags
from relay_agent.java_regex import RuleValueError
from relay_agent.kspace.decide import made_as_configured
from relay_agent.ledger import Ledger, State, Stop, move
from relay_agent.package import set_digest
from relay_agent.spool import Spool

_LABELS = ("project", "subject", "session")
_NOBODY = Identity(None, None, None, None, {})


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of a complete session."""

    state: State  # DEIDENTIFY, READY, REVIEW or HELD; COMPLETE: not yet
    what: str
    identity: Identity
    route: Route | None = None
    made: bool = True  # what goes on is what scripts made, not what was received
    approved: str | None = None  # the digest of the set, when that is what a person approved
    accession: str | None = None
    seen: float = 0.0  # when the shipment last moved before this was decided


def decide(config: Config, ledger: Ledger, spool: Spool, shipment: int) -> Decision:
    """Identify and route one shipment by its first instance (as XNAT does) and its series; changes nothing.

    What a person assigned stands. A supplement goes where the session went that it belongs to.
    """
    row = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    if row is None:
        raise KeyError(shipment)
    return replace(_decide(config, ledger, spool, row), seen=row["changed"])


def _decide(config: Config, ledger: Ledger, spool: Spool, row: sqlite3.Row) -> Decision:
    by_hand = _by_hand(row)
    accession = by_hand.get("accession")
    base = ledger.one("SELECT * FROM shipment WHERE study_uid = ? AND receiver = ? AND supplement = 0",
                      row["study_uid"], row["receiver"]) if row["supplement"] else None
    chosen = row["route"] if "route" in by_hand else None
    if base is not None and "project" not in by_hand:
        if base["state"] in (State.GATHERING, State.COMPLETE):  # it will be known in a moment
            return Decision(State.COMPLETE, f"waits for shipment {base['id']}", _NOBODY)
        accession = accession or base["accession"]
        if base["state"] in (State.HELD, State.REJECTED):
            return Decision(State.HELD, f"belongs to shipment {base['id']}, which is {base['state']}",
                            _overruled(_NOBODY, by_hand))
        found = Identity(base["project"], base["subject"], base["session"],
                         None if base["auto_archive"] is None else bool(base["auto_archive"]),
                         dict.fromkeys(_LABELS, f"shipment {base['id']}"))
        chosen = chosen or base["route"]
    else:
        try:
            found = _identity(config, ledger, spool, row["id"])
        except RuleValueError as error:
            if not by_hand.keys() >= set(_LABELS):
                return Decision(State.HELD, f"a routing rule cannot be used on this session: {error}",
                                _overruled(_NOBODY, by_hand))
            found = _NOBODY
        accession = accession or _accession(ledger, spool, row["id"])
    found = _overruled(found, by_hand)
    route = _route(config, ledger, spool, row, found, chosen)
    if route is None:
        return Decision(State.HELD, "no route takes it; assign it by hand or add a route", found)
    if route.assign_project and base is None and "project" not in by_hand:
        found = Identity(route.assign_project, found.subject, found.session, found.auto_archive,
                         {**found.sources, "project": f"route {route.name}"})
    if found.auto_archive is None and route.auto_archive is not None:
        found = Identity(found.project, found.subject, found.session, route.auto_archive,
                         {**found.sources, "auto_archive": f"route {route.name}"})
    lacking = [name for name in _LABELS if not getattr(found, name)]
    if lacking and any(isinstance(config.destination_named(name), XNAT) for name in route.destinations):
        return Decision(State.HELD, f"no {' and no '.join(lacking)} was found; assign it by hand", found, route)
    return replace(_prepared(config, ledger, row, found, route, accession), accession=accession)


def _prepared(config: Config, ledger: Ledger, row: sqlite3.Row, found: Identity, route: Route, accession: str | None
              ) -> Decision:
    """Whether a session that has its labels and its route may go: de-identified, and seen where that is wanted."""
    try:
        recipe = recipe_of(config, route, project=found.project, subject=found.subject, session=found.session,
                           accession=accession)
    except Unusable as error:
        return Decision(State.HELD, f"route {route.name}: {error}", found, route)
    if recipe is not None and not is_made(ledger, row, recipe):
        return Decision(State.DEIDENTIFY, f"by {recipe.names}", found, route)
    odd = oddity(ledger, row["id"]) if recipe is not None else ""
    if odd:
        return Decision(State.HELD, odd, found, route)
    digest = set_digest(ledger, {**dict(row), "project": found.project, "subject": found.subject,
                                 "session": found.session, "route": route.name,
                                 "recipe": row["recipe"] if recipe is not None else None})
    if row["approved"] != digest:
        why = _why_review(ledger, row["id"], route, recipe is not None, found, bool(row["approved"]))
        if why:
            return Decision(State.REVIEW, why, found, route, recipe is not None)
    return Decision(State.READY, f"route {route.name} to {', '.join(route.destinations)}", found, route,
                    recipe is not None, digest if row["approved"] == digest else None)


def _why_review(ledger: Ledger, shipment: int, route: Route, made: bool, found: Identity, lapsed: bool) -> str:
    """Why a person has to look at it first; empty when nobody has to."""
    reasons = [f"route {route.name} asks for review"] if route.review else []
    if made:
        named = [name for name in _LABELS if found.sources.get(name, "").startswith("fallback (0010,")]
        if named and not route.patient_labels_allowed:  # the label leaves, whatever the scripts do to the header
            reasons.append(f"what is in the patient's data became the label of the {' and the '.join(named)}")
        rows = ledger.all("SELECT risks, count(*) AS n FROM made WHERE shipment = ? AND risks <> '[]' GROUP BY risks",
                          shipment)
        counts: Counter[str] = Counter()
        for row in rows:
            kinds = set(json.loads(row["risks"])) - set(route.pixel_risks_allowed)
            counts.update(dict.fromkeys(kinds, row["n"]))
        reasons += [f"pixels may identify ({kind}: {counts[kind]} instances)" for kind in sorted(counts)]
    if reasons and lapsed:
        reasons.append("what was approved has changed since")
    return "; ".join(reasons)


class Lapsed(Exception):
    """Scripts, labels or data are not any more what a decision was made on; the shipment has to be routed again."""


def require_current(config: Config, ledger: Ledger, shipment: int) -> None:
    """Raise :class:`Lapsed` unless what is about to be shipped is what the configuration would make now."""
    row = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    assert row is not None
    if row["approved"] and row["approved"] != set_digest(ledger, row):
        raise Lapsed("it is not what was approved")
    if row["kind"] == "raw":
        if not made_as_configured(config, ledger, row):
            raise Lapsed("the settings for raw data, or its session, have changed since it was made")
        return
    try:
        recipe = recipe_for(config, row)
    except Unusable as error:
        raise Lapsed(str(error)) from None
    if (recipe is None) != (row["recipe"] is None) or (recipe is not None and not is_made(ledger, row, recipe)):
        raise Lapsed("its scripts, labels or data have changed since it was de-identified")


def apply(ledger: Ledger, shipment: int, decision: Decision) -> bool:
    """Write a decision into the ledger; a ready shipment gets its deliveries.

    False, and nothing is written, for one that has to wait, or when a person has moved the shipment meanwhile.
    """
    if decision.state is State.COMPLETE:
        return False
    identity = decision.identity
    with ledger.write() as connection:
        if not connection.execute(
                "UPDATE shipment SET project = ?, subject = ?, session = ?, auto_archive = ?, sources = ?, "
                "route = coalesce(?, route), accession = coalesce(?, accession) WHERE id = ? AND state = ? AND "
                "changed = ?",
                (identity.project, identity.subject, identity.session, identity.auto_archive,
                 json.dumps(identity.sources), decision.route.name if decision.route else None, decision.accession,
                 shipment, State.COMPLETE, decision.seen)).rowcount:
            return False
        if not decision.made:
            connection.execute("UPDATE shipment SET recipe = NULL WHERE id = ?", (shipment,))
        move(connection, shipment, decision.state, decision.what,
             reason=decision.what if decision.state in (State.HELD, State.REVIEW) else None)
        if decision.state is State.READY and decision.route is not None:
            connection.execute("UPDATE shipment SET approved = ? WHERE id = ?", (decision.approved, shipment))
            # Destinations of another route, from before it was routed again, are not to be waited for.
            names = decision.route.destinations
            connection.execute("DELETE FROM delivery WHERE shipment = ? AND state <> ? AND destination NOT IN "
                               f"({', '.join('?' * len(names))})", (shipment, Stop.VERIFIED, *names))
            connection.executemany(
                "INSERT OR IGNORE INTO delivery (shipment, destination, state, changed) VALUES (?, ?, ?, ?)",
                [(shipment, name, Stop.WAITING, time.time()) for name in names])
        return True


def _by_hand(row: sqlite3.Row) -> dict[str, str]:
    """Labels, accession and route that a person gave; what is not here is found anew each time."""
    sources = json.loads(row["sources"] or "{}")
    return {name: row[name] for name in (*_LABELS, "accession", "route")
            if row[name] and sources.get(name) == "a person"}


def _overruled(found: Identity, by_hand: Mapping[str, str]) -> Identity:
    return Identity(by_hand.get("project", found.project), by_hand.get("subject", found.subject),
                    by_hand.get("session", found.session), found.auto_archive,
                    {**found.sources, **dict.fromkeys(by_hand, "a person")})


def _identity(config: Config, ledger: Ledger, spool: Spool, shipment: int) -> Identity:
    """What XNAT would make of the session's first instance."""
    rules = config.identify.rules()
    first = ledger.value("SELECT path FROM instance WHERE shipment = ? ORDER BY id LIMIT 1", shipment)
    return identify(_values(spool, first, needed_tags(rules)), rules, known_project(config.identify))


def _accession(ledger: Ledger, spool: Spool, shipment: int) -> str | None:
    """``Accession:`` in the comments of the session's first instance, for the headers of its route."""
    first = ledger.value("SELECT path FROM instance WHERE shipment = ? ORDER BY id LIMIT 1", shipment)
    values = _values(spool, first, frozenset(COMMENT_TAGS))
    return next((found for tag in COMMENT_TAGS if (found := extract("Accession", values.get(tag, "")))), None)


def known_project(settings: Identify) -> Callable[[str], str | None] | None:
    """The look-up that identification asks, or None when the configuration lists no projects."""
    projects = set(settings.projects)
    return (lambda candidate: candidate if candidate in projects else None) if projects else None


def _values(spool: Spool, path: str, tags: frozenset[str]) -> dict[str, str]:
    try:
        return read_header(spool.folder / path, tags)
    except (NotDICOM, OSError):  # it was read before; what cannot be read now identifies nothing
        return {}


def _route(config: Config, ledger: Ledger, spool: Spool, row: sqlite3.Row, found: Identity, chosen: str | None
           ) -> Route | None:
    if chosen:
        return next((route for route in config.route if route.name == chosen), None)
    series = ledger.all("SELECT path, calling_ae, modality, scanner_serial, min(id) FROM instance WHERE shipment = ? "
                        "GROUP BY series_uid", row["id"])
    tags = frozenset(tag for route in config.route for tag in route.tags)
    values = [_values(spool, part["path"], tags) if tags else {} for part in series]
    receiver = next((r.ae_title for r in config.receiver if r.name == row["receiver"]), row["receiver"])
    for route in config.route:
        if any(_takes(route, receiver, part, value, found) for part, value in zip(series, values, strict=True)):
            return route
    return None


def _takes(route: Route, receiver: str, series: sqlite3.Row, values: Mapping[str, str], found: Identity) -> bool:
    conditions = ((route.receiver, receiver), (route.calling_ae, series["calling_ae"]),
                  (route.modality, series["modality"]), (route.scanner_serial, series["scanner_serial"]),
                  (route.project, found.project))
    if any(allowed and value not in allowed for allowed, value in conditions):
        return False
    return all(re.fullmatch(pattern, values.get(tag, "")) for tag, pattern in route.tags.items())
