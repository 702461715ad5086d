"""What is taken back, changed or made anew while it is delivered, against a destination that does as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from relay_agent import review, ship
from relay_agent.ledger import State, Stop
from relay_agent.package import Item, Manifest
from relay_agent.route import apply, decide
from relay_agent.ship import Shipper
from tests.agent.box import SETTINGS, Box, Image
from tests.agent.test_stage import sort_all


class There:
    """Takes parts, and lets something happen when it has the first."""

    trouble = ""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.sent: list[int] = []
        self._meanwhile = meanwhile

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        return [item for item in manifest.items if item.id not in self.sent]

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        self.sent += [item.id for item in part]
        self._meanwhile()
        return "OK"


@pytest.fixture
def box(tmp_path: Path) -> Box:
    found = Box(tmp_path)
    found.receive(*(Image(sop=f"1.{number}", series=f"2.{number}") for number in range(6)))
    sort_all(found)
    decided(found)
    return found


def decided(box: Box) -> None:
    box.move(1, State.COMPLETE)
    apply(box.ledger, 1, decide(box.config, box.ledger, box.spool, 1))


def shipper(box: Box, there: There, monkeypatch: pytest.MonkeyPatch) -> Shipper:
    monkeypatch.setattr(ship, "open_destination", lambda *_: there)
    return Shipper(box.config, box.ledger, "central", threading.Event())


def test_after_a_person_has_rejected_it_no_further_part_leaves(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    there = There(lambda: review.reject(box.ledger, 1, "jane", "no consent"))
    shipper(box, there, monkeypatch).step()
    assert len(there.sent) == 1 and box.state() == State.REJECTED


def test_what_is_made_anew_meanwhile_is_not_held_as_damaged(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def again() -> None:
        review.assign(box.config, box.ledger, 1, "jane", subject="S2")
        for row in box.ledger.all("SELECT path FROM instance"):
            (box.spool.folder / row["path"]).unlink()
        raise ship.Damaged(1, Path("gone"), "is missing")

    shipper(box, There(again), monkeypatch).step()
    assert box.state() == State.COMPLETE


def test_what_has_begun_as_it_was_received_does_not_go_on_where_scripts_are_asked_for_now(
        box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site adds its script while a session is half way, and restarts the agent."""
    with box.ledger.write() as connection:
        connection.execute("UPDATE delivery SET sent = 1000")
    (tmp_path / "p1.das").write_text('version "6.6"\n(0010,0010) := subject\n', encoding="utf-8")
    later = Box(tmp_path, SETTINGS + f'scripts = ["{tmp_path / "p1.das"}"]\n')
    there = There(lambda: None)
    shipper(later, there, monkeypatch).step()
    assert there.sent == [] and later.state() == State.COMPLETE
    assert later.ledger.value("SELECT count(*) FROM delivery WHERE state = ?", Stop.WAITING) == 0
    decided(later)
    assert later.state() == State.DEIDENTIFY
