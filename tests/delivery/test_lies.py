"""A central that lies, forgets, breaks and hangs: whatever it does, what arrives is exact, and nothing goes before.

Each misbehaviour is tried alone: first for so many requests, after which it is over, then without an end until
"somebody mends it". In between every instance must still be in the spool, and only then may there be a receipt.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay_agent.ledger import State, Stop
from tests import data
from tests.delivery.box import IMPORT, Pair, Parallel, archived_files, arrived_exactly, digests, requests_for, staff
from tests.harness import wait_for

# Name of the misbehaviour and its options: those options, and what the destination's settings are then
PASSING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "400-wrap times=2": ({"times": 2}, {}),
    "400-wrap times=1 after=2": ({"times": 1, "after": 2}, {}),  # two instances of the part are in, the others are not
    "disk-full times=2 after=1": ({"times": 2, "after": 1}, {}),
    "concurrent-400 times=1": ({"times": 1}, {}),
    "drop-instances times=1 k=2": ({"times": 1, "k": 2}, {}),
    "corrupt-instances times=1 k=2": ({"times": 1, "k": 2}, {}),
    "truncate-instances times=2 k=1": ({"times": 2, "k": 1}, {}),
    "commit-409-locked times=1": ({"times": 1}, {}),
    "commit-conflict times=1": ({"times": 1}, {}),
    "slow-commit times=1 seconds=5.0": ({"times": 1, "seconds": 5.0}, {"timeout": "2 s"}),
    "lying-archive times=1": ({"times": 1}, {}),
    "lying-archive times=1 lose=2": ({"times": 1, "lose": 2}, {}),
    "checksums-off": ({}, {}),
    "slow times=6 delay=0.3 rate=100000": ({"times": 6, "delay": 0.3, "rate": 100_000}, {}),
    "slow times=3 delay=3.0": ({"times": 3, "delay": 3.0}, {"timeout": "1 s"}),
    "black-hole times=2": ({"times": 2}, {"timeout": "1 s"}),
    "cut-at times=2 bytes=15000": ({"times": 2, "bytes": 15_000}, {}),
    "proxy-cut times=3 seconds=0.2 work=0.5 how=504": ({"times": 3, "seconds": 0.2, "work": 0.5, "how": "504"}, {}),
    "proxy-cut times=3 seconds=0.2 work=0.5 how=cut": ({"times": 3, "seconds": 0.2, "work": 0.5, "how": "cut"}, {}),
    "busy-500 times=6": ({"times": 6}, {}),
    "busy-502 times=4": ({"times": 4}, {}),
    "busy-503 times=4 retry_after=1": ({"times": 4, "retry_after": 1}, {}),
    "401 times=3": ({"times": 3}, {}),
    "redirect-html times=4": ({"times": 4}, {}),
}


# The same; the state in which the delivery stays, and words for the operator
LASTING: dict[str, tuple[dict[str, Any], dict[str, Any], Stop, str]] = {
    "empty-list": ({}, {}, Stop.STOPPED, "stored nothing of series"),
    "400-wrap": ({}, {}, Stop.WAITING, "the upload was answered 400"),
    "disk-full after=1": ({"after": 1}, {}, Stop.WAITING, "the upload was answered 400"),
    "concurrent-400": ({}, {}, Stop.WAITING, "busy with the same data"),
    "wrong-project": ({}, {}, Stop.STOPPED, "not into the project of the route"),
    "drop-instances k=2": ({"k": 2}, {}, Stop.STOPPED, "stored nothing of series"),  # of what is sent again, nothing
    "corrupt-instances k=1000": ({"k": 1000}, {}, Stop.WAITING, "were sent and taken, and are not there"),
    "truncate-instances k=1000": ({"k": 1000}, {}, Stop.WAITING, "were sent and taken, and are not there"),
    "commit-409-locked": ({}, {}, Stop.WAITING, "at work on the session"),
    "commit-conflict": ({}, {}, Stop.STOPPED, "the request to archive was answered 409"),
    "lying-archive": ({}, {}, Stop.WAITING, "does not show the session in its archive"),
    "black-hole": ({}, {"timeout": "1 s"}, Stop.WAITING, "no answer within 1 s"),
    "cut-at bytes=5000": ({"bytes": 5_000}, {}, Stop.WAITING, "the connection broke"),
    "proxy-cut seconds=0.1 work=0.3": ({"seconds": 0.1, "work": 0.3}, {}, Stop.WAITING, "answered 504"),
    "busy-500": ({}, {}, Stop.WAITING, "was answered 500"),
    "busy-502": ({}, {}, Stop.WAITING, "answered 502"),
    "busy-503": ({}, {}, Stop.WAITING, "answered 503"),
    "401": ({}, {}, Stop.WAITING, "the credential was refused"),
    "redirect-html": ({}, {}, Stop.WAITING, "does a proxy ask for a login"),
}


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Parallel]]:
    """The cases of both tables that were asked for, all under way."""
    asked = {item.name for item in request.session.items}
    running = {
        test: Parallel(run, {name: (name.split()[0], *case) for name, case in table.items()
                             if f"{test}[{name}]" in asked},
                       tmp_path_factory.mktemp(test))
        for test, run, table in (("test_what_passes_needs_nobody", passes, PASSING),
                                 ("test_what_lasts_is_said_and_costs_nothing", lasts, LASTING))}
    yield running
    for each in running.values():
        each.close()


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_needs_nobody(cases: dict[str, Parallel], case: str) -> None:
    """An outage or a lie that ends must end in an exact archive, without anybody's help and with one receipt."""
    cases["test_what_passes_needs_nobody"].outcome(case)


