"""The worker's thread for raw data: picks up, decides, has a child process read and scrub. DICOM never waits for it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sqlite3
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from relay_agent.config import Config
from relay_agent.deidentify.key import box_key
from relay_agent.deidentify.work import confine
from relay_agent.kspace import decide, keep, room
from relay_agent.kspace.make import Made, Task, make, recipe_hash
from relay_agent.kspace.pickup import OPAQUE, Inspected, RawLanding, inspect, recover
from relay_agent.kspace.twix import Verdict
from relay_agent.ledger import Ledger, State, move, note

log = logging.getLogger(__name__)

_AGAIN = 2.0  # seconds between looks at raw data that wait
_RECOVER = 60.0
_BROKE = "a process ended abnormally over it; see the system's journal, then 'retry'"


class RawWorker:
    """Takes raw data along the path up to delivery; run() in a thread of its own. Every step may be done twice."""

    def __init__(self, config: Config, ledger: Ledger, stop: threading.Event) -> None:
        self._config = config
        self._ledger = ledger
        self._stop = stop
        self._pool: ProcessPoolExecutor | None = None
        self._key = box_key(config, ledger)
        self._landing = RawLanding(config, ledger, self._key, self._look)
        self._broke: Path | int | None = None  # over what a child process ended abnormally
        self._looked = self._recovered = -1e9

    @property
    def trouble(self) -> str:
        """What cannot be picked up, and why; empty when all is well."""
        return self._landing.trouble

    def run(self) -> None:
        """Work until told to stop."""
        while not self._stop.is_set():
            try:
                moved = self.step()
            except Exception:  # a full disk, a locked ledger: nothing is lost, it is done again
                log.exception("work on raw data failed and is done again")
                moved = 0
                self._stop.wait(10)
            if not moved:
                self._stop.wait(0.5)
        self._landing.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self) -> int:
        """One round; how much was moved."""
        now = time.monotonic()
        if now - self._recovered > _RECOVER:
            self._recovered = now
            recover(self._config, self._ledger)
        moved = self._landing.scan()
        if moved or now - self._looked > _AGAIN:
            self._looked = now
            for shipment in decide.due(self._ledger):
                moved += self.decide(shipment)
        return moved + self._make_next()

    def decide(self, shipment: int) -> bool:
        """Decide one shipment; whether it moved."""
        decision = decide.decide(self._config, self._ledger, shipment)
        moved = decide.apply(self._config, self._ledger, shipment, decision)
        if moved:
            log.info("%s: %s", decision.state, decision.what, extra={"shipment": shipment})
        return moved

    def _in_child(self, over: Path | int, action: Any, *arguments: Any) -> Any:
        """Run in the child process; None when it ended abnormally, over the same for the second time."""
        if self._pool is None:
            self._config.deidentified.mkdir(parents=True, exist_ok=True)
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _confine,
                                             (self._config.deidentified, self._config.log_level))
        future = self._pool.submit(action, *arguments)
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                if future.done():
                    raise
                if self._stop.is_set():
                    raise InterruptedError("the service stops") from None
            except BrokenProcessPool:
                self._pool = None
                if self._broke == over:
                    self._broke = None
                    return None
                self._broke = over
                return self._in_child(over, action, *arguments)

    def _look(self, path: Path, opaque: bool, key: bytes) -> Inspected:
        found = self._in_child(path, inspect, path, opaque, key)
        if found is None:
            raise OSError(0, _BROKE, str(path))
        assert isinstance(found, Inspected)
        return found

    def _make_next(self) -> int:
        row = self._ledger.one("SELECT s.* FROM shipment s WHERE s.kind = 'raw' AND s.state = ? ORDER BY s.id LIMIT 1",
                               State.DEIDENTIFY)
        if row is None or row["bytes"] > room.left(self._config):  # told by an alert
            return 0
        raw = self._ledger.one("SELECT r.*, i.path AS source, i.digest FROM raw r JOIN instance i ON i.id = r.instance "
                               "WHERE r.shipment = ?", row["id"])
        session = self._ledger.one("SELECT * FROM shipment WHERE id = ?", raw["session"]) if raw is not None else None
        route = next((route for route in self._config.route if route.name == row["route"]), None)
        if raw is None or session is None or route is None or route.kspace is None:
            self._end(row, State.COMPLETE, "its route has changed")
            return 1
        scrubbed = route.kspace.scrub and raw["verdict"] not in (OPAQUE, Verdict.NOT_TWIX)
        task = Task(Path(os.path.normpath(self._config.spool / raw["source"])), raw["digest"].hex(),
                    self._config.kspace_deidentified / str(row["id"]) / raw["name"], row["project"] or "",
                    route.kspace, scrubbed, self._originals(session))
        result = self._in_child(row["id"], make, task, self._key)
        if isinstance(result, Made):
            self._keep(row, result, recipe_hash(route.kspace, row["project"] or "", session["id"], scrubbed))
        else:
            self._end(row, State.HELD, result or _BROKE)
        return 1

    def _originals(self, session: sqlite3.Row) -> tuple[Path, ...]:
        """A DICOM file of each series of the session, as it was received and as far as it is still here."""
        rows = [row for one in keep.shipments(self._ledger, session) for row in self._ledger.all(
            "SELECT path, min(id) FROM instance WHERE shipment = ? AND purged IS NULL GROUP BY series_uid", one["id"])]
        return tuple(self._config.spool / row["path"] for row in rows)

    def _keep(self, row: sqlite3.Row, made: Made, recipe: str) -> None:
        with self._ledger.write() as connection:
            if not _unmoved(connection, row):
                return
            connection.execute("UPDATE raw SET path = ?, size = ?, md5 = ?, sha256 = ?, report = ? WHERE shipment = ?",
                               (str(made.path.relative_to(self._config.data)), made.size, made.md5, made.sha256,
                                json.dumps(made.report), row["id"]))
            connection.execute("UPDATE shipment SET recipe = ? WHERE id = ?", (recipe, row["id"]))
            what = sum(part["count"] for part in made.report.get("replaced", ()))
            move(connection, row["id"], State.COMPLETE, f"scrubbed, {what} values replaced" if made.report["scrubbed"]
                 else "goes as it came")
        self.decide(row["id"])

    def _end(self, row: sqlite3.Row, state: State, what: str) -> None:
        with self._ledger.write() as connection:
            if not _unmoved(connection, row):
                note(connection, row["id"], f"work on it ended ({what}), and it was moved meanwhile")
                return
            move(connection, row["id"], state, what, reason=what if state != State.COMPLETE else None)
        log.log(logging.WARNING, "%s: %s", state, what, extra={"shipment": row["id"]})


def _confine(folder: Path, level: str) -> None:
    confine(folder, level)
    with suppress(OSError):  # a sandbox may forbid it; the services' weights then have to do
        os.nice(10)  # receiving and DICOM come first


def _unmoved(connection: sqlite3.Connection, row: sqlite3.Row) -> bool:
    return connection.execute("SELECT 1 FROM shipment WHERE id = ? AND changed = ?",
                              (row["id"], row["changed"])).fetchone() is not None
