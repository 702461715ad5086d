"""The ledger: opened by several at once, and a balance that holds after every step."""

from __future__ import annotations

import multiprocessing
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relay_agent import dicom, review, stage
from relay_agent.ledger import CATEGORY, MIGRATIONS, Balance, Ledger, LedgerError, State, balance, move, recount
from tests.agent.box import MR, Box, stored


def _open(path: Path, start: multiprocessing.synchronize.Event) -> None:
    start.wait()
    Ledger(path).value("SELECT count(*) FROM instance")


def test_services_that_start_at_the_same_moment_make_one_ledger(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        path, start = tmp_path / str(attempt) / "ledger.sqlite", fork.Event()
        processes = [fork.Process(target=_open, args=(path, start)) for _ in range(4)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert Ledger(path).value("PRAGMA user_version") == len(MIGRATIONS)
        assert Ledger(path).value("SELECT count(*) FROM tally") == 4


def test_threads_share_a_ledger_with_a_connection_each(box: Box) -> None:
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for count in range(20):
                box.row(stored(f"{number}-{count}"), f"1.{number}.{count}")
        except BaseException as error:  # whatever a thread ends with belongs to the test
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and balance(box.ledger).received == 80


def test_a_ledger_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match=r"newer release \(schema 99, this one knows \d+\).*snapshot"):
        Ledger(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def test_a_file_that_is_no_ledger_is_refused_with_words(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite cannot be opened: .*snapshot"):
        Ledger(path)


def test_a_ledger_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    started = time.monotonic()
    with pytest.raises(LedgerError, match=r"unable to open database file.*the service's user"):
        Ledger(tmp_path / "ledger.sqlite")
    assert time.monotonic() - started < 20  # a locked one gets 60 s


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    monkeypatch.setattr("relay_agent.ledger.MIGRATIONS", ("CREATE TABLE a (x);\nCREATE TABLE a (x);",))
    with pytest.raises(LedgerError, match="already exists"):
        Ledger(path)
    monkeypatch.undo()
    assert balance(Ledger(path)).difference == 0


def test_what_is_raised_inside_a_transaction_undoes_it(box: Box) -> None:
    with suppress(KeyError), box.ledger.write() as connection:
        connection.execute("UPDATE tally SET value = 7")
        raise KeyError
    assert balance(box.ledger).received == 0
    with box.ledger.write() as connection:  # and the connection can be used again
        connection.execute("UPDATE tally SET value = 0")


def test_every_state_has_its_place_in_the_balance() -> None:
    fields = set(Balance.__dataclass_fields__) - {"received", "quarantined"}
    assert set(CATEGORY) == set(State) and set(CATEGORY.values()) == fields


class Books(RuleBasedStateMachine):
    """Anything that happens to instances and shipments, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.box = Box(Path(self.folder.name))
        self.arrived = 0

    def teardown(self) -> None:
        self.box.ledger.close()
        self.folder.cleanup()

    @rule(number=st.integers(0, 12), receiver=st.sampled_from(["RELAY", "OTHER"]), sop=st.integers(0, 4),
          problem=st.sampled_from([None, None, "unreadable"]))
    def arrive(self, number: int, receiver: str, sop: int, problem: str | None) -> None:
        self.arrived += 1
        file = stored(f"{receiver}{number}", size=100 + number)
        self.box.row(file, f"1.{sop}", receiver=receiver, problem=problem)

    @rule(study=st.integers(0, 2), quarantine=st.booleans())
    def sort(self, study: int, quarantine: bool) -> None:
        row = self.box.ledger.one("SELECT id, receiver, sop_instance FROM instance WHERE shipment IS NULL AND problem "
                                  "IS NULL ORDER BY id LIMIT 1")
        if row is None:
            return
        with self.box.ledger.write() as connection:
            if quarantine:
                connection.execute("UPDATE instance SET problem = 'bad' WHERE id = ?", (row["id"],))
            else:
                stage._sort_in(connection, row, {dicom.STUDY: f"2.{study}", dicom.SERIES: "3", dicom.SOP_CLASS: MR,
                                                 dicom.SOP: row["sop_instance"]})

    @rule(instance=st.integers(1, 26))
    def clear(self, instance: int) -> None:
        with suppress(review.Refused):
            review.retry_quarantined(self.box.ledger, instance, "tester")

    @rule(shipment=st.integers(1, 6), state=st.sampled_from(State))
    def move(self, shipment: int, state: State) -> None:
        self.box.move(shipment, state)

    @rule(shipment=st.integers(1, 6), action=st.sampled_from(["release", "reject", "retry", "assign"]))
    def decide(self, shipment: int, action: str) -> None:
        with suppress(review.Refused):
            if action == "reject":
                review.reject(self.box.ledger, shipment, "tester", "why")
            elif action == "assign":
                review.assign(self.box.config, self.box.ledger, shipment, "tester", project="P1")
            else:
                getattr(review, action)(self.box.ledger, shipment, "tester")

    @invariant()
    def the_books_balance(self) -> None:
        ledger = self.box.ledger
        found = balance(ledger)
        assert found.difference == 0
        counts = dict.fromkeys(("delivered", "held", "quarantined", "rejected", "on_its_way"), 0)
        for row in ledger.all("SELECT i.shipment, i.problem, s.state FROM instance i LEFT JOIN shipment s "
                              "ON s.id = i.shipment"):
            if row["shipment"] is None:
                counts["quarantined" if row["problem"] else "on_its_way"] += 1
            else:
                counts[CATEGORY[State(row["state"])]] += 1
        assert Balance(received=sum(counts.values()), **counts) == found
        assert found.received + ledger.value("SELECT value FROM tally WHERE name = 'repeated'") == self.arrived
        assert recount(ledger) == 0
        for row in ledger.all("SELECT s.instances, s.bytes, count(i.id) AS n, coalesce(sum(i.size), 0) AS b FROM "
                              "shipment s LEFT JOIN instance i ON i.shipment = s.id GROUP BY s.id"):
            assert (row["instances"], row["bytes"]) == (row["n"], row["b"])


Books.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestBooks = pytest.mark.slow(Books.TestCase)


@pytest.fixture
def kept(box: Box) -> Iterator[Box]:
    """A box with one instance each: new, quarantined, staged."""
    box.row(stored("a"), "1.1")
    box.row(stored("b"), "1.2", problem="unreadable")
    box.row(stored("c"), "1.3")
    row = box.ledger.one("SELECT id, receiver FROM instance WHERE sop_instance = '1.3'")
    assert row is not None
    with box.ledger.write() as connection:
        stage._sort_in(connection, row, {dicom.STUDY: "2.1", dicom.SERIES: "3", dicom.SOP: "1.3"})
    return box


@pytest.mark.parametrize("sop", ["1.1", "1.2", "1.3"])
def test_a_row_that_was_deleted_by_hand_shows(kept: Box, sop: str) -> None:
    assert recount(kept.ledger) == 0
    with kept.ledger.write() as connection:
        connection.execute("DELETE FROM instance WHERE sop_instance = ?", (sop,))
    assert recount(kept.ledger) == 1


def test_the_sums_follow_an_instance_that_is_moved_and_a_sum_changed_by_hand_shows(kept: Box) -> None:
    with kept.ledger.write() as connection:
        move(connection, 1, State.DELIVERED, "it was")
        connection.execute("INSERT INTO shipment (study_uid, receiver, supplement, state, opened, last_arrival, "
                           "changed) VALUES ('2.2', 'RELAY', 0, 'held', 0, 0, 0)")
        connection.execute("UPDATE instance SET shipment = 2 WHERE sop_instance = '1.3'")
    assert recount(kept.ledger) == 0 and balance(kept.ledger).held == 1
    with kept.ledger.write() as connection:
        connection.execute("UPDATE shipment SET instances = instances + 1 WHERE id = 1")
    assert recount(kept.ledger) == 1


def test_a_shipment_that_was_deleted_by_hand_shows_in_the_balance(kept: Box) -> None:
    with kept.ledger.write() as connection:
        connection.execute("PRAGMA defer_foreign_keys = ON")
        connection.execute("UPDATE instance SET shipment = NULL WHERE shipment = 1")
        connection.execute("DELETE FROM event")
        connection.execute("DELETE FROM shipment")
    assert balance(kept.ledger).difference == 1
