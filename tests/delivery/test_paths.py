"""The whole path, and every way that a session can take: what is said of it, where it arrives, what is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from relay_agent import review
from relay_agent.ledger import State, Stop
from tests import data
from tests.delivery.box import (
    SOON,
    Box,
    Pair,
    archived_files,
    arrived_exactly,
    certificates,
    data_sets,
    digests,
    everything,
    requests_for,
    sent_bytes,
    site,
    staff,
    table,
    to,
)
from tests.harness import Agent, running, send, wait_for


def named(label: str, **settings: Any) -> list[Dataset]:
    """A small study whose comments give it this subject, and a session named after it."""
    return list(data.study(1, 3, comments=f"Project:P1 Subject:{label} Session:{label}_MR1", **settings))


def test_from_the_scanner_to_the_receipt_and_the_purge(tmp_path: Path) -> None:
    """C-STORE in, HTTPS out, as processes: every digest on the way is that of what was sent, and files go last."""
    ca, certificate, key = certificates(tmp_path)
    with site(tmp_path / "central", tls=(certificate, key)) as central:
        settings = to(central.url, tmp_path / "box", ca_bundle=str(ca)) + everything() + '[purge]\nretention = "3 s"\n'
        images = list(data.study(3, 20))
        with running(Agent(tmp_path / "box", settings, stage=SOON)) as box:
            assert send(box.port, images) == [0] * len(images)
            box.wait_state("delivered", len(images))
            spool = [path for path in box.config.spool.rglob("*") if path.is_file()]
            assert data_sets(spool) == digests(images), "files went before their retention was over"
            arrived_exactly(central, images)
            [receipt] = box.json("receipt", "1")
            by_sop = {str(image.SOPInstanceUID): image for image in images}
            on_disk = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path
                       for path in archived_files(central)}
            assert {i["sop_instance"] for i in receipt["instances"]} == by_sop.keys() == on_disk.keys()
            for entry in receipt["instances"]:
                image, stored = by_sop[entry["sop_instance"]], on_disk[entry["sop_instance"]].read_bytes()
                assert entry["received_data_set_sha256"] == hashlib.sha256(sent_bytes(image)).hexdigest()
                assert entry["sent_sha256"] == hashlib.sha256(stored).hexdigest()
                assert entry["sent_md5"] == hashlib.md5(stored, usedforsecurity=False).hexdigest()
                assert (entry["sent_size"], entry["server_size"]) == (len(stored), len(stored))
                assert entry["proved_by"] == "md5"
                assert (entry["received_from"], entry["series"]) == ("SCANNER", image.SeriesInstanceUID)
            assert (receipt["project"], receipt["subject"], receipt["session"]) == ("P1", "S1", "S1_MR1")
            box.wait_state("purged", len(images))
            wait_for(lambda: not [path for path in box.config.spool.rglob("*") if path.is_file()], say="files are gone")
            assert box.json("receipt", "1") == [receipt]
            assert "1 receipts, none removed or edited" in box.cli("receipt", "--verify").stdout
            balance = box.json("status")["balance"]
            assert (balance["received"], balance["delivered"], balance["difference"]) == (60, 60, 0)
            # The scanner sends it all again: acknowledged, counted, and not kept again, as its arrival was proved.
            assert send(box.port, images) == [0] * len(images)
            wait_for(lambda: box.status()["repeated"] == 60, say="the repetition is counted")
            wait_for(lambda: not [path for path in box.config.spool.rglob("*") if path.is_file()],
                     say="what was purged does not come to stay")
            assert len(requests_for(central)) == 3, "it was sent to the central site again"


# Waiting in the prearchive


def test_a_session_that_waits_is_delivered_when_staff_archives_it(pair: Pair) -> None:
    """AA:false: arrived is not delivered; the files stay until somebody at the central site has archived it."""
    box, central = pair()
    images = list(data.study(2, 3, comments="Project:P1 Subject:S1 Session:S1_MR1 AA:false"))
    box.take(images)
    row = box.wait(Stop.ARRIVED)
    assert "waits to be archived" in row["error"]
    assert row["due"] > row["changed"] + 60, "it is looked at now and then, not all the time"
    box.all_here(images)
    [waiting] = central.prearchive_rows()
    assert (waiting["status"], waiting["name"], waiting["subject"]) == ("READY", "S1_MR1", "S1")
    box.retry()  # looked at too early: nothing has changed and nothing is sent
    box.wait(Stop.WAITING)
    box.wait(Stop.ARRIVED)
    assert staff(central, "POST", "/data/services/archive", src=waiting["url"]) == 200
    box.retry()
    box.wait(Stop.VERIFIED)
    assert len(requests_for(central)) == 2
    arrived_exactly(central, images)
    assert box.proved()["location"].startswith("/data/experiments/")


def test_a_session_that_staff_deletes_is_not_sent_again_unasked(pair: Pair) -> None:
    """Deleting it in the prearchive was a decision: delivery stops with words, and only a person sends it again."""
    box, central = pair(destination={"archive": False})
    images = list(data.study(1, 3))
    box.take(images)
    box.wait(Stop.ARRIVED)
    [waiting] = central.prearchive_rows()
    assert staff(central, "DELETE", f"/data{waiting['url']}") == 200
    box.retry()
    row = box.wait(Stop.STOPPED)
    assert "is gone from there" in row["error"]
    assert len(requests_for(central)) == 1
    box.all_here(images)
    box.retry()
    box.wait(Stop.ARRIVED)
    assert len(requests_for(central)) == 2
    assert len(central.prearchive_instances("P1")) == 3


@pytest.mark.parametrize("rewriting", [False, True])
def test_the_prearchive_may_be_the_end_of_the_way(pair: Pair, rewriting: bool) -> None:
    """With accept_prearchive it is delivered when it lies there, proved by digest or past a site script by fetching."""
    box, central = pair(destination={"archive": False, "accept_prearchive": True}, site_anon=rewriting)
    images = list(data.study(2, 3))
    box.take(images)
    box.wait(Stop.VERIFIED)
    receipt = box.proved()
    assert receipt["location"].startswith("/data/prearchive/projects/P1/")
    assert {i["proved_by"] for i in receipt["instances"]} == {"content" if rewriting else "md5"}
    assert central.prearchive_instances("P1").keys() == {str(image.SOPInstanceUID) for image in images}
    assert archived_files(central) == []


# What comes later


def test_a_late_series_joins_its_session(pair: Pair) -> None:
    """What arrives after delivery becomes a supplement and is merged into the same archived session."""
    box, central = pair()
    study = generate_uid()
    early, late = list(data.study(1, 3, study=study)), list(data.study(1, 2, study=study))
    box.take(early)
    box.wait(Stop.VERIFIED)
    box.take(late)
    box.wait(Stop.VERIFIED, shipment=2)
    arrived_exactly(central, early + late)
    assert box.proved(2)["supplement"] == 1
    assert box.proved(1)["location"] == box.proved(2)["location"]


@pytest.mark.parametrize("central_site", [{}, {"checksums": False}, {"site_anon": True}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (32, 32)], ids=["same size", "other size"])
def test_the_newer_of_two_versions_stays(pair: Pair, central_site: dict[str, Any], size: tuple[int, int]) -> None:
    """The same SOP Instance UID with other bytes: the later one ends up in the archive, also where digests cannot tell.

    Both are kept here, and the conflict is shown.
    """
    box, central = pair(**central_site)
    study, series = generate_uid(), generate_uid()
    first = [data.instance(study=study, series=series, number=number) for number in (1, 2, 3)]
    second = data.instance(study=study, series=series, sop=first[1].SOPInstanceUID, number=2, size=size)
    second.PixelData = bytes(reversed(second.PixelData))
    box.take(first)
    box.wait(Stop.VERIFIED)
    box.take([second])
    box.wait(Stop.VERIFIED, shipment=2)
    box.kept([*first, second])
    pixels = {str(image.SOPInstanceUID): image.PixelData for image in map(dcmread, archived_files(central))}
    assert pixels == {str(image.SOPInstanceUID): image.PixelData for image in (first[0], second, first[2])}
    assert len(archived_files(central)) == 3
    assert central.prearchive_rows() == []
    assert box.status()["conflicts"] == 1
    box.proved(2)
    if not central_site:
        arrived_exactly(central, [first[0], second, first[2]])


def test_two_versions_before_delivery_arrive_in_their_order(pair: Pair) -> None:
    """A supplement never overtakes its session, though that was put off and it was not."""
    box, central = pair(destination={"retry_first": "1 min", "retry_longest": "1 min"})
    central.misbehave("busy-503")
    study, series = generate_uid(), generate_uid()
    first = data.instance(study=study, series=series)
    second = data.instance(study=study, series=series, sop=first.SOPInstanceUID, StudyDescription="CORRECTED")
    box.take([first])
    box.wait_words("answered 503")
    central.behave()
    box.take([second])
    box.wait_shipment(State.READY, 2)
    time.sleep(2.5)
    assert requests_for(central) == []
    box.retry(1)
    box.wait(Stop.VERIFIED, shipment=2)
    assert box.delivery(1)["state"] == Stop.VERIFIED
    arrived_exactly(central, [second])


# Labels that are taken


def test_a_label_of_another_study_stops_and_can_be_changed(pair: Pair) -> None:
    """Two patients with one label must not become one session: it stops, and `assign` gives other labels."""
    box, central = pair()
    one, two = list(data.study(1, 2)), list(data.study(1, 2))
    box.take(one)
    box.wait(Stop.VERIFIED)
    box.take(two)
    row = box.wait(Stop.STOPPED, shipment=2)
    assert "another study under this project, subject and session label" in row["error"]
    assert len(requests_for(central)) == 1, "it was sent into somebody else's session"
    done = box.cli("assign", "2", "--session", "S1_MR2")
    assert done.returncode == 0, done.stderr
    box.wait(Stop.VERIFIED, shipment=2)
    arrived_exactly(central, one, "S1_MR1")
    arrived_exactly(central, two, "S1_MR2")
    refused = box.cli("assign", "2", "--session", "S1_MR3")
    assert refused.returncode == 1
    assert "shipment 2 is delivered" in refused.stderr


def test_a_label_of_another_subject_stops_and_can_be_changed(pair: Pair) -> None:
    """XNAT sees this clash only when it archives; the words lead to its log, the old row is staff's to delete."""
    box, central = pair()
    one, two = named("S1"), list(data.study(1, 2, comments="Project:P1 Subject:S2 Session:S1_MR1"))
    box.take(one)
    box.wait(Stop.VERIFIED)
    box.take(two)
    assert "settle the conflict there" in box.wait(Stop.STOPPED, shipment=2)["error"]
    arrived_exactly(central, one)
    assert box.cli("assign", "2", "--session", "S2_MR1").returncode == 0
    box.wait(Stop.VERIFIED, shipment=2)
    [left] = central.prearchive_rows()
    assert (left["name"], left["status"]) == ("S1_MR1", "CONFLICT")
    assert staff(central, "DELETE", f"/data{left['url']}") == 200
    arrived_exactly(central, one)
    arrived_exactly(central, two, "S2_MR1")


