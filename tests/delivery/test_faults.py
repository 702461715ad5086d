"""Faults on this side of the line: a failing disk, a token that ends, a line with a limit, hours that are closed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from relay_agent.ledger import State, Stop
from tests import data
from tests.central import Central
from tests.delivery.box import USER, Box, archived_files, arrived_exactly, everything, requests_for, site, to
from tests.harness import running


@contextmanager
def working(folder: Path, destination: dict[str, Any] | None = None, *, more: str = "",
            route: dict[str, Any] | None = None, **central: Any) -> Iterator[tuple[Box, Central]]:
    """A central XNAT, and a box whose working service is a process that delivers to it."""
    with site(folder / "central", **central) as there:
        settings = to(there.url, folder / "box", **destination or {}) + more + everything(**route or {})
        box = Box(folder / "box", settings)
        with running(box, "work"):
            yield box, there


def flip(path: Path) -> None:
    """Turn over one bit of the pixels, as a failing disk does: neither the size nor the header tells."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("when", ["before the first attempt", "between two attempts"])
@pytest.mark.parametrize(("damage", "words"), [(flip, "is not what was received"),
                                               (Path.unlink, "is missing from the spool")], ids=["flipped", "deleted"])
def test_a_damaged_file_is_held(tmp_path: Path, damage: Any, words: str, when: str) -> None:
    """What the disk spoils must not become the archive's truth: held, with words that save the scanner's copy."""
    waiting = when == "before the first attempt"
    with working(tmp_path, route={"review": waiting}) as (box, central):
        if not waiting:
            central.misbehave("busy-503")
        images = list(data.study(1, 4))
        box.take(images)
        if waiting:
            box.wait_shipment(State.REVIEW)
        else:
            box.wait_words("answered 503")
        victim = box.ledger.one("SELECT id, path FROM instance ORDER BY id LIMIT 1 OFFSET 2")
        damage(box.config.spool / victim["path"])
        central.behave()
        if waiting:
            assert box.cli("release", "1").returncode == 0
        reason = box.wait_shipment(State.HELD)["reason"]
        assert f"the file of instance {victim['id']} {words}" in reason
        assert "Keep the scanner's copy" in reason
        assert archived_files(central) == []
        if waiting:
            assert requests_for(central) == [], "it was sent unseen"
        assert box.balances().held == len(images)
        assert len([path for path in box.config.spool.rglob("*") if path.is_file()]) == len(images) - 1


def test_a_token_renews_itself(tmp_path: Path) -> None:
    """The credential is only for the first day: from then on each token fetches the next, whatever became of it."""
    lifetime = 8.0  # over there; renewed after two seconds
    with working(tmp_path, {"token_lifetime": "4 s"}, token_lifetime=lifetime) as (box, central):
        box.take(list(data.study(1, 1, comments="Project:P1 Subject:T0 Session:T0_MR1")))
        box.wait(Stop.VERIFIED)
        (box.folder / "secret").write_text(f"{USER}:wrong", encoding="utf-8")
        with requests.Session() as session:
            session.trust_env = False
            assert session.get(f"{central.url}/data/auth", auth=(USER, "wrong"), timeout=60).status_code == 401
        refused_here = 1
        replaced = time.monotonic()
        number = 1
        while time.monotonic() < replaced + 1.5 * lifetime:
            number += 1
            next_one = time.monotonic() + 2
            box.take(list(data.study(1, 1, comments=f"Project:P1 Subject:T{number} Session:T{number}_MR1")))
            box.wait(Stop.VERIFIED, number)
            time.sleep(max(next_one - time.monotonic(), 0))
        issued = requests_for(central, "GET", "/data/services/tokens/issue")
        assert [request["status"] for request in issued] == [200] * len(issued)
        assert len(issued) >= 3, "one token cannot have lasted that long"
        assert len([request for request in central.requests if request["status"] == 401]) == refused_here
        assert box.balances().delivered == number


def test_bandwidth_is_kept_to(tmp_path: Path) -> None:
    """A hospital's line is shared with patient care: the limit holds for all streams together, and is made use of."""
    with working(tmp_path, {"bandwidth": "8 Mbit/s", "compression": "store"}) as (box, central):
        study = list(data.study(5, 1, size=(512, 1024)))
        box.take(study)
        box.wait(Stop.VERIFIED)
        arrived_exactly(central, study)
        uploads = requests_for(central)
        assert len(uploads) > 1, "only one stream was tried"
        sent = sum(request["bytes"] for request in uploads)
        assert 5_000_000 < sent < 5_500_000
        took = max(r["at"] + r["seconds"] for r in uploads) - min(r["at"] for r in uploads)
        assert 4.5 <= took <= 15, f"{sent} bytes in {took:.1f} s"


def test_nothing_goes_outside_the_time_window(tmp_path: Path) -> None:
    """By day not a byte goes of what is sent by night, and the words do not make anybody look for a fault."""
    now = datetime.now()
    start, end = (f"{now + timedelta(hours=hours):%H:%M}" for hours in (2, 3))
    window = f'[[destination.windows]]\nstart = "{start}"\nend = "{end}"\n'
    with working(tmp_path, more=window) as (box, central):
        images = list(data.study(1, 3))
        box.take(images)
        row = box.wait_words("waits for its time window", attempts=0)
        minutes = int(row["error"].rpartition(" in ")[2].removesuffix(" min"))
        assert 115 <= minutes <= 120
        assert (row["state"], row["failing_since"]) == (Stop.WAITING, None)
        time.sleep(2)
        assert requests_for(central) == [], "an upload was begun"
        assert central.prearchive_rows() == []
        assert box.delivery()["sent"] == 0
        box.all_here(images)


def test_an_open_window_lets_it_through(tmp_path: Path) -> None:
    """The counterpart, without which the test above would also hold for a window that never opens."""
    now = datetime.now()
    start, end = (f"{now + timedelta(hours=hours):%H:%M}" for hours in (-2, 2))
    with working(tmp_path, more=f'[[destination.windows]]\nstart = "{start}"\nend = "{end}"\n') as (box, central):
        images = list(data.study(1, 3))
        box.take(images)
        box.wait(Stop.VERIFIED)
        arrived_exactly(central, images)
