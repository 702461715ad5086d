"""Purge: only what was proved and has waited long enough, and safe to be cut off anywhere."""

from __future__ import annotations

import time

import pytest

from relay_agent.book import missing_files, reconcile, safety
from relay_agent.ledger import State, balance
from relay_agent.purge import purge
from relay_agent.spool import Spool
from tests.agent.box import MR, Box, Image
from tests.agent.test_stage import sort_all

DAY = 86400.0


@pytest.fixture
def filled(box: Box) -> Box:
    """A box with one shipment in each state, numbered as the states are."""
    for number, _ in enumerate(State, 1):
        box.receive(Image(study=f"9.{number}", sop=f"9.{number}.1"), Image(study=f"9.{number}", sop=f"9.{number}.2"))
    sort_all(box)
    for number, state in enumerate(State, 1):
        box.move(number, state)
    return box


DELIVERED = list(State).index(State.DELIVERED) + 1


def files(box: Box) -> int:
    return len(list(box.spool.files()))


def test_only_delivered_shipments_past_their_retention_are_purged(filled: Box) -> None:
    now = time.time()
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 7 * DAY, now + 7 * DAY - 60) == 0
    assert files(filled) == 2 * len(State)
    before = balance(filled.ledger)
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 7 * DAY, now + 7 * DAY + 60) == 1
    assert filled.state(DELIVERED) == State.PURGED and balance(filled.ledger) == before
    here = {path for path, _ in filled.spool.files()}
    for row in filled.ledger.all("SELECT path, shipment, purged FROM instance"):
        assert (row["path"] in here) == (row["shipment"] != DELIVERED) == (row["purged"] is None)
    assert missing_files(filled.ledger, filled.spool) == []
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 7 * DAY, now + 8 * DAY) == 0


@pytest.mark.parametrize("state", [state for state in State if state not in (State.DELIVERED, State.PURGED)])
def test_nothing_else_is_ever_purged(filled: Box, state: State) -> None:
    filled.move(DELIVERED, state)
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 0, time.time() + 1000 * DAY) == 0
    assert files(filled) == 2 * len(State)


class Cut(Spool):
    """A spool whose process dies after some removals."""

    def __init__(self, spool: Spool, after: int) -> None:
        super().__init__(spool.folder, 0)
        self.after = after

    def remove(self, paths: object) -> None:
        for number, path in enumerate(paths):  # type: ignore[arg-type,var-annotated]
            if number == self.after:
                raise SystemExit
            super().remove([path])
        raise SystemExit


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_crash_in_between_is_made_good_by_the_next_round(filled: Box, after: int) -> None:
    now = time.time() + 8 * DAY
    with pytest.raises(SystemExit):
        purge(filled.ledger, Cut(filled.spool, after), filled.config.deidentified, 7 * DAY, now)
    assert filled.state(DELIVERED) == State.DELIVERED
    # Nothing that a restart does brings the files back or asks for them.
    assert reconcile(filled.ledger, filled.spool, filled.config) == 0
    assert safety(filled.ledger, filled.spool, "RELAY", [(MR, f"9.{DELIVERED}.1")]) == [0]
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 7 * DAY, now) == 1
    assert filled.state(DELIVERED) == State.PURGED and missing_files(filled.ledger, filled.spool) == []
    assert files(filled) == 2 * len(State) - 2


def test_a_clock_that_was_wrong_does_not_purge_early(filled: Box) -> None:
    """What was delivered while the clock was ahead waits longer, never shorter."""
    with filled.ledger.write() as connection:
        connection.execute("UPDATE shipment SET changed = ? WHERE id = ?", (time.time() + 365 * DAY, DELIVERED))
    assert purge(filled.ledger, filled.spool, filled.config.deidentified, 7 * DAY) == 0


def test_many_shipments_are_purged_in_rounds(box: Box) -> None:
    for number in range(25):
        box.receive(Image(study=f"9.{number}", sop=f"9.{number}.1"))
    sort_all(box)
    for number in range(25):
        box.move(number + 1, State.DELIVERED)
    assert [purge(box.ledger, box.spool, box.config.deidentified, 0) for _ in range(3)] == [20, 5, 0]
    assert files(box) == 0 and not (box.spool.folder / "RELAY" / "x").exists()