def test_labels_changed_in_the_prearchive_state_are_not_archived_under_the_old_ones(pair: Pair) -> None:
    """Sent, not yet committed, and then assigned to somebody else: what lies there under the old labels stays there."""
    box, central = pair()
    central.misbehave("busy-502", path=r"/data/prearchive/projects/P1/.*/S1_MR1$", method="POST")
    images = list(data.study(1, 3))
    box.take(images)
    box.wait_words("answered 502")
    review.assign(box.config, box.ledger, 1, "operator", subject="S7", session="S7_MR1")
    central.behave()
    box.wait(Stop.VERIFIED)
    assert archived_files(central, "S1_MR1") == []
    assert data_sets(archived_files(central, "S7_MR1")) == digests(images)
    assert [row["name"] for row in central.prearchive_rows()] == ["S1_MR1"]
    assert box.proved()["subject"] == "S7"


def test_what_has_arrived_somewhere_keeps_its_labels(pair: Pair) -> None:
    """A session that waits in the prearchive under its labels cannot be renamed from here; the words say where."""
    box, _ = pair(destination={"archive": False})
    box.take(named("S1"))
    box.wait(Stop.ARRIVED)
    refused = box.cli("assign", "1", "--subject", "S2")
    assert refused.returncode == 1
    assert "have them changed there" in refused.stderr


