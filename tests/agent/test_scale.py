"""Years of instances in the ledger cost nothing where it matters: what is done per arrival, shipment or look.

Measured in steps of SQLite's machine and by its query plans, which do not depend on how busy the computer is.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relay_agent import alert, dicom, package, purge, report, route
from relay_agent.book import Arrival, record, safety
from relay_agent.ledger import State, balance, recount
from relay_agent.ship import Shipper
from relay_agent.stage import Stager
from tests.agent.box import MR, Box, stored

SHIPMENTS = 5000
_STEP = 5
Measured = dict[str, tuple[int, float]]  # steps and seconds by what was done

COUNT = """WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?)"""


def fill(box: Box, instances: int) -> None:
    """So many instances in 5,000 shipments, most of which are delivered and purged long ago."""
    with box.ledger.write() as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for trigger in triggers:  # they would be most of the time; what they keep is set below
            connection.execute(f"DROP TRIGGER {trigger['name']}")
        connection.execute(f"{COUNT} INSERT INTO association SELECT i, 'RELAY', 'SCANNER', '192.0.2.1', i, i + 1, "
                           "'released', 1, 1 FROM n", (SHIPMENTS,))
        connection.execute(
            f"{COUNT} INSERT INTO shipment (study_uid, receiver, supplement, state, opened, last_arrival, changed, "
            "instances, bytes, project, subject, session, route) SELECT '2.25.' || i, 'RELAY', 0, "
            "CASE WHEN i % 100 = 0 THEN 'ready' WHEN i % 100 = 1 THEN 'held' ELSE 'purged' END, i, i, i, ?, ?, 'P1', "
            "'S' || i, 'E' || i, 'all' FROM n", (SHIPMENTS, instances // SHIPMENTS, instances // SHIPMENTS * 1000))
        connection.execute(
            "INSERT INTO delivery (shipment, destination, state, changed) SELECT id, 'central', "
            "iif(state = 'purged', 'verified', 'waiting'), changed FROM shipment WHERE state <> 'held'")
        connection.execute(
            f"{COUNT} INSERT INTO instance (receiver, sop_instance, sop_class, transfer_syntax, digest, size, path, "
            "via, calling_ae, association, arrived, shipment, series_uid, modality) SELECT 'RELAY', "
            "'2.25.' || (i / ?) || '.' || i, ?, '1.2.840.10008.1.2.1', randomblob(32), 1000, "
            "'RELAY/20260101/00/' || i || '.dcm', 'association', 'SCANNER', i / ?, i, i / ? + 1, "
            "'2.25.' || (i / ?) || '.0', 'MR' FROM n",
            (instances, *[instances // SHIPMENTS], MR, *[instances // SHIPMENTS] * 3))
        connection.execute("UPDATE tally SET value = ? WHERE name = 'received'", (instances,))
        for trigger in triggers:
            connection.execute(trigger["sql"])
    assert balance(box.ledger).difference == recount(box.ledger) == 0


class Meter:
    """Runs something on a box and tells what SQLite had to do."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.steps = 0
        self.statements: set[str] = set()

    def __call__(self, action: Callable[[Box], object]) -> tuple[int, float]:
        connection = self.box.ledger._connection()
        self.steps = 0
        connection.set_progress_handler(self._count, _STEP)
        connection.set_trace_callback(self.statements.add)
        started = time.perf_counter()
        action(self.box)
        seconds = time.perf_counter() - started
        connection.set_progress_handler(None, 0)
        connection.set_trace_callback(None)
        return self.steps * _STEP, seconds

    def _count(self) -> int:
        self.steps += 1
        return 0


def arrive(box: Box) -> None:
    with box.ledger.write() as connection:
        for number in range(500):
            record(connection, box.spool, Arrival("RELAY", stored(f"new{number}"), MR, f"2.25.99999.{number}",
                                                  "1.2.840.10008.1.2.1", "SCANNER", 7), "association")


def repeat(box: Box) -> None:
    """The scanner sends an old study again, with other bytes."""
    with box.ledger.write() as connection:
        for number in range(100):
            record(connection, box.spool, Arrival("RELAY", stored(f"again{number}"), MR, "2.25.0.0",
                                                  "1.2.840.10008.1.2.1", "SCANNER", 7), "association")


def sort(box: Box) -> None:
    stager = Stager(box.config, box.ledger, box.spool)
    while stager.sort():
        pass


def next_delivery(box: Box) -> None:
    shipper: Any = SimpleNamespace(_settings=box.config.destination[0], _ledger=box.ledger, _name="central")
    assert Shipper._next(shipper, Shipper.kind) is not None


def tell(box: Box) -> None:
    found = list(alert.conditions(box.config, box.ledger, box.spool, now=time.time()))
    assert found  # sessions are held for years


