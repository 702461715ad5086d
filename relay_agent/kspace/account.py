"""What the ledger says of raw data: for ``status``, ``show`` and for alerts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from relay_agent.config import Config
from relay_agent.kspace import keep, room
from relay_agent.kspace.pickup import fits
from relay_agent.ledger import Ledger, State
from relay_agent.units import show_duration, show_size

_SOON = 86400.0  # before raw data are overwritten unfetched


def status(config: Config, ledger: Ledger, now: float) -> dict[str, Any] | None:
    """Raw data at a glance; None where the configuration has no source of them."""
    if not config.kspace.source:
        return None
    ahead = room.outlook(config, ledger, now)
    serials = [row[0] for row in ledger.all("SELECT DISTINCT serial FROM raw WHERE series_start IS NOT NULL")]
    clocks = {serial: found for serial in serials if (found := keep.clock(ledger, serial)) is not None}
    return {
        "states": {row["state"]: {"files": row["n"], "bytes": row["b"]} for row in ledger.all(
            "SELECT state, count(*) AS n, sum(bytes) AS b FROM shipment WHERE kind = 'raw' GROUP BY state")},
        "room": ahead.left, "freed": ahead.freed, "on_scanners": ahead.there, "a_day": ahead.daily,
        "seconds_until_window": round(ahead.window), "expected": ahead.expected,
        "sources": [{"name": source.name, **_landed(config, source.name), **_listed(
            ledger, source.name, source.overwritten_after, now)} for source in config.kspace.source],
        "clocks": [{"scanner": serial, "offset_seconds": round(found.seconds, 2), "pairs": found.pairs,
                    "spread_seconds": round(found.spread, 2)} for serial, found in sorted(clocks.items())]}


def _landed(config: Config, name: str) -> dict[str, Any]:
    """Files in the landing directory: those to be picked up, and those that no pattern takes."""
    source = next(one for one in config.kspace.source if one.name == name)
    waiting, strange = 0, 0
    for _, _, names in os.walk(config.kspace_landing / name):
        for file in names:
            if not file.startswith(".") and not file.endswith(".lock"):
                waiting, strange = (waiting + 1, strange) if fits(file, source) else (waiting, strange + 1)
    return {"in_landing": waiting, "not_raw_by_name": strange}


def _listed(ledger: Ledger, name: str, kept: float, now: float) -> dict[str, Any]:
    """What the scanner has and the box has not, as last listed."""
    row = ledger.one("SELECT count(*) AS n, sum(size) AS bytes, min(changed) AS oldest FROM listed WHERE source = ? "
                     "AND wanted AND fetched IS NULL", name)
    assert row is not None
    oldest = row["oldest"]
    return {"not_fetched": row["n"], "not_fetched_bytes": row["bytes"] or 0,
            "oldest_not_fetched_seconds": round(now - oldest) if oldest else None,
            "overwritten_in_seconds": round(oldest + kept - now) if oldest else None}


def raw(ledger: Ledger, shipment: int) -> dict[str, Any] | None:
    """All that is known of one raw shipment beside its session; None for a session."""
    row = ledger.one("SELECT * FROM raw WHERE shipment = ?", shipment)
    if row is None:
        return None
    found, facts = json.loads(row["found"] or "{}"), json.loads(row["facts"])
    return {"file": row["name"], "verdict": row["verdict"], "problem": row["problem"],
            "adjustment": keep.is_adjustment(row),
            "measurements": facts.get("measurements", []), "readouts": facts.get("readouts", []),
            "scanner_serial": row["serial"], "session_shipment": row["session"], "series": row["series_uid"],
            "score": row["score"], "match": "by hand" if row["by_hand"] else found.get("state"),
            "candidates": found.get("candidates", []), "deadline": row["due"],
            "leaves_as": {"size": row["size"], "sha256": row["sha256"].hex()} if row["sha256"] else None,
            "report": json.loads(row["report"] or "null")}


def conditions(config: Config, ledger: Ledger, now: float) -> Iterator[tuple[str, str, str]]:
    """What an operator has to know: name, subject and text of each condition. No names, only numbers."""
    if not config.kspace.source:
        return
    for name, where, text in (
            ("raw incomplete", "r.verdict = 'incomplete'", "not whole: cut, or still written when last looked at. "
             "Have them fetched or exported again before the scanner overwrites them"),
            ("raw unmatched", "r.session IS NULL AND r.verdict <> 'incomplete'", "without a session that is sure. "
             "relay-agent show NUMBER has the candidates; relay-agent assign NUMBER --to SHIPMENT decides"),
            ("raw held", "r.session IS NOT NULL", "held. relay-agent show NUMBER says why; then assign, retry or "
             "reject")):
        rows = ledger.all(f"SELECT s.id FROM shipment s JOIN raw r ON r.shipment = s.id WHERE s.state = ? AND {where} "
                          "ORDER BY s.id", State.HELD)
        if rows:
            numbers = ", ".join(str(row["id"]) for row in rows[:10]) + (" …" if len(rows) > 10 else "")
            yield name, "raw data", f"{len(rows)} files of raw data are {text}: shipments {numbers}."
    ahead = room.outlook(config, ledger, now)
    if ahead.short:
        opens = f", and the next window to send opens in {show_duration(ahead.window)}" if ahead.window else ""
        soon = f", and {show_size(ahead.freed)} will be purged in time" if ahead.freed else ""
        waits = ledger.value("SELECT sum(bytes) FROM shipment WHERE kind = 'raw' AND state NOT IN (?, ?, ?)",
                             State.DELIVERED, State.PURGED, State.REJECTED)
        yield "raw space short", "disk", (
            f"{show_size(ahead.left)} are left for raw data{soon}. The scanners hold {show_size(ahead.there)} that is "
            f"not fetched and produced {show_size(ahead.daily)} a day{opens}: {show_size(ahead.expected)} are expected "
            f"by then. {show_size(waits or 0)} wait to leave. What does not fit is not fetched, and the scanner "
            "overwrites it. Open a longer window, shorten purge.retention or give it more disk (kspace.quota, "
            "kspace.reserve).")
    for source in config.kspace.source:
        found = _listed(ledger, source.name, source.overwritten_after, now)
        if found["overwritten_in_seconds"] is not None and found["overwritten_in_seconds"] < _SOON:
            yield "raw data at risk", source.name, (
                f"{found['not_fetched']} files ({show_size(found['not_fetched_bytes'])}) on the scanner of "
                f"{source.name} have not been fetched; the oldest is expected to be overwritten "
                + (f"in {show_duration(found['overwritten_in_seconds'])}" if found["overwritten_in_seconds"] > 0
                   else "about now") + ". See relay-agent status for what stands in the way.")