# Several destinations


def test_a_destination_that_is_down_holds_up_no_other(tmp_path: Path) -> None:
    """Each destination proceeds on its own; files stay until the last one has proved its arrival."""
    with site(tmp_path / "one") as one, site(tmp_path / "two") as two:
        two.misbehave("busy-503")
        settings = (to(one.url, tmp_path / "box", name="one") + to(two.url, tmp_path / "box", name="two")
                    + everything("one", "two") + '[purge]\nretention = "0 s"\n')
        images = list(data.study(2, 3))
        with Box(tmp_path / "box", settings).working() as box:
            box.take(images)
            box.wait(Stop.VERIFIED, destination="one")
            row = box.wait_words("answered 503", destination="two", attempts=3)
            assert row["shipment_state"] == State.READY
            arrived_exactly(one, images)
            box.all_here(images)
            assert box.proved(destination="one")["destination"] == "one"
            assert [d["verified"] for d in box.status()["destinations"]] == [1, 0]
            two.behave()
            box.wait(Stop.VERIFIED, destination="two")
            arrived_exactly(two, images)
            box.wait_shipment(State.PURGED)
            assert [path for path in box.config.spool.rglob("*") if path.is_file()] == []
            assert len(requests_for(one)) == 2
            box.balances()


# Routes


