"""Routing: whose a session is and where it goes, decided the same way however often it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay_agent import review
from relay_agent.ledger import State
from relay_agent.route import Decision, apply, decide
from relay_agent.stage import Stager
from tests.agent.box import Box, Image

RECEIVERS = "".join(f'[[receiver]]\nae_title = "{title}"\nport = 0\nallow = ["*"]\n' for title in ("RELAY", "TWO"))
XNAT = '[[destination]]\nname = "central"\nurl = "https://xnat.example.org"\n'
PACS = '[[destination]]\nname = "pacs"\nkind = "dicom"\nhost = "pacs"\nport = 104\nae_title = "PACS"\n'


def route(name: str = "all", more: str = "", to: str = '"central"') -> str:
    return f'[[route]]\nname = "{name}"\ndestinations = [{to}]\n{more}\n'


class Desk:
    """A box whose sessions are complete as soon as they are sorted."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder = folder
        self.box = Box(folder, RECEIVERS + XNAT + PACS + settings)

    def reconfigure(self, settings: str) -> None:
        self.box = Box(self.folder, RECEIVERS + XNAT + PACS + settings)

    def receive(self, *images: Image, receiver: str = "RELAY", calling: str = "SCANNER") -> int:
        self.box.receive(*images, receiver=receiver, calling=calling)
        Stager(self.box.config, self.box.ledger, self.box.spool).sort()
        for row in self.box.ledger.all("SELECT id FROM shipment WHERE state = 'gathering' ORDER BY id"):
            self.box.move(row["id"], State.COMPLETE)
        return int(self.box.ledger.value("SELECT max(id) FROM shipment"))

    def decide(self, shipment: int = 1) -> Decision:
        decision = decide(self.box.config, self.box.ledger, self.box.spool, shipment)
        apply(self.box.ledger, shipment, decision)
        return decision

    def labels(self, shipment: int = 1) -> tuple[str | None, ...]:
        row = self.box.ledger.one("SELECT project, subject, session, route FROM shipment WHERE id = ?", shipment)
        assert row is not None
        return tuple(row)

    def deliveries(self, shipment: int = 1) -> list[str]:
        return [row[0] for row in self.box.ledger.all("SELECT destination FROM delivery WHERE shipment = ? ORDER BY 1",
                                                      shipment)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "box"


def test_a_session_that_says_what_it_is_goes_its_way(folder: Path) -> None:
    desk = Desk(folder, route(to='"central", "pacs"'))
    desk.receive(Image())
    assert desk.decide().state is State.READY
    assert desk.labels() == ("P1", "S1", "S1_MR1", "all") and desk.deliveries() == ["central", "pacs"]
    assert (desk.box.state(), desk.box.ledger.value("SELECT reason FROM shipment")) == ("ready", None)


@pytest.mark.parametrize(("condition", "takes"), [
    ('receiver = ["RELAY"]', True), ('receiver = ["TWO"]', False), ('calling_ae = ["SCANNER", "X"]', True),
    ('calling_ae = ["X"]', False), ('modality = ["MR"]', True), ('modality = ["CT"]', False),
    ('scanner_serial = ["1"]', False), ('project = ["P1"]', True), ('project = ["P2"]', False),
    ('tags = { "0010,4000" = "Project:P1.*" }', True), ('tags = { "0010,4000" = "Project:P1" }', False),
    ('tags = { "0018,1030" = "" }', True), ('tags = { "0018,1030" = ".+" }', False),
    ('receiver = ["RELAY"]\nmodality = ["MR"]\nproject = ["P1"]', True),
    ('receiver = ["RELAY"]\nmodality = ["CT"]\nproject = ["P1"]', False)])
def test_all_conditions_of_a_route_have_to_hold(folder: Path, condition: str, takes: bool) -> None:
    desk = Desk(folder, route("first", condition) + route("second"))
    desk.receive(Image())
    desk.decide()
    assert desk.labels()[3] == ("first" if takes else "second")


def test_one_series_that_fits_is_enough_but_it_has_to_fit_alone(folder: Path) -> None:
    desk = Desk(folder, route("both", 'calling_ae = ["A"]\nproject = ["P1"]\ntags = { "0020,000E" = "1.2.3.2" }')
                + route("one", 'calling_ae = ["B"]\ntags = { "0020,000E" = "1.2.3.2" }'))
    desk.receive(Image(sop="1.1", series="1.2.3.1"), calling="A")
    desk.box.move(1, State.GATHERING)
    desk.receive(Image(sop="1.2", series="1.2.3.2"), calling="B")
    desk.decide()
    assert desk.labels()[3] == "one"


def test_without_a_route_it_is_held_and_goes_on_after_one_was_added(folder: Path) -> None:
    desk = Desk(folder, route(more='modality = ["CT"]'))
    desk.receive(Image())
    decision = desk.decide()
    assert (decision.state, desk.box.state()) == (State.HELD, "held")
    assert "no route takes it" in desk.box.ledger.value("SELECT reason FROM shipment") and desk.deliveries() == []
    desk.reconfigure(route())
    review.retry(desk.box.ledger, 1, "tester")
    assert desk.decide().state is State.READY


@pytest.mark.parametrize(("comments", "lacking"), [
    ("Subject:S1 Session:E1", "no project"), ("Project:P1", "no subject and no session"),
    ("Project:P1 Session:E1", "no subject")])
def test_what_xnat_needs_and_is_not_found_is_held(folder: Path, comments: str, lacking: str) -> None:
    desk = Desk(folder, route())
    desk.receive(Image(comments=comments))
    assert desk.decide().state is State.HELD
    assert desk.box.ledger.value("SELECT reason FROM shipment").startswith(f"{lacking} was found; assign it")
    # Another archive does not need labels.
    desk.reconfigure(route(to='"pacs"'))
    review.retry(desk.box.ledger, 1, "tester")
    assert desk.decide().state is State.READY


def test_a_route_with_a_script_holds_everything(folder: Path) -> None:
    desk = Desk(folder, route(more='scripts = ["/etc/site.das"]'))
    desk.receive(Image())
    assert desk.decide().state is State.HELD and desk.deliveries() == []
    assert "/etc/site.das" in desk.box.ledger.value("SELECT reason FROM shipment")


def test_the_archive_flag_of_the_instances_comes_before_the_routes(folder: Path) -> None:
    desk = Desk(folder, route(more="auto_archive = true"))
    desk.receive(Image(comments="Project:P1 Subject:S1 Session:E1 AA:false"))
    desk.receive(Image(study="9", sop="9.1"))
    assert [desk.decide(shipment).identity.auto_archive for shipment in (1, 2)] == [False, True]


ASSIGNING = 'assign_project = "STUDY"\n'


def test_a_project_that_a_route_assigns_stays_when_it_is_decided_again(folder: Path) -> None:
    desk = Desk(folder, route(more=ASSIGNING + "review = true"))
    desk.receive(Image())
    assert desk.decide().state is State.REVIEW and desk.labels() == ("STUDY", "S1", "S1_MR1", "all")
    review.release(desk.box.ledger, 1, "tester")
    assert desk.decide().state is State.READY
    assert desk.labels() == ("STUDY", "S1", "S1_MR1", "all")


def test_what_a_person_assigned_stands(folder: Path) -> None:
    desk = Desk(folder, route(more=ASSIGNING))
    desk.receive(Image(comments="Subject:S1"))
    desk.decide()
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", session="E9", project="P9")
    for _ in range(2):
        assert desk.decide().state is State.READY
        assert desk.labels() == ("P9", "S1", "E9", "all")
        desk.box.move(1, State.COMPLETE)


def test_a_route_that_a_person_chose_stands(folder: Path) -> None:
    desk = Desk(folder, route("first") + route("never", 'modality = ["XX"]', to='"pacs"'))
    desk.receive(Image())
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", route="never")
    desk.decide()
    assert desk.labels()[3] == "never" and desk.deliveries() == ["pacs"]


def test_a_route_that_the_configuration_chose_is_chosen_again(folder: Path) -> None:
    desk = Desk(folder, route("old"))
    desk.receive(Image(comments="Project:P1"))
    assert desk.decide().state is State.HELD and desk.labels()[3] == "old"
    desk.reconfigure(route("new", to='"pacs"') + route("old"))
    review.retry(desk.box.ledger, 1, "tester")
    assert desk.decide().state is State.READY and desk.labels()[3] == "new" and desk.deliveries() == ["pacs"]


def test_destinations_of_the_route_before_are_not_waited_for_unless_they_have_it(folder: Path) -> None:
    desk = Desk(folder, route("old", to='"central", "pacs"'))
    desk.receive(Image())
    desk.decide()
    with desk.box.ledger.write() as connection:
        connection.execute("UPDATE delivery SET state = 'verified' WHERE destination = 'central'")
    desk.reconfigure(PACS.replace('"pacs"', '"other"') + route("new", to='"other"'))
    desk.box.move(1, State.HELD)
    review.retry(desk.box.ledger, 1, "tester")
    desk.decide()
    assert desk.deliveries() == ["central", "other"]


BROKEN_RULE = '[identify]\nproject_rules = ["(0010,4000):Project.*:1"]\n'  # there is no group 1


def test_a_rule_that_cannot_be_used_holds_until_a_person_says_everything(folder: Path) -> None:
    desk = Desk(folder, route() + BROKEN_RULE)
    desk.receive(Image())
    assert desk.decide().state is State.HELD
    assert "a routing rule cannot be used" in desk.box.ledger.value("SELECT reason FROM shipment")
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", project="P9")
    assert desk.decide().state is State.HELD and desk.labels()[0] == "P9"
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", subject="S9", session="E9")
    assert desk.decide().state is State.READY and desk.labels() == ("P9", "S9", "E9", "all")


# Supplements


def base_and_supplement(desk: Desk) -> None:
    """Shipment 1 on its way, shipment 2 its supplement with other labels in its instances."""
    desk.receive(Image(sop="1.1"))
    desk.decide(1)
    assert desk.receive(Image(sop="1.2", comments="Project:P7 Subject:S7 Session:E7")) == 2


def test_a_supplement_goes_where_its_session_went(folder: Path) -> None:
    desk = Desk(folder, route())
    base_and_supplement(desk)
    assert desk.decide(2).state is State.READY
    assert desk.labels(2) == desk.labels(1) == ("P1", "S1", "S1_MR1", "all")


def test_a_supplement_still_does_so_when_it_is_tried_again(folder: Path) -> None:
    desk = Desk(folder, route())
    base_and_supplement(desk)
    desk.decide(2)
    desk.box.move(2, State.HELD)  # a file was damaged, say
    review.retry(desk.box.ledger, 2, "tester")
    assert desk.decide(2).state is State.READY
    assert desk.labels(2) == ("P1", "S1", "S1_MR1", "all")


def test_a_supplement_can_be_told_otherwise_by_a_person(folder: Path) -> None:
    desk = Desk(folder, route())
    base_and_supplement(desk)
    review.assign(desk.box.config, desk.box.ledger, 2, "tester", session="E2")
    assert desk.decide(2).state is State.READY
    assert desk.labels(2) == ("P1", "S1", "E2", "all")


@pytest.mark.parametrize("state", [State.GATHERING, State.COMPLETE])
def test_a_supplement_waits_while_its_session_is_decided(folder: Path, state: State) -> None:
    """Held, it waited for a person; its session was de-identified, or released, at just that moment."""
    desk = Desk(folder, route())
    base_and_supplement(desk)
    desk.box.move(1, state)
    decision = decide(desk.box.config, desk.box.ledger, desk.box.spool, 2)
    assert not apply(desk.box.ledger, 2, decision) and desk.box.state(2) == State.COMPLETE
    desk.box.move(1, State.COMPLETE)
    assert [desk.decide(shipment).state for shipment in (1, 2)] == [State.READY, State.READY]


@pytest.mark.parametrize("state", [State.HELD, State.REJECTED])
def test_a_supplement_waits_for_its_session(folder: Path, state: State) -> None:
    desk = Desk(folder, route())
    base_and_supplement(desk)
    desk.box.move(1, state)
    assert desk.decide(2).state is State.HELD
    reason = desk.box.ledger.value("SELECT reason FROM shipment WHERE id = 2")
    assert reason == f"belongs to shipment 1, which is {state}"
    desk.box.move(1, State.HELD)
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", project="P9")
    assert desk.box.state(2) == State.COMPLETE  # woken with it
    assert [desk.decide(shipment).state for shipment in (1, 2)] == [State.READY, State.READY]
    assert desk.labels(2)[0] == "P9"


@pytest.mark.parametrize("state", [State.READY, State.DELIVERED, State.PURGED])
def test_a_supplement_follows_a_session_that_is_gone(folder: Path, state: State) -> None:
    desk = Desk(folder, route())
    base_and_supplement(desk)
    desk.box.move(1, state)
    assert desk.decide(2).state is State.READY


def test_other_receivers_sessions_are_no_bases(folder: Path) -> None:
    desk = Desk(folder, route())
    desk.receive(Image(sop="1.1"))
    assert desk.receive(Image(sop="1.2", comments="Project:P7 Subject:S7 Session:E7"), receiver="TWO") == 2
    desk.decide(2)
    assert desk.labels(2)[0] == "P7"


def test_a_decision_that_is_made_twice_gives_the_same_deliveries(folder: Path) -> None:
    desk = Desk(folder, route())
    desk.receive(Image())
    for _ in range(2):
        desk.box.move(1, State.COMPLETE)
        assert desk.decide(1).state is State.READY
    assert desk.deliveries() == ["central"]


def test_what_a_person_decided_meanwhile_stands(folder: Path) -> None:
    """A decision takes a while, and stands at the end of a list of others; rejected meanwhile, it was shipped."""
    desk = Desk(folder, route())
    desk.receive(Image())
    old = decide(desk.box.config, desk.box.ledger, desk.box.spool, 1)
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", project="P9")
    assert not apply(desk.box.ledger, 1, old) and desk.labels()[0] == "P9"
    old = decide(desk.box.config, desk.box.ledger, desk.box.spool, 1)
    review.reject(desk.box.ledger, 1, "tester", "no consent")
    late = decide(desk.box.config, desk.box.ledger, desk.box.spool, 1)
    assert not apply(desk.box.ledger, 1, old) and not apply(desk.box.ledger, 1, late)
    assert desk.box.state() == State.REJECTED and desk.deliveries() == []


def test_a_supplement_has_the_accession_number_of_its_session(folder: Path) -> None:
    desk = Desk(folder, route())
    desk.receive(Image(sop="1.1"))
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", accession="A1")
    desk.decide(1)
    assert desk.receive(Image(sop="1.2")) == 2
    desk.decide(2)
    assert desk.box.ledger.value("SELECT accession FROM shipment WHERE id = 2") == "A1"
    review.assign(desk.box.config, desk.box.ledger, 1, "tester", accession="A2")
    for shipment in (1, 2):
        desk.decide(shipment)
    assert [row[0] for row in desk.box.ledger.all("SELECT accession FROM shipment ORDER BY id")] == ["A2", "A2"]
    review.assign(desk.box.config, desk.box.ledger, 2, "tester", accession="A3")
    desk.decide(2)
    assert desk.box.ledger.value("SELECT accession FROM shipment WHERE id = 2") == "A3"


def test_there_is_nothing_to_decide_about_a_shipment_that_does_not_exist(folder: Path) -> None:
    desk = Desk(folder, route())
    with pytest.raises(KeyError):
        decide(desk.box.config, desk.box.ledger, desk.box.spool, 99)
