"""Review: what a person may decide in which state, and what is said and written down about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay_agent import review
from relay_agent.ledger import State, Stop, balance
from relay_agent.review import Refused
from tests.agent.box import Box, Image, stored
from tests.agent.test_stage import sort_all

ACTIONS: dict[str, Callable[[Box, int], None]] = {
    "assign": lambda box, number: review.assign(box.config, box.ledger, number, "jane", project="P9"),
    "release": lambda box, number: review.release(box.ledger, number, "jane"),
    "reject": lambda box, number: review.reject(box.ledger, number, "jane", "not ours"),
    "retry": lambda box, number: review.retry(box.ledger, number, "jane"),
}
# Where an action brings a shipment; in all other states it is refused.
ALLOWED = {
    "assign": dict.fromkeys((State.COMPLETE, State.DEIDENTIFY, State.HELD, State.REVIEW, State.READY),
                            State.COMPLETE),
    "release": {State.REVIEW: State.COMPLETE},
    "reject": dict.fromkeys((State.GATHERING, State.COMPLETE, State.DEIDENTIFY, State.WAITING, State.HELD, State.REVIEW,
                             State.READY), State.REJECTED),
    "retry": dict.fromkeys((State.HELD, State.WAITING, State.REJECTED), State.COMPLETE) | {State.READY: State.READY},
}


@pytest.fixture
def session(box: Box) -> Box:
    """A box with shipment 1."""
    box.receive(Image())
    sort_all(box)
    return box


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_in_every_state(session: Box, action: str, state: State) -> None:
    session.move(1, state)
    events = session.ledger.value("SELECT count(*) FROM event")
    after = ALLOWED[action].get(state)
    if after is not None:
        ACTIONS[action](session, 1)
        assert session.state() == after
        assert session.ledger.value("SELECT actor FROM event WHERE shipment = 1 ORDER BY id DESC") == "jane"
    else:
        with pytest.raises(Refused, match=f"shipment 1 is {state}; this is for shipments that are ") as caught:
            ACTIONS[action](session, 1)
        for allowed in ALLOWED[action]:  # the message says where it would be possible
            assert allowed in str(caught.value)
        assert session.state() == state and session.ledger.value("SELECT count(*) FROM event") == events
    assert balance(session.ledger).difference == 0


@pytest.mark.parametrize("action", ACTIONS)
def test_a_number_that_does_not_exist(session: Box, action: str) -> None:
    with pytest.raises(Refused, match="there is no shipment 7; see relay-agent list"):
        ACTIONS[action](session, 7)


@pytest.mark.parametrize("label", ["a b", "", "a/b", "Ä", "a'; DROP TABLE shipment; --", "P1\n"])
@pytest.mark.parametrize("name", ["project", "subject", "session"])
def test_labels_that_xnat_would_change_are_refused(session: Box, name: str, label: str) -> None:
    session.move(1, State.HELD)
    with pytest.raises(Refused, match=f"the {name} .* has characters that XNAT does not take"):
        review.assign(session.config, session.ledger, 1, "jane", **{name: label})
    assert session.state() == State.HELD


def test_a_route_has_to_exist(session: Box) -> None:
    session.move(1, State.HELD)
    with pytest.raises(Refused, match="there is no route nowhere; the configuration has all"):
        review.assign(session.config, session.ledger, 1, "jane", route="nowhere")


def test_one_label_leaves_the_others_and_what_was_assigned_before(session: Box) -> None:
    session.move(1, State.HELD)
    review.assign(session.config, session.ledger, 1, "jane", project="P9")
    review.assign(session.config, session.ledger, 1, "jim", session="E9", route="all")
    row = session.ledger.one("SELECT project, subject, session, route, sources FROM shipment")
    assert row is not None and tuple(row)[:4] == ("P9", None, "E9", "all")
    assert row["sources"].count("a person") == 3


def test_rejecting_takes_the_deliveries_and_leaves_the_files(session: Box) -> None:
    session.move(1, State.READY)
    with session.ledger.write() as connection:
        connection.execute("INSERT INTO delivery (shipment, destination, state, changed) VALUES (1, 'central', ?, 0)",
                           (Stop.WAITING,))
    review.reject(session.ledger, 1, "jane", "not ours")
    assert session.ledger.all("SELECT * FROM delivery") == []
    assert session.ledger.value("SELECT reason FROM shipment") == "not ours"
    assert (session.spool.folder / session.ledger.value("SELECT path FROM instance")).exists()
    assert balance(session.ledger).rejected == 1


def test_rejecting_takes_an_approval_back(session: Box) -> None:
    """Somebody approved, somebody rejected, somebody takes that back: it went out, and nobody looked at it again."""
    session.move(1, State.REVIEW)
    review.release(session.ledger, 1, "jane")
    review.reject(session.ledger, 1, "jim", "no consent")
    review.retry(session.ledger, 1, "joan")
    assert session.ledger.value("SELECT approved FROM shipment") is None


def test_series_of_what_was_delivered_somewhere_cannot_be_excluded(box: Box) -> None:
    """They counted as rejected, and a destination had them."""
    box.receive(Image(), Image(sop="1.2", series="1.2.3.2"))
    sort_all(box)
    box.move(1, State.HELD)
    with box.ledger.write() as connection:
        connection.execute("INSERT INTO delivery (shipment, destination, state, changed) "
                           "VALUES (1, 'a', 'verified', 0), (1, 'b', 'waiting', 0)")
    with pytest.raises(Refused, match="delivered to a destination already"):
        review.exclude(box.ledger, 1, ["1.2.3.2"], "jane", "a screen capture")
    assert box.state() == State.HELD and box.ledger.value("SELECT count(*) FROM shipment") == 1


def test_supplements_go_on_when_series_were_excluded_from_their_session(box: Box) -> None:
    box.receive(Image(sop="1.1"), Image(sop="1.2", series="1.2.3.2"), Image(sop="1.1", version=1))
    sort_all(box)
    for shipment in (1, 2):
        box.move(shipment, State.HELD)
    apart = review.exclude(box.ledger, 1, ["1.2.3.2"], "jane", "a screen capture")
    assert [box.state(number) for number in (1, 2, apart)] == [State.COMPLETE, State.COMPLETE, State.REJECTED]
    assert balance(box.ledger).difference == 0


def test_what_was_delivered_somewhere_cannot_be_rejected(session: Box) -> None:
    session.move(1, State.READY)
    with session.ledger.write() as connection:
        connection.execute("INSERT INTO delivery (shipment, destination, state, changed) "
                           "VALUES (1, 'a', 'verified', 0), (1, 'b', 'waiting', 0)")
    with pytest.raises(Refused, match="delivered to a destination already"):
        review.reject(session.ledger, 1, "jane", "not ours")
    assert session.state() == State.READY and session.ledger.value("SELECT count(*) FROM delivery") == 2


@pytest.mark.parametrize(("before", "after"), [
    (Stop.WAITING, (Stop.WAITING, 0, None, "there")), (Stop.ARRIVED, (Stop.WAITING, 0, None, "there")),
    (Stop.STOPPED, (Stop.WAITING, 0, None, None)), (Stop.VERIFIED, (Stop.VERIFIED, 9e9, "refused", "there"))])
def test_retrying_makes_deliveries_due_and_leaves_verified_ones(
        session: Box, before: Stop, after: tuple[object, ...]) -> None:
    session.move(1, State.READY)
    with session.ledger.write() as connection:
        connection.execute("INSERT INTO delivery (shipment, destination, state, due, error, location, changed) "
                           "VALUES (1, 'central', ?, 9e9, 'refused', 'there', 0)", (before,))
    review.retry(session.ledger, 1, "jane")
    assert tuple(session.ledger.all("SELECT state, due, error, location FROM delivery")[0]) == after


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", ["assign", "retry"])
def test_supplements_that_wait_follow_their_session(box: Box, action: str, state: State) -> None:
    box.receive(Image(sop="1.1"), Image(sop="1.1", version=1), Image(study="9", sop="9.1"))
    sort_all(box)
    for shipment, before in ((1, State.HELD), (2, state), (3, State.HELD)):
        box.move(shipment, before)
    ACTIONS[action](box, 1)
    follows = state in (State.COMPLETE, State.HELD, State.REVIEW, State.READY)
    assert (box.state(1), box.state(3)) == (State.COMPLETE, State.HELD)
    assert box.state(2) == (State.COMPLETE if follows else state)
    assert (box.ledger.value("SELECT what FROM event WHERE shipment = 2 ORDER BY id DESC")
            == "complete: follows shipment 1") == follows


@pytest.mark.parametrize(("stop", "allowed"), [(Stop.WAITING, True), (Stop.STOPPED, True), (Stop.ARRIVED, False),
                                               (Stop.VERIFIED, False)])
def test_labels_change_only_as_long_as_nothing_arrived_under_the_old_ones(
        session: Box, stop: Stop, allowed: bool) -> None:
    session.move(1, State.READY)
    with session.ledger.write() as connection:
        connection.execute("INSERT INTO delivery (shipment, destination, state, changed) VALUES (1, 'central', ?, 0)",
                           (stop,))
    if allowed:
        ACTIONS["assign"](session, 1)
        assert session.state() == State.COMPLETE and session.ledger.all("SELECT * FROM delivery") == []
    else:
        with pytest.raises(Refused, match=f"shipment 1 is {stop} at central under its labels"):
            ACTIONS["assign"](session, 1)
        assert session.state() == State.READY and session.ledger.value("SELECT project FROM shipment") is None


def test_a_quarantined_instance_is_looked_at_again(box: Box) -> None:
    box.receive(Image(sop="1.1"))
    box.row(stored("x"), "1.2", problem="unreadable")
    sort_all(box)
    with pytest.raises(Refused, match="instance 1 is not in quarantine; see relay-agent list --quarantined"):
        review.retry_quarantined(box.ledger, 1, "jane")
    review.retry_quarantined(box.ledger, 2, "jane")
    assert balance(box.ledger).quarantined == 0
    sort_all(box)  # it is still no file
    assert balance(box.ledger).quarantined == 1 and balance(box.ledger).difference == 0