def test_routes_take_what_their_conditions_say(tmp_path: Path) -> None:
    """Receiver, calling AE title, modality, serial number, tags and project each decide; the first that holds wins."""
    destination = {"destinations": ["central"]}
    routes = "".join((
        table("route", name="by-receiver", receiver=["SECOND"], assign_project="RECEIVER", **destination),
        table("route", name="by-caller", calling_ae=["MR2"], assign_project="CALLER", **destination),
        table("route", name="by-modality", modality=["CT"], assign_project="MODALITY", **destination),
        table("route", name="by-serial", scanner_serial=["999"], assign_project="SERIAL", **destination),
        table("route", name="by-tag", tags={"0008,1030": "PHANTOM.*", "0008,1090": "X[0-9]"}, assign_project="TAG",
              **destination),
        table("route", name="by-project", project=["P2"], **destination)))
    receivers = "".join(table("receiver", ae_title=title, address="127.0.0.1", port=0, allow=["*"])
                        for title in ("RELAY", "SECOND"))
    phantom = {"StudyDescription": "PHANTOM DAILY", "ManufacturerModelName": "X1"}
    sessions: list[tuple[str | None, list[Dataset], dict[str, str]]] = [
        ("RECEIVER", named("A1"), {"called": "SECOND"}),
        ("CALLER", named("A2"), {"calling": "MR2"}),
        ("MODALITY", named("A3", modality="CT"), {}),
        ("SERIAL", named("A4", DeviceSerialNumber="999"), {}),
        ("TAG", named("A5", **phantom), {}),
        ("P2", list(data.study(1, 2, comments="Project:P2 Subject:A6 Session:A6_MR1")), {}),
        (None, named("A7", **{**phantom, "ManufacturerModelName": "X12"}), {}),  # a part of a tag is not the whole
        ("CALLER", named("A8", modality="CT"), {"calling": "MR2"}),
        ("MODALITY", named("A9"), {}),
    ]
    # One series of several is enough for a condition.
    study = sessions[-1][1][0].StudyInstanceUID
    sessions[-1][1].extend(data.study(1, 1, study=study, modality="CT",
                                      comments="Project:P1 Subject:A9 Session:A9_MR1"))
    projects = ["P1", "P2", "RECEIVER", "CALLER", "MODALITY", "SERIAL", "TAG"]
    with site(tmp_path / "central", projects=projects) as central:
        settings = to(central.url, tmp_path / "box") + routes
        with running(Box(tmp_path / "box", settings, receivers=receivers), "receive") as box, box.working():
            for _, images, to_whom in sessions:
                ports = box.ports[to_whom.get("called", "RELAY")]
                assert set(send(ports, images, **to_whom)) == {0}
            sent = sum(len(images) for project, images, _ in sessions if project)
            wait_for(lambda: box.balances().delivered == sent, say="everything with a route is delivered")
            for number, (project, images, _) in enumerate(sessions, 1):
                if project:
                    arrived_exactly(central, images, f"A{number}_MR1", project)
            [held] = box.json("list", "--state", "held")
            assert held["session"] == "A7_MR1"
            assert held["reason"] == "no route takes it; assign it by hand or add a route"
            assert box.balances().held == 3