def passes(pair: Pair, name: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    box, central = pair(destination=settings)
    fault = central.misbehave(name, **options)
    images = list(data.study(2, 3))
    box.take(images)
    box.impatiently()
    assert fault.struck > 0, "the misbehaviour did not happen"
    arrived_exactly(central, images)
    receipt = box.proved()
    assert sorted(i["received_data_set_sha256"] for i in receipt["instances"]) == digests(images)
    assert box.balances().delivered == len(images)


@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_is_said_and_costs_nothing(cases: dict[str, Parallel], case: str) -> None:
    """As long as it lasts: the state and the words that an operator needs, every file kept, no receipt, no purge.

    Mended, and tried again by hand where only a person could help, it arrives exactly once.
    """
    cases["test_what_lasts_is_said_and_costs_nothing"].outcome(case)


def lasts(pair: Pair, name: str, options: dict[str, Any], settings: dict[str, Any], state: Stop, words: str) -> None:
    box, central = pair(destination=settings)
    central.misbehave(name, **options)
    images = list(data.study(2, 3))
    box.take(images)
    long_pause = name in ("concurrent-400", "commit-409-locked", "lying-archive")
    row = box.wait_words(words, attempts=1 if state is Stop.STOPPED or long_pause else 2)
    assert (row["state"], row["shipment_state"]) == (state, State.READY)
    box.all_here(images)
    assert box.ledger.value("SELECT count(*) FROM receipt") == 0
    assert box.balances().on_its_way == len(images)
    assert words in box.status()["destinations"][0]["error"]
    if state is Stop.STOPPED:  # nothing is tried until somebody says so
        before = len(central.requests)
        time.sleep(1.5)
        assert len(central.requests) == before
    central.behave()
    if name == "wrong-project":  # as the words ask of the central site
        for left in central.prearchive_rows():
            assert staff(central, "DELETE", f"/data{left['url']}") == 200
    if state is Stop.STOPPED:
        box.retry()
    box.impatiently()
    arrived_exactly(central, images)
    box.proved()


def test_a_proxy_that_gives_up_causes_no_second_upload(pair: Pair) -> None:
    """A cut by a proxy says nothing of the server behind it: look first, and send nothing that is there."""
    box, central = pair(destination={"retry_first": "3 s", "retry_longest": "3 s", "streams": 1})
    central.misbehave("proxy-cut", seconds=0.3, work=1.0, path=IMPORT)
    images = list(data.study(3, 4))
    box.take(images)
    # Each series is a part of its own; every one of the three posts is cut, and every one gets there.
    box.wait_words("answered 504")
    wait_for(lambda: len(requests_for(central)) == 1 and central.prearchive_rows(), say="the first part arrives")
    box.wait(Stop.VERIFIED)
    assert [request["status"] for request in requests_for(central)] == [504, 504, 504]
    assert sum(request["bytes"] for request in requests_for(central)) < sum(
        len(image.PixelData) + 2000 for image in images)
    arrived_exactly(central, images)
    assert box.proved()["attempts"] == 4


def test_a_proxy_that_gives_up_on_the_commit(pair: Pair) -> None:
    """The commit is the slowest request and the likeliest to be cut; it goes on over there and must not be repeated."""
    box, central = pair(destination={"retry_first": "2 s", "retry_longest": "2 s"})
    fault = central.misbehave("proxy-cut", seconds=0.2, work=1.0, path=r"/data/prearchive/projects/[^/]+/[^/]+/[^/]+$",
                              method="POST")
    images = list(data.study(2, 3))
    box.take(images)
    box.wait(Stop.VERIFIED)
    assert fault.struck == 1
    assert len(requests_for(central)) == 2
    arrived_exactly(central, images)


@pytest.mark.slow
def test_uploads_cut_at_random_bytes(pair: Pair) -> None:
    """Twenty uploads break off at twenty places; twenty sessions are whole, each once, and nothing is left over."""
    box, central = pair(destination={"streams": 2})
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    sessions: dict[str, list[Any]] = {}
    for number in range(20):
        label = f"S{number}_MR1"
        sessions[label] = list(data.study(2, 3, comments=f"Project:P1 Subject:S{number} Session:{label}"))
    box.take([image for images in sessions.values() for image in images])
    struck = 0
    for _ in range(20):  # each cut takes the next upload, wherever the box is by then
        fault = central.misbehave("cut-at", bytes=dice.randrange(1, 30_000), times=1)
        wait_for(lambda fault=fault: fault.struck or box.balances().delivered == 120, say="the cut strikes")
        struck += fault.struck
    central.behave()
    assert struck >= 15, "too few uploads were cut for this to mean anything"
    wait_for(lambda: box.balances().delivered == 120, say=f"all delivered; seed {seed}: {box.status()}")
    for label, images in sessions.items():
        arrived_exactly(central, images, label)
    assert len(central.prearchive_rows()) == 0


def test_damage_that_the_catalogue_hides_is_found_by_fetching(pair: Pair) -> None:
    """With checksums off and one byte of the pixels wrong, name and size are right; only the bytes tell.

    The archive's copy is not overwritten unasked, since the central site may have changed it on purpose: delivery
    stops with words. Deleted there and tried again, it is whole.
    """
    box, central = pair(checksums=False)
    fault = central.misbehave("corrupt-instances", k=1, silent=True, times=1)
    images = list(data.study(1, 4))
    box.take(images)
    row = box.wait(Stop.STOPPED)
    assert fault.struck == 1
    assert "1 of 4 instances in XNAT are not what was sent" in row["error"]
    box.all_here(images)
    assert staff(central, "DELETE", "/data/projects/P1/experiments/S1_MR1") == 200
    box.retry()
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)
    assert {i["proved_by"] for i in box.proved()["instances"]} == {"content"}


