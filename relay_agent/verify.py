"""Verify: nothing counts as delivered before the destination was asked and every instance was found there."""

from __future__ import annotations

import time
from collections.abc import Sequence

from relay_agent import receipt
from relay_agent.config import Config
from relay_agent.destinations import Destination, Retry
from relay_agent.ledger import Ledger, State, Stop, move, note
from relay_agent.package import Manifest, require_intact


def verify(config: Config, ledger: Ledger, there: Destination, name: str, manifest: Manifest, location: str,
           answers: Sequence[str], attempts: int) -> None:
    """Prove a delivery and record it with its receipt; the last destination's makes the shipment delivered.

    Raises what :meth:`relay_agent.destinations.Destination.prove` raises, and :class:`relay_agent.package.Damaged`.
    """
    proofs = there.prove(manifest, location)
    if [proof.sop_instance for proof in proofs] != [item.sop_instance for item in manifest.items]:
        raise Retry("the proofs do not cover every instance")
    # Where it is not our digest that proves it, a file that was damaged here would be proved against itself.
    require_intact(item for item, proof in zip(manifest.items, proofs, strict=True) if proof.how != "md5")
    with ledger.write() as connection:
        current = connection.execute("SELECT state, project, subject, session, (SELECT count(*) FROM instance WHERE "
                                     "shipment = s.id AND problem IS NULL) AS instances FROM shipment s WHERE id = ?",
                                     (manifest.shipment,)).fetchone()
        labels = tuple(current[name] or "" for name in ("project", "subject", "session"))
        if (current["state"] != State.READY or current["instances"] != len({item.id for item in manifest.items})
                or labels != (manifest.project, manifest.subject, manifest.session)):
            raise Retry("the shipment changed while it was delivered")
        number = receipt.write(connection, config, manifest, name, location, proofs, answers, attempts)
        connection.execute("UPDATE delivery SET state = ?, error = NULL, failing_since = NULL, location = ?, "
                           "changed = ? WHERE shipment = ? AND destination = ?",
                           (Stop.VERIFIED, location, time.time(), manifest.shipment, name))
        note(connection, manifest.shipment, f"verified at {name}: {len(proofs)} of {len(manifest.items)} instances, "
                                            f"receipt {number}")
        left = connection.execute("SELECT count(*) FROM delivery WHERE shipment = ? AND state <> ?",
                                  (manifest.shipment, Stop.VERIFIED)).fetchone()[0]
        if not left:
            move(connection, manifest.shipment, State.DELIVERED, "verified at every destination")
    ledger.settle()
