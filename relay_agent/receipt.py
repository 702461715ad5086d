"""Receipts: what was delivered, with every digest, chained so that a removed or edited one shows."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any

from relay_agent import __version__
from relay_agent.config import Config
from relay_agent.destinations import Proof
from relay_agent.ledger import Ledger, Stop
from relay_agent.package import Manifest

FIRST = "0" * 64  # what the first receipt of a box follows


def config_hash(config: Config) -> str:
    """SHA-256 of the settings in force, independent of comments and order in the file."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def write(connection: sqlite3.Connection, config: Config, manifest: Manifest, destination: str, location: str,
          proofs: Sequence[Proof], answers: Sequence[str], attempts: int) -> int:
    """Add the receipt of a verified delivery, inside the transaction that records it; its number."""
    rows = {row["id"]: row for row in connection.execute("SELECT * FROM instance WHERE shipment = ?",
                                                         (manifest.shipment,))}
    shipment = connection.execute("SELECT * FROM shipment WHERE id = ?", (manifest.shipment,)).fetchone()
    now = time.time()
    body = json.dumps({
        "box": config.name, "agent": __version__, "config_sha256": config_hash(config),
        "recipe_sha256": manifest.recipe, "approved": shipment["approved"],
        "kind": manifest.kind, **({"scan": manifest.scan, "series": manifest.series_uid, "resource": manifest.resource}
                                  if manifest.kind == "raw" else {}),
        "shipment": manifest.shipment, "supplement": manifest.supplement, "study": manifest.study_uid,
        "receiver": shipment["receiver"], "route": shipment["route"],
        "project": manifest.project, "subject": manifest.subject, "session": manifest.session,
        "destination": destination, "location": location, "verified_at": now, "attempts": attempts,
        "server_said": list(answers),
        "instances": [{
            "sop_instance": item.sop_instance, "sop_class": item.sop_class, "series": item.series_uid,
            "received_as": item.received_as, "received_at": rows[item.id]["arrived"],
            "received_from": rows[item.id]["calling_ae"], "received_copies": rows[item.id]["copies"],
            "received_data_set_sha256": rows[item.id]["digest"].hex(), "received_size": rows[item.id]["size"],
            "sent_sha256": item.sha256, "sent_md5": item.md5, "sent_size": item.size,
            "proved_by": proof.how, "server_name": proof.server_name, "server_size": proof.server_size,
        } for item, proof in zip(manifest.items, proofs, strict=True)],
    }, sort_keys=True)
    last = connection.execute("SELECT hash FROM receipt ORDER BY id DESC LIMIT 1").fetchone()
    previous = last["hash"] if last else FIRST
    number = connection.execute(
        "INSERT INTO receipt (shipment, destination, at, body, previous, hash) VALUES (?, ?, ?, ?, ?, ?)",
        (manifest.shipment, destination, now, body, previous, chain(previous, body))).lastrowid
    assert number is not None
    return number


def chain(previous: str, body: str) -> str:
    """The hash of a receipt: SHA-256 over its predecessor's hash and its own text."""
    return hashlib.sha256(previous.encode() + b"\n" + body.encode()).hexdigest()


def read(row: sqlite3.Row) -> dict[str, Any]:
    """A receipt as it is shown: its text with number, predecessor and hash."""
    return {"receipt": row["id"], "previous": row["previous"], "hash": row["hash"], **json.loads(row["body"])}


def faults(ledger: Ledger) -> Iterator[str]:
    """What is wrong with the chain, a line each; nothing when every receipt is there and unchanged."""
    previous, number = FIRST, 0
    for row in ledger.all("SELECT * FROM receipt ORDER BY id"):
        if row["id"] != number + 1:
            yield f"receipt {number + 1} is missing"
        if row["previous"] != previous and row["id"] == number + 1:
            yield f"receipt {row['id']} does not follow receipt {number}: one of the two was exchanged"
        if row["hash"] != chain(row["previous"], row["body"]):
            yield f"receipt {row['id']} was edited"
        previous, number = row["hash"], row["id"]
    for row in ledger.all(
            "SELECT d.shipment, d.destination FROM delivery d WHERE d.state = ? AND NOT EXISTS "
            "(SELECT 1 FROM receipt r WHERE r.shipment = d.shipment AND r.destination = d.destination)", Stop.VERIFIED):
        yield f"shipment {row['shipment']} was verified at {row['destination']} and has no receipt"
