"""The de-identifying thread of the worker: takes shipments one by one, gives their instances to child processes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from pathlib import Path

from relay_agent import log as logs
from relay_agent.config import Config
from relay_agent.deidentify.key import box_key
from relay_agent.deidentify.make import Made, Refusal, Task, make_all
from relay_agent.deidentify.recipe import Recipe, Unusable, recipe_of
from relay_agent.journal import sync_file_system
from relay_agent.ledger import Ledger, State, move, note, set_apart

log = logging.getLogger(__name__)

_MEMORY = 4 * 2**30  # bytes of a process; the largest image that is decoded has that many
_BATCH = 32  # instances that a child process takes at once; what a stopped worker has to do again at most


def recipe_for(config: Config, row: sqlite3.Row) -> Recipe | None:
    """The recipe that the configuration has now for a shipment of the ledger. Raises :class:`Unusable`."""
    route = next((route for route in config.route if route.name == row["route"]), None)
    if route is None or row["kind"] == "raw":
        return None
    return recipe_of(config, route, project=row["project"], subject=row["subject"], session=row["session"],
                     accession=row["accession"])


def is_made(ledger: Ledger, row: sqlite3.Row, recipe: Recipe) -> bool:
    """Whether every instance of a shipment has been made by this recipe."""
    return bool(row["recipe"] == recipe.hash and not ledger.value(
        "SELECT count(*) FROM instance i WHERE i.shipment = ? AND NOT EXISTS "
        "(SELECT 1 FROM made m WHERE m.instance = i.id AND m.shipment = i.shipment)", row["id"]))


def oddity(ledger: Ledger, shipment: int) -> str:
    """What makes a set that cannot be delivered, though each instance by itself could; empty when nothing does."""
    studies = ledger.value("SELECT count(DISTINCT study_uid) FROM made WHERE shipment = ?", shipment)
    lacking = ledger.value("SELECT count(*) FROM made WHERE shipment = ? AND '' IN (study_uid, series_uid, "
                           "sop_instance, sop_class)", shipment)
    if lacking:
        return (f"the scripts leave {lacking} instances without Study, Series, SOP Instance or SOP Class UID; map "
                "these UIDs, do not delete them")
    if studies > 1:
        return f"the scripts make {studies} studies of one; map Study Instance UID by its old value"
    same = ledger.value(
        "SELECT count(DISTINCT m.instance) FROM made m JOIN instance i ON i.id = m.instance JOIN made o ON "
        "o.sop_instance = m.sop_instance JOIN instance p ON p.id = o.instance WHERE m.shipment = ? AND "
        "p.sop_instance <> i.sop_instance", shipment)
    if same:
        return (f"the scripts give {same} instances SOP Instance UIDs that others have, here or in other shipments: "
                "they would overwrite each other. Map SOP Instance UID by its old value")
    return ""


def forget(config: Config, connection: sqlite3.Connection, shipment: int) -> None:
    """Delete what was made of a shipment, files first."""
    shutil.rmtree(config.deidentified / str(shipment), ignore_errors=True)
    connection.execute("DELETE FROM made WHERE shipment = ?", (shipment,))
    connection.execute("UPDATE shipment SET recipe = NULL WHERE id = ?", (shipment,))


def confine(folder: Path, level: str) -> None:
    """What a child process may do: log as its parent does, without a word of others, and not outlive it.

    What a decoder may take: memory for one large image, and room for it on the disk of the data, not in /tmp.
    """
    logs.setup(level)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tempfile.tempdir = str(folder)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, most))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Deidentifier:
    """Works on one shipment at a time, with a process for each core; run() in a thread of its own."""

    def __init__(self, config: Config, ledger: Ledger, stop: threading.Event) -> None:
        self._config = config
        self._ledger = ledger
        self._stop = stop
        self._processes = config.deidentify.processes or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None
        self._after = 0  # the shipment that could not be worked on; the others come first then
        self._broke: int | None = None  # the shipment over which a child process ended abnormally
        self.work = threading.Event()

    def run(self) -> None:
        """De-identify what is due until told to stop; ``work`` wakes it early."""
        begun = False
        while not self._stop.is_set():
            try:
                if not begun:
                    self._begin()
                    begun = True
                if self.step():
                    continue
            except Exception:  # a full disk, a locked ledger: nothing is lost, it is done again
                log.exception("de-identifying failed and is done again")
                self._stop.wait(10)
            self.work.wait(1.0)
            self.work.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        """What a power cut left of files is not known before they were synced: what was under way is made anew."""
        with self._ledger.write() as connection:
            connection.execute("DELETE FROM made WHERE shipment IN (SELECT id FROM shipment WHERE state = ?)",
                               (State.DEIDENTIFY,))

    def step(self) -> bool:
        """Work on the oldest shipment that is due; whether there was one."""
        row = self._ledger.one("SELECT * FROM shipment WHERE state = ? AND kind = 'session' ORDER BY id <= ?, id "
                               "LIMIT 1", State.DEIDENTIFY, self._after)
        if row is None:
            return False
        self._after = row["id"]
        self._work_on(row)
        self._after = 0
        return True

    def _work_on(self, row: sqlite3.Row) -> None:
        try:
            recipe = recipe_for(self._config, row)
        except Unusable as error:
            self._end(row, State.HELD, str(error))
            return
        if recipe is None:
            self._end(row, State.COMPLETE, "nothing to de-identify")
            return
        try:
            refusals = self._make(row, recipe)
        except BrokenProcessPool:
            self._pool = None
            if self._broke != row["id"]:  # the memory may have been taken by others: once more
                self._broke = row["id"]
                return
            self._broke = None
            self._end(row, State.HELD, "a process ended abnormally over one of the instances; see the system's "
                      "journal, then 'retry'")
            return
        if not self._stop.is_set():
            self._judge(row, recipe, refusals)

    def _make(self, row: sqlite3.Row, recipe: Recipe) -> list[Refusal]:
        """Make what is not made yet; what was refused."""
        folder = self._config.deidentified / str(row["id"])
        if row["recipe"] != recipe.hash:
            with self._ledger.write() as connection:
                forget(self._config, connection, row["id"])
                connection.execute("UPDATE shipment SET recipe = ? WHERE id = ?", (recipe.hash, row["id"]))
        folder.mkdir(parents=True, exist_ok=True)
        rows = self._ledger.all("SELECT id, digest, path FROM instance i WHERE shipment = ? AND NOT EXISTS "
                                "(SELECT 1 FROM made m WHERE m.instance = i.id AND m.shipment = i.shipment) "
                                "ORDER BY id", row["id"])
        tasks = [Task(part["id"], part["digest"], self._config.spool / part["path"], folder / f"{part['id']}.dcm")
                 for part in rows]
        if self._pool is None:  # spawned: a fork would copy the locks of the worker's threads
            self._pool = ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn"), confine,
                                             (self._config.deidentified, self._config.log_level))
        size = max(min(_BATCH, len(tasks) // self._processes), 1)
        key, now = box_key(self._config, self._ledger), datetime.fromtimestamp(row["opened"])
        pending = [self._pool.submit(make_all, recipe, key, self._ledger.path, now, tasks[start:start + size])
                   for start in range(0, len(tasks), size)]
        refusals: list[Refusal] = []
        try:
            for future in pending:
                if self._stop.is_set() or any(not refusal.rejected for refusal in refusals):
                    break
                results = future.result()
                refusals += [result for result in results if isinstance(result, Refusal)]
                self._keep(row["id"], [result for result in results if isinstance(result, Made)])
        finally:  # nothing goes on writing files that are made again by the next round
            for future in pending:
                future.cancel()
            wait(pending)
        sync_file_system(folder)
        self._ledger.settle()  # the box's key and running numbers must never be other ones than in what is shipped
        return refusals

    def _keep(self, shipment: int, results: Sequence[Made]) -> None:
        with self._ledger.write() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO made SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14 "
                "WHERE EXISTS (SELECT 1 FROM instance WHERE id = ?1 AND shipment = ?2)",  # not set apart meanwhile
                [(made.instance, shipment, str(made.path.relative_to(self._config.data)), made.study_uid,
                  made.series_uid, made.sop_instance, made.sop_class, made.series_number, made.instance_number,
                  made.transfer_syntax, made.md5, made.sha256, made.size, json.dumps(made.risks)) for made in results])

    def _judge(self, row: sqlite3.Row, recipe: Recipe, refusals: Sequence[Refusal]) -> None:
        """Bring the shipment on: complete again, held, or without what the scripts rejected."""
        failed = next((refusal for refusal in refusals if not refusal.rejected), None)
        if failed is not None:
            hint = "Keep the scanner's copy, look after the disk, send the session again" if failed.damaged else (
                "Mend the script or the data")
            self._end(row, State.HELD, f"instance {failed.instance}: {failed.why}. {hint}, then 'retry'")
            return
        if len(refusals) == row["instances"]:
            self._end(row, State.REJECTED, f"all of it: {refusals[0].why}")
            return
        if refusals:
            with self._ledger.write() as connection:
                if not _unmoved(connection, row):
                    return
                set_apart(connection, row["id"], [refusal.instance for refusal in refusals],
                          f"{len(refusals)} instances: {refusals[0].why}")
        count = row["instances"] - len(refusals)
        self._end(row, State.COMPLETE, f"de-identified {count} instances by {recipe.names}")

    def _end(self, row: sqlite3.Row, state: State, what: str) -> None:
        """Move on, unless a person or a new configuration has done so meanwhile."""
        with self._ledger.write() as connection:
            if not _unmoved(connection, row):
                note(connection, row["id"], f"de-identification ended ({what}), and the shipment was moved meanwhile")
                return
            move(connection, row["id"], state, what, reason=what if state != State.COMPLETE else None)
        level = logging.INFO if state == State.COMPLETE else logging.WARNING
        log.log(level, "%s: %s", state, what, extra={"shipment": row["id"]})


def _unmoved(connection: sqlite3.Connection, row: sqlite3.Row) -> bool:
    """Whether a shipment has not been anywhere else since its row was read, not even to come back."""
    return connection.execute("SELECT 1 FROM shipment WHERE id = ? AND changed = ?",
                              (row["id"], row["changed"])).fetchone() is not None