def test_what_no_route_takes_waits_for_a_person(pair: Pair) -> None:
    """Held, shown, assigned by hand with a route and labels, delivered; a late series follows its session there."""
    box, central = pair(route={"calling_ae": ["NOBODY"]})
    study = generate_uid()
    images = list(data.study(1, 2, study=study))
    box.take(images)
    box.wait_shipment(State.HELD)
    late = list(data.study(1, 2, study=study))
    box.take(late)
    held = box.wait_shipment(State.HELD, 2)
    assert held["reason"] == "belongs to shipment 1, which is held"
    assert box.balances().held == 4
    assert "no route takes it" in box.cli("list", "--state", "held").stdout
    assert requests_for(central) == []
    done = box.cli("assign", "1", "--route", "all", "--project", "P2", "--subject", "X", "--session", "X_1")
    assert done.returncode == 0, done.stderr
    box.wait(Stop.VERIFIED)
    box.wait(Stop.VERIFIED, shipment=2)
    arrived_exactly(central, images + late, "X_1", "P2")
    history = [line["what"] for line in box.json("show", "1")["history"]]
    assert any(line.startswith("complete: assigned project, subject, session, route") for line in history)


def test_review_holds_until_a_person_releases(pair: Pair) -> None:
    """Nothing leaves the box before `release`; afterwards everything does."""
    box, central = pair(route={"review": True})
    images = list(data.study(1, 3))
    box.take(images)
    box.wait_shipment(State.REVIEW)
    assert len(central.requests) == 0
    box.all_here(images)
    assert box.cli("release", "1").returncode == 0
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)


def test_scripts_that_cannot_run_hold_for_ever(pair: Pair) -> None:
    """A route that asks for de-identification ships nothing without it, whatever an operator tries but the route."""
    box, central = pair(route={"scripts": ["/etc/site.das"]})
    images = list(data.study(1, 3))
    box.take(images)
    row = box.wait_shipment(State.HELD)
    assert "/etc/site.das cannot be read" in row["reason"]
    for command in (["retry", "1"], ["assign", "1", "--route", "all"], ["release", "1"]):
        box.cli(*command)
        box.wait_shipment(State.HELD)
    assert len(central.requests) == 0
    box.all_here(images)


def test_reject_and_take_it_back(pair: Pair) -> None:
    """Rejected: not sent, kept, counted as such with its reason; `retry` takes the decision back."""
    box, central = pair(route={"review": True})
    images = list(data.study(1, 3))
    box.take(images)
    box.wait_shipment(State.REVIEW)
    assert box.cli("reject", "1", "--reason", "a phantom").returncode == 0
    row = box.wait_shipment(State.REJECTED)
    assert row["reason"] == "a phantom"
    assert box.balances().rejected == 3
    box.all_here(images)
    assert box.cli("retry", "1").returncode == 0
    box.wait_shipment(State.REVIEW)
    assert box.cli("release", "1").returncode == 0
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)
    refused = box.cli("reject", "1", "--reason", "too late")
    assert refused.returncode == 1
    assert "is delivered" in refused.stderr


