"""Disks that fill or rot in the middle of a delivery, clocks that jump, windows that close: nothing is lost by it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from relay_agent.ledger import Ledger, State, Stop
from relay_agent.spool import Spool
from relay_agent.stage import Stager
from tests import data
from tests.delivery.box import Box, Pair, archived_files, arrived_exactly, everything, requests_for, site, to
from tests.harness import Agent, running, send, wait_for
from tests.small_disk import small_disk


def test_the_disk_of_the_box_is_full(tmp_path: Path) -> None:
    """Full to the last byte while delivering: refused is what comes, kept is what came, and it goes on afterwards."""
    receive = '[receive]\nreserve = "2 MB"\nprocesses = 1\njournal = "0 B"\n'
    first, second = (list(data.study(2, 15, size=(128, 128), comments=f"Project:P1 Subject:{s} Session:{s}_MR1"))
                     for s in ("S1", "S2"))
    with site(tmp_path / "central") as central, small_disk(tmp_path / "box" / "data", "24m"):
        settings = receive + to(central.url, tmp_path / "box", compression="store") + everything()
        with running(Box(tmp_path / "box", settings), "receive") as box, box.working():
            central.misbehave("busy-503", path="/import$", skip=1)
            assert set(send(box.port, first)) == {0}
            box.wait_words("answered 503")
            filler = (box.config.data / "filler").open("wb", buffering=0)
            with filler, pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(bytes(4096))
            assert set(send(box.port, second)) == {0xA700}, "refused before anything was promised"
            central.behave()
            time.sleep(3)  # the worker meets the full disk, whatever it tries
            assert box.delivery()["shipment_state"] == State.READY
            box.all_here(first)
            (box.config.data / "filler").unlink()
            assert set(send(box.port, second)) == {0}
            box.wait(Stop.VERIFIED)
            wait_for(lambda: box.balances().delivered == 60, say="it goes on when there is room")
            arrived_exactly(central, first, "S1_MR1")
            arrived_exactly(central, second, "S2_MR1")
            box.proved()


# The disk rots


def spooled(box: Agent, image: Dataset) -> Path:
    """The file of an image in the spool."""
    path = box.ledger.value("SELECT path FROM instance WHERE sop_instance = ?", str(image.SOPInstanceUID))
    return Path(box.config.spool / path)


def flip(path: Path) -> None:
    """Change one bit of the pixels."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["one bit", "deleted"])
