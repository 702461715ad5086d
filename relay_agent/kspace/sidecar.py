"""The sidecar of raw data: what they are, whose, and what was done to them; JSON beside the file, without a value."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_agent import __version__
from relay_agent.config import Config
from relay_agent.ledger import Ledger


def path_of(config: Config, shipment: int, name: str) -> Path:
    """Where the sidecar of a shipment lies."""
    return config.kspace_deidentified / str(shipment) / Path(name).with_suffix(".json").name


def delivered(ledger: Ledger, session: sqlite3.Row, series_uid: str | None) -> tuple[str, str, str]:
    """Study UID, Series UID and series number as a session was delivered; the latter two empty without a series.

    ``series_uid`` is the one that was received.
    """
    made = ledger.one("SELECT m.study_uid, m.series_uid, m.series_number FROM made m JOIN instance i ON i.id = "
                      "m.instance WHERE i.series_uid = ? ORDER BY i.id LIMIT 1", series_uid) if series_uid else None
    if made is not None:
        return made["study_uid"], made["series_uid"], made["series_number"] or ""
    study = ledger.value("SELECT study_uid FROM made WHERE shipment = ? LIMIT 1", session["id"]) or session["study_uid"]
    if not series_uid:
        return study, "", ""
    number = ledger.value("SELECT series_number FROM instance WHERE series_uid = ? ORDER BY id LIMIT 1", series_uid)
    return study, series_uid, number or ""


def write(config: Config, ledger: Ledger, shipment: int, session: sqlite3.Row, series_uid: str | None,
          told: Mapping[str, Any]) -> Path:
    """Write the sidecar of raw data that are about to leave to this series (as received) of a session; its path."""
    raw = ledger.one("SELECT r.*, i.digest, i.size AS received_size FROM raw r JOIN instance i ON i.id = r.instance "
                     "WHERE r.shipment = ?", shipment)
    assert raw is not None
    facts, report = json.loads(raw["facts"]), json.loads(raw["report"] or "{}")
    best: dict[str, Any] = next((one for one in told["candidates"] if one["shipment"] == session["id"]), {})
    chosen = (best.get("series") or [{"uid": series_uid}]) if series_uid else []
    series = [delivered(ledger, session, one["uid"]) for one in chosen]
    body = {
        "box": config.name, "agent": __version__, "file": raw["name"],
        "size": raw["size"], "sha256": raw["sha256"].hex(), "md5": raw["md5"].hex(),
        "original": {"size": raw["received_size"], "sha256": raw["digest"].hex()},
        "verdict": raw["verdict"], "problem": raw["problem"],
        "measurements": facts.get("measurements", []), "readouts": facts.get("readouts", []),
        "match": {"state": told["state"], "score": best.get("score"), "reasons": best.get("reasons", []),
                  "series": [{"uid": uid, "number": number} for _, uid, number in series]},
        "clock_offset_seconds": told.get("offset"), **report}
    path = path_of(config, shipment, raw["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".part")
    with work.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
    return path