def test_damage_in_the_archive_is_not_taken_for_arrival(pair: Pair) -> None:
    """A session that rots between commit and look: its digest differs, so there is no receipt, and a person decides.

    Sending it again would need the archive's file to be overwritten, which nobody asked for.
    """
    box, central = pair()
    central.misbehave("busy-502", path=r"/data/experiments/.*/files$")
    images = list(data.study(1, 4))
    box.take(images)
    box.wait_words("answered 502")
    victim = archived_files(central)[0]
    rotten = victim.read_bytes()[:-1] + b"\xff"
    victim.write_bytes(rotten)
    central.store.run("UPDATE file SET md5 = ? WHERE name = ?",
                      hashlib.md5(rotten, usedforsecurity=False).hexdigest(), victim.name)
    central.behave()
    row = box.wait(Stop.STOPPED)
    assert "settle the conflict there" in row["error"]
    assert victim.read_bytes() == rotten, "the archive's file was overwritten"
    box.all_here(images)
    assert box.ledger.value("SELECT count(*) FROM receipt") == 0


@pytest.mark.parametrize("checksums", [True, False])
def test_a_short_file_is_sent_again_before_the_commit(pair: Pair, checksums: bool) -> None:
    """A truncated instance shows by its size even where the site has no digests, and is replaced in the prearchive."""
    box, central = pair(checksums=checksums)
    fault = central.misbehave("truncate-instances", k=2, times=1)
    images = list(data.study(1, 4))
    box.take(images)
    box.wait(Stop.VERIFIED)
    assert fault.struck == 1
    first, second = requests_for(central)
    assert second["bytes"] < first["bytes"], "more than what was short was sent again"
    arrived_exactly(central, images)


def test_an_empty_answer_for_one_series_does_not_stop_the_others(pair: Pair) -> None:
    """XNAT's series import filter may drop one series of three: it is named, and the two others are there already."""
    box, central = pair()
    central.misbehave("empty-list", skip=1, times=1)
    images = list(data.study(3, 2))
    box.take(images)
    row = box.wait(Stop.STOPPED)
    assert "stored nothing of series" in row["error"]
    assert len(central.prearchive_instances("P1")) == 4
    box.all_here(images)
    box.retry()
    box.wait(Stop.VERIFIED)
    assert len(requests_for(central)) == 4
    arrived_exactly(central, images)