@pytest.mark.parametrize("checksums", [True, False], ids=["digests", "no digests"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_rotted_is_sent_again_by_the_scanner(pair: Pair, harm: Any, checksums: bool, when: str) -> None:
    """Harmed before or after its digests were taken: held and not sent, and the remedy in its words must work.

    The scanner's copy takes the place of the file, which would otherwise pass for one that is already here; what is
    left of that is kept aside.
    """
    box, central = pair(checksums=checksums, route={"review": when == "before"})
    images = list(data.study(2, 3))
    if when == "after":
        central.misbehave("busy-503", path="/import$")
    box.take(images)
    if when == "before":
        box.wait_shipment(State.REVIEW)
        harm(spooled(box, images[4]))
        assert box.cli("release", "1").returncode == 0
    else:
        box.wait_words("answered 503")
        harm(spooled(box, images[4]))
        central.behave()
    row = box.wait_shipment(State.HELD)
    assert ("is missing from the spool" if harm is Path.unlink else "is not what was received") in row["reason"]
    assert "send the session again, then 'retry'" in row["reason"]
    assert box.balances().held == 6
    assert [held["reason"] for held in box.json("list", "--state", "held")] == [row["reason"]]
    assert len(list((box.config.data / "damaged").glob("*"))) == (harm is flip)
    assert (archived_files(central), central.prearchive_rows()) == ([], [])
    box.take(images)
    assert box.cli("retry", "1").returncode == 0
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)
    box.kept(images)
    assert box.balances().received == 6
    box.proved()


def test_what_rots_while_a_second_destination_waits(tmp_path: Path) -> None:
    """The second destination must not get what rotted after the first one had it, although its digests are known."""
    with site(tmp_path / "one") as one, site(tmp_path / "two", checksums=False) as two:
        two.misbehave("busy-503")
        settings = (to(one.url, tmp_path / "box", name="one") + to(two.url, tmp_path / "box", name="two")
                    + everything("one", "two"))
        images = list(data.study(2, 3))
        with Box(tmp_path / "box", settings).working() as box:
            box.take(images)
            box.wait(Stop.VERIFIED, destination="one")
            box.wait_words("answered 503", destination="two")
            flip(spooled(box, images[0]))
            two.behave()
            box.wait_shipment(State.HELD)
            arrived_exactly(one, images)
            assert archived_files(two) == []
            box.take(images)
            box.retry()
            box.wait(Stop.VERIFIED, destination="two")
            arrived_exactly(two, images)
            assert len(requests_for(one)) == 2, "the first destination was bothered again"
            box.proved(destination="one")
            box.proved(destination="two")


# The clock jumps


@pytest.mark.parametrize("hours", [-24 * 400, -2, 3, 24 * 400])
def test_the_clock_jumps_while_a_delivery_waits(pair: Pair, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """The clock is set by hours (a zone's worth, at boot) or years: what was put off must not wait for the old time."""
    box, central = pair(destination={"retry_first": "1 h", "retry_longest": "1 h"})
    central.misbehave("busy-503")
    images = list(data.study(1, 3))
    box.take(images)
    box.wait_words("answered 503")
    central.behave()
    really = time.time
    monkeypatch.setattr(time, "time", lambda: really() + hours * 3600)
    late = list(data.study(1, 3, comments="Project:P1 Subject:S2 Session:S2_MR1"))
    box.take(late)
    row = box.wait(Stop.VERIFIED)
    assert row["attempts"] == 1
    box.wait(Stop.VERIFIED, shipment=2)
    arrived_exactly(central, images)
    arrived_exactly(central, late, "S2_MR1")
    box.balances()
    box.proved(1)
    box.proved(2)


@pytest.mark.parametrize("shift", [-10 * 365 * 86400, 10 * 365 * 86400])
def test_a_session_opened_under_a_wrong_clock_is_completed(tmp_path: Path, shift: float) -> None:
    """Whether the session seems ten years old or from the future, it is complete when it is quiet, not much later."""
    box = Box(tmp_path / "box", to("http://localhost", tmp_path / "box") + everything())
    box.take(list(data.study(1, 2)))
    stager = Stager(box.config, Ledger(box.config.ledger), Spool(box.config.spool, 0))
    assert stager.sort() == 2
    with box.ledger.write() as connection:
        connection.execute("UPDATE shipment SET opened = opened + ?", (shift,))
    start = time.monotonic()
    # What seems older than the longest time is complete at once; what comes later is a supplement, nothing is lost.
    ended = stager.complete(start)
    assert ended == (1 if shift < 0 else 0)
    assert ended + stager.complete(start + box.config.stage.quiet + 0.01) == 1


# Windows


def in_hours(hours: float) -> str:
    """A time of day."""
    return (datetime.now() + timedelta(hours=hours)).strftime("%H:%M:%S")


def later(box: Box, monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """It is some hours later, as far as the worker can tell."""
    really = time.time
    there: Any = box.worker._shippers[0].there
    monkeypatch.setattr(there._throttle, "_now", lambda: datetime.now() + timedelta(hours=hours))
    monkeypatch.setattr(time, "time", lambda: really() + hours * 3600)


def test_a_window_that_opens(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed: not sent, and no failure; it opens: sent at once, without anybody's help."""
    box, central = pair(destination={"windows": [{"start": in_hours(1), "end": in_hours(3)}]})
    images = list(data.study(1, 3))
    box.take(images)
    row = box.wait_words("waits for its time window", attempts=0)
    assert (row["attempts"], row["failing_since"]) == (0, None)
    box.all_here(images)
    later(box, monkeypatch, 2)
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)


def test_a_window_that_closes_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way stops when the window ends; the rest goes when it opens again, and only the rest."""
    images = list(data.study(6, 4, size=(96, 96)))
    with site(tmp_path / "central") as central:
        limited = to(central.url, tmp_path / "box", bandwidth="50 kB/s", compression="store", streams=1,
                     windows=[{"start": in_hours(-1), "end": in_hours(1)}]) + everything()
        with Box(tmp_path / "box", limited).working() as box, monkeypatch.context() as patch:
            box.take(images)
            wait_for(lambda: central.prearchive_instances("P1"), say="some of it is there")
            later(box, patch, 2)
            row = box.wait_words("waits for its time window", attempts=0)
            assert row["state"] == Stop.WAITING
            there = len(central.prearchive_instances("P1"))
            assert 0 < there < len(images), "nothing, or everything, went while the window was open"
            box.all_here(images)
        with Box(tmp_path / "box", to(central.url, tmp_path / "box") + everything()).working() as box:
            box.retry()
            box.wait(Stop.VERIFIED)
            arrived_exactly(central, images)
        taken = sum(request["bytes"] for request in requests_for(central) if request["status"] == 200)
        assert taken < 1.1 * sum(len(image.PixelData) + 2000 for image in images), "what was there was sent again"