ACTIONS: dict[str, Callable[[Box], object]] = {
    "status": lambda box: report.status(box.config, box.ledger),
    "record 500 arrivals": arrive,
    "sort them": sort,
    "complete": lambda box: Stager(box.config, box.ledger, box.spool).complete(0),
    "record 100 repeats": repeat,
    "sort those": sort,
    "next delivery": next_delivery,
    "storage commitment": lambda box: safety(box.ledger, box.spool, "RELAY",
                                             [(MR, f"2.25.{n}.{n}") for n in range(100)]),
    "alerts": tell,
    "purge": lambda box: purge.purge(box.ledger, box.spool, box.config.deidentified, 1.0),
    "list": lambda box: (report.shipments(box.ledger, None, 100), report.quarantined(box.ledger, 100)),
}


def one_shipment(box: Box) -> None:
    """What grows with the shipment that is worked on, and with nothing else."""
    with box.ledger.write() as connection:
        connection.execute("UPDATE instance SET sent_md5 = x'00', sent_sha256 = x'00', sent_size = 1 "
                           "WHERE shipment = 1")
    assert report.shipment(box.ledger, 1) and package.manifest(box.config, box.ledger, 1).items
    route.decide(box.config, box.ledger, box.spool, 1)
    box.move(1, State.DELIVERED)
    assert purge.purge(box.ledger, box.spool, box.config.deidentified, -1.0) == 1


# Passes over as many instances as are new, in quarantine or in conflict, and the look at the newest one.
BOUNDED = re.compile(r"USING (COVERING )?INDEX instance_(unstaged|problem|conflict)")
NEWEST = re.compile(r"ORDER BY id DESC LIMIT 1$")


@pytest.fixture(scope="module", autouse=True)
def headers() -> Iterator[None]:
    """The instances of this module have no files."""

    def header(self: Stager, row: sqlite3.Row) -> dict[str, str]:
        study, _, _ = str(row["sop_instance"]).rpartition(".")
        return {dicom.STUDY: study, dicom.SERIES: f"{study}.0", dicom.SOP: row["sop_instance"], dicom.SOP_CLASS: MR}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stager, "_header", header)
        yield


def measure(box: Box) -> tuple[Measured, Meter]:
    meter = Meter(box)
    found = {name: meter(action) for name, action in ACTIONS.items()}
    assert balance(box.ledger).difference == recount(box.ledger) == 0
    assert box.ledger.value("SELECT count(*) FROM instance WHERE shipment IS NULL") == 0
    return found, meter


def scans(meter: Meter) -> list[str]:
    """Statements whose plan goes through all instances."""
    found = []
    connection = meter.box.ledger._connection()
    for statement in sorted(meter.statements):
        if not re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", statement):
            continue
        aliases = {"instance", *re.findall(r"\binstance (?!WHERE|ORDER|GROUP|SET|LEFT|JOIN)(\w+)\b", statement)}
        for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"):
            match = re.match(r"SCAN (\w+)", row["detail"])
            if match and match[1] in aliases and not BOUNDED.search(row["detail"]) and not NEWEST.search(statement):
                found.append(f"{row['detail']}: {statement}")
    return found


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Meter]:
    """An instance in each shipment."""
    box = Box(tmp_path_factory.mktemp("few"))
    fill(box, SHIPMENTS)
    found, meter = measure(box)
    meter(one_shipment)
    return found, meter


def test_no_statement_goes_through_all_instances(few: tuple[Measured, Meter]) -> None:
    _, meter = few
    assert len(meter.statements) > 30  # the trace works
    assert scans(meter) == []


def test_the_measures_notice_what_does_go_through_all_instances(few: tuple[Measured, Meter]) -> None:
    meter = Meter(few[1].box)
    steps, _ = meter(lambda box: box.ledger.all("SELECT i.sop_instance FROM instance i ORDER BY size"))
    assert len(scans(meter)) == 1 and steps > SHIPMENTS
    assert meter(lambda box: recount(box.ledger))[0] > SHIPMENTS  # the hourly audit, which is allowed to


@pytest.mark.parametrize("instances", [10 * SHIPMENTS, pytest.param(200 * SHIPMENTS, marks=pytest.mark.slow)])
def test_more_instances_in_the_ledger_are_no_more_work(
        few: tuple[Measured, Meter], tmp_path: Path, instances: int) -> None:
    box = Box(tmp_path)
    started = time.perf_counter()
    fill(box, instances)
    print(f"\n{instances:,} instances written in {time.perf_counter() - started:.1f} s")
    large, _ = measure(box)
    small, _ = few
    for name, (steps, seconds) in large.items():
        print(f"{name:<22}{small[name][0]:>9,} steps {small[name][1] * 1000:8.1f} ms   {steps:>9,} steps "
              f"{seconds * 1000:8.1f} ms")
    assert {name: (small[name][0], steps) for name, (steps, _) in large.items()
            if steps > 1.1 * small[name][0] + 1000} == {}
    for state in (State.READY, State.HELD, State.PURGED):
        assert box.ledger.value("SELECT sum(instances) FROM shipment WHERE state = ?", state) > 0