def test_reject_of_what_fails_to_be_delivered(pair: Pair) -> None:
    """A shipment on its way can be rejected, unless it was proved somewhere already."""
    box, central = pair()
    central.misbehave("busy-500")
    images = list(data.study(1, 3))
    box.take(images)
    box.wait_words("answered 500")
    review.reject(box.ledger, 1, "operator", "wrong patient")
    central.behave()
    box.worker.step()
    assert requests_for(central) == []
    assert box.balances().rejected == 3
    box.all_here(images)


# Proof where digests prove nothing


def without_pixels(number: int, study: str, series: str) -> Dataset:
    """Raw data: what it is lies in a bulk value, not in pixels."""
    image = data.instance(study=study, series=series, number=number, sop_class="1.2.840.10008.5.1.4.1.1.66",
                          modality="MR")
    del image.PixelData
    image.add_new(0x00291010, "OB", bytes(range(200)) * number)
    return image


@pytest.mark.parametrize("verify", ["whole", "sample"])
@pytest.mark.parametrize("central_site", [{"site_anon": True}, {"checksums": False}], ids=str)
def test_arrival_is_proved_by_content(pair: Pair, central_site: dict[str, Any], verify: str) -> None:
    """A script that rewrites headers, or a site without checksums: the MD5 says nothing, so content is fetched."""
    box, central = pair(destination={"verify": verify}, **central_site)
    study, series = generate_uid(), generate_uid()
    images: Sequence[Dataset] = [*data.study(2, 4, study=study),
                                 *(without_pixels(number, study, series) for number in (1, 2))]
    for image in images[-2:]:
        image.SeriesNumber = 9
    box.take(images)
    box.wait(Stop.VERIFIED)
    ways = [i["proved_by"] for i in box.proved()["instances"]]
    assert sorted(ways) == (["content"] * 10 if verify == "whole" else ["content"] * 3 + ["listed"] * 7)
    fetched = [r for r in central.requests if r["method"] == "GET" and ("format" not in r["query"]
                                                                        or r["query"]["format"] == "zip")
               and "/files" in r["path"]]
    assert len(fetched) == 3, "a sample is one file of each series, the whole one zip of each scan"
    assert all(("zip" in r["query"].get("format", "")) == (verify == "whole") for r in fetched)
    assert len(archived_files(central)) == len(images)
    if "checksums" in central_site:
        arrived_exactly(central, images)
    else:
        headers = [dcmread(path, stop_before_pixels=True) for path in archived_files(central)]
        assert {str(header.PatientName) for header in headers} == {"S1"}, "the site's script did not run"


def test_prevent_anon_keeps_the_site_script_away(pair: Pair) -> None:
    """Where the central site agrees, headers arrive as they left, and the digest proves it."""
    box, central = pair(destination={"prevent_anon": True}, site_anon=True)
    images = list(data.study(1, 3))
    box.take(images)
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)
    assert {i["proved_by"] for i in box.proved()["instances"]} == {"md5"}


def test_a_receipt_that_is_edited_or_removed_shows(pair: Pair) -> None:
    """The chain: whoever changes one receipt, or takes one away, is found out by `receipt --verify`."""
    box, _ = pair()
    for label in ("S1", "S2", "S3"):
        box.take(named(label))
    for shipment in (1, 2, 3):
        box.wait(Stop.VERIFIED, shipment)
    assert json.loads(box.cli("receipt", "--verify", "--json").stdout) == {"receipts": 3, "faults": []}
    with box.ledger.write() as connection:
        connection.execute("UPDATE receipt SET body = replace(body, 'S2_MR1', 'S9_MR1') WHERE id = 2")
    edited = box.cli("receipt", "--verify")
    assert (edited.returncode, edited.stdout.strip()) == (1, "receipt 2 was edited")
    with box.ledger.write() as connection:
        connection.execute("DELETE FROM receipt WHERE id = 2")
    removed = box.cli("receipt", "--verify")
    assert removed.returncode == 1
    assert "receipt 2 is missing" in removed.stdout
