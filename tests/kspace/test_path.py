"""Raw data on their way through the box: found complete, matched, scrubbed, held or ready; nothing lost or doubled."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from relay_agent import package, purge, report, review
from relay_agent.config_text import toml
from relay_agent.deidentify.key import box_key
from relay_agent.deidentify.uids import UIDs
from relay_agent.kspace import account, decide, facts, keep, pickup, room
from relay_agent.kspace.twix import Verdict, check
from relay_agent.ledger import Ledger, State, balance
from relay_agent.package import manifest
from relay_agent.preview import summary
from relay_agent.route import Lapsed, require_current
from relay_agent.stage import Stager
from tests.agent.box import Box
from tests.kspace.path import STUDY, RawBox, clock, exam, raw, settings
from tests.kspace.synthetic import (
    ADJUSTMENT,
    FRAME,
    PERSON,
    PLANNED,
    START,
    File,
    Person,
    Scan,
    build,
    parts,
    real_file,
)

OTHER_FRAME = FRAME.replace("20240229101112131", "20240229120000000")
DAY = 86400.0


@pytest.fixture
def box(tmp_path: Path) -> RawBox:
    return RawBox(tmp_path)


def states(box: RawBox) -> list[str]:
    return [row["state"] for row in box.raws()]


def elsewhere(uid: int, start: float, frame: str = OTHER_FRAME, **changes: str) -> bytes:
    """Raw data of another frame of reference, planned on images that nobody has."""
    content = raw(uid, start=start, **changes).replace(FRAME.encode(), frame.encode())
    return content.replace(b"tReferenceImage", b"xReferenceImage")


def sidecar(box: RawBox, shipment: int) -> dict:
    return json.loads(manifest(box.config, box.ledger, shipment).items[1].path.read_text())


def test_raw_before_its_dicom_waits_and_leaves_after_it(box):
    content = raw()
    box.land(content, "20240229/meas_MID00358.dat")
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.WAITING and "may still come" in row["reason"]
    assert not list(box.landing.rglob("*")), "picked up, and the folder with it"
    box.dicom(exam())
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["score"]) == (State.WAITING, 230)
    assert row["reason"] == f"waits until its session, shipment {row['to_shipment']}, is delivered"
    box.delivered(row["to_shipment"])
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["project"], row["subject"], row["session"]) == (State.READY, "P1", "S1", "S1_MR1")
    found = manifest(box.config, box.ledger, row["id"])
    assert (found.kind, found.scan, found.series_uid, found.resource) == ("raw", "2", f"{STUDY}.2", "KSPACE")
    made, beside = found.items
    package.require_intact(found.items)
    assert made.sop_instance == f"MID00358_{row['study_uid'][:12]}.dat" and beside.sop_instance.endswith(".json")
    result = made.path.read_bytes()
    assert len(result) == len(content)
    assert [value for value in PERSON.planted() if value.lower() in result.lower()] == []
    for begin, end in parts(File(scans=(Scan(seed=358),))):
        assert result[begin:end] == content[begin:end], "k-space is bit-identical"
    new = UIDs(box_key(box.config, box.ledger), "P1")
    assert new.new(FRAME).encode() in result and new.new(PLANNED[0]).encode() in result
    told = sidecar(box, row["id"])
    assert told["original"]["sha256"] == row["study_uid"] and told["sha256"] == made.sha256
    assert (told["verdict"], told["protocol"], told["version"]) == ("complete", "t1_mprage", "VE11")
    assert told["match"]["series"] == [{"number": "2", "uid": f"{STUDY}.2"}]
    assert told["searched_for_identifiers_of_the_session"]
    text = beside.path.read_bytes().lower()
    assert [value for value in PERSON.planted() if value.lower() in text] == []


@pytest.mark.parametrize("order", [order for order in permutations(("raw", "second", "dicom", "late", "delivered"))
                                   if order.index("dicom") < order.index("delivered")][::7])
def test_in_whatever_order_they_come(box, order):
    """Two raw files, the session, an instance that comes late, and the session's delivery."""
    images = exam(protocols=("localizer", "t1_mprage", "t2_tse"))
    events = {"raw": lambda: box.land(raw(), "a.dat"),
              "second": lambda: box.land(raw(359, start=START + 1, protocol="t2_tse"), "b.dat"),
              "dicom": lambda: box.dicom(images[:-1]), "late": lambda: box.dicom(images[-1:]),
              "delivered": lambda: deliver_all(box)}
    for event in order:
        events[event]()
        box.work(3)
        rows = box.ledger.all("SELECT state FROM shipment WHERE kind = 'session'")
        if any(row["state"] != State.DELIVERED for row in rows):
            assert State.READY not in states(box) or "late" in order[:order.index(event) + 1]
    deliver_all(box)
    box.work()
    assert {(row["state"], row["session"], row["series_uid"]) for row in box.raws()} == {
        (State.READY, "S1_MR1", f"{STUDY}.2"), (State.READY, "S1_MR1", f"{STUDY}.3")}


@pytest.mark.parametrize("name", ["gre.dat", "epi.dat"])
def test_files_of_a_real_scanner(box, name):
    path = real_file(name)
    content = path.read_bytes()
    said = facts.raw(path, check(path))
    images = exam(frame=next(iter(said.frames)), protocols=("localizer", said.protocol))
    for image in images:
        image.DeviceSerialNumber = said.serial
        if image.SeriesNumber == 2:
            image.AcquisitionTime = clock(said.start + 0.2)
    box.dicom(images)
    box.delivered(1)
    box.land(content)
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["score"], row["series_uid"]) == (State.READY, 150, f"{STUDY}.2"), row["reason"]
    made = manifest(box.config, box.ledger, row["id"]).items[0].path.read_bytes()
    assert len(made) == len(content) and said.serial.encode() in content
    assert f'"{said.serial}"'.encode() not in made and next(iter(said.frames)).encode() not in made


def deliver_all(box: RawBox) -> None:
    for row in box.ledger.all("SELECT id FROM shipment WHERE kind = 'session' AND state = 'ready'"):
        box.delivered(row["id"])


def test_raw_days_after_its_dicom_was_purged(box):
    box.dicom(exam())
    box.delivered(1)
    assert purge.purge(box.ledger, box.spool, box.config.deidentified, 0.0, time.time() + DAY) == 1
    assert not [path for path in box.config.spool.rglob("*.dcm")]
    box.land(raw())
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["score"], row["series_uid"]) == (State.READY, 230, f"{STUDY}.2")
    assert not sidecar(box, row["id"])["searched_for_identifiers_of_the_session"], "its originals are gone, and said so"


def test_the_ledger_holds_nothing_that_identifies(box):
    box.land(raw(), f"{PERSON.name}#{PERSON.id}.dat")
    box.dicom(exam())
    box.delivered(1)
    box.work()
    assert states(box) == [State.READY]
    held = "\n".join(str(value) for (table,) in box.ledger.all("SELECT name FROM sqlite_master WHERE type = 'table'")
                     for row in box.ledger.all(f"SELECT * FROM {table}") for value in row)
    for value in (PERSON.name, *PERSON.name.split("^"), PERSON.id, PERSON.birth, PERSON.institution, PERSON.weight):
        assert value not in held


def test_several_sessions_and_several_files_each_to_its_own(box):
    for number, start in ((358, START), (359, START + 400)):
        box.land(raw(number, start=start), f"{number}.dat")
    box.land(elsewhere(401, START + 7200), "401.dat")
    images = exam()
    late = [image for image in exam(protocols=("localizer", "t1_mprage", "t1_mprage"))
            if image.SeriesNumber == 3]
    for image in late:
        image.AcquisitionTime = "102140.5"
    box.dicom([*images, *late])
    box.dicom(exam("1.2.826.0.1.3680043.8.498.2", OTHER_FRAME, offset=7200, session="S1_MR2"))
    box.work()
    first, second = box.ledger.all("SELECT id FROM shipment WHERE kind = 'session' ORDER BY id")
    assert {(row["to_shipment"], row["series_uid"]) for row in box.raws()} == {
        (first["id"], f"{STUDY}.2"), (first["id"], f"{STUDY}.3"), (second["id"], "1.2.826.0.1.3680043.8.498.2.2")}


def test_a_patient_registered_anew_has_two_frames_of_reference_in_one_session(box):
    again = exam(frame=OTHER_FRAME, protocols=("localizer", "localizer", "t1_mprage", "t1_mprage"), offset=3600)
    box.dicom([*exam(), *(image for image in again if image.SeriesNumber == 4)])
    box.land(raw(358), "1.dat")
    box.land(elsewhere(360, START + 3600), "2.dat")
    box.work()
    assert sorted((row["to_shipment"], row["series_uid"], row["score"]) for row in box.raws()) == [
        (1, f"{STUDY}.2", 230), (1, f"{STUDY}.4", 170)]


def test_one_exam_in_two_studies_with_the_same_labels_is_one_session(box):
    box.dicom(exam(protocols=("localizer",)))
    box.dicom([image for image in exam("1.2.826.0.1.3680043.8.498.9") if image.SeriesNumber == 2])
    box.land(raw())
    box.work()
    (row,) = box.raws()
    assert (row["to_shipment"], row["series_uid"]) == (1, "1.2.826.0.1.3680043.8.498.9.2")
    assert row["reason"] == "waits until its session, shipment 1, is delivered"
    box.delivered(1)
    box.work()
    assert "with shipment 2" in box.raws()[0]["reason"], "all of the session is delivered before its raw data"
    box.delivered(2)
    box.work()
    assert states(box) == [State.READY]


def test_what_is_still_written_is_left_alone(box):
    path = box.land(raw()[:9000])
    with path.open("ab") as writer:
        box.work()
        assert path.exists() and not box.raws(), "open for writing"
        writer.write(raw()[9000:15_000])
    box.work()
    assert path.exists() and not box.raws(), "not whole, and changed within the hour"
    lock = path.with_name("meas.dat.lock")
    lock.touch()
    with path.open("ab") as writer:
        writer.write(raw()[15_000:])
    box.work()
    assert path.exists() and not box.raws(), "its sender says that it is not done"
    assert box.raw.trouble == ""
    os.utime(lock, (time.time() - 2 * DAY,) * 2)
    box.work()
    assert "older than a day" in box.raw.trouble
    lock.unlink()
    box.work()
    assert [row["verdict"] for row in box.raws()] == [Verdict.COMPLETE]
    assert box.raw.trouble == ""


def test_names_that_are_not_raw_data_stay_and_are_told(box):
    strange, hidden = box.land(b"notes", "notes.txt"), box.land(b"partial", ".meas.dat")
    box.work()
    assert strange.exists() and hidden.exists() and not box.raws()
    assert "1 × its name is none of raw data" in box.raw.trouble
    (found,) = report.status(box.config, box.ledger)["kspace"]["sources"]
    assert (found["in_landing"], found["not_raw_by_name"]) == (0, 1)


@pytest.mark.parametrize("cut", [11_000, 15_000, 21_000])
def test_an_incomplete_file_is_shown_and_set_aside_when_the_whole_one_comes(box, cut):
    path = box.land(raw()[:cut], "meas.dat")
    os.utime(path, (time.time() - 7200,) * 2)
    box.dicom(exam())
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["verdict"]) == (State.HELD, Verdict.INCOMPLETE)
    assert "not whole" in row["reason"] and "fetched or exported again" in row["reason"]
    assert [name for name, _, _ in account.conditions(box.config, box.ledger, time.time())] == ["raw incomplete"]
    with pytest.raises(review.Refused, match="not whole"):
        review.assign_raw(box.ledger, row["id"], "jane", 1)
    box.land(raw(), "meas.dat")
    box.work()
    old, new = box.raws()
    assert (old["state"], old["reason"]) == (State.REJECTED, f"shipment {new['id']} is the whole file")
    assert new["verdict"] == Verdict.COMPLETE
    assert not list(account.conditions(box.config, box.ledger, time.time()))


def test_an_aborted_scan_is_kept_and_tagged(box):
    box.dicom(exam())
    box.delivered(1)
    box.land(build(File(scans=(Scan(acqend=False),))))
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["verdict"]) == (State.READY, Verdict.ABORTED)
    assert sidecar(box, row["id"])["verdict"] == "aborted"


def test_the_same_file_again_is_counted_once(box):
    for _ in range(2):
        box.land(raw())
        box.work()
    assert len(box.raws()) == 1
    assert box.ledger.value("SELECT copies FROM instance WHERE receiver = 'prisma'") == 2
    assert balance(box.ledger).received == 1


def test_two_sessions_that_both_may_be_it_are_for_a_person(box):
    anonymous = File(person=Person(name="xxxx", id="xxxxxxxx", birth="xxxxxxxx"))
    content = build(replace(anonymous, scans=(Scan(),))).replace(b"tReferenceImage", b"xReferenceImage")
    box.dicom(exam())
    box.dicom(exam("1.2.826.0.1.3680043.8.498.5", session="S1_MR5"))
    box.land(content)
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.HELD and "shipments 1 (score 150), 2 (score 150)" in row["reason"]
    shown = report.shipment(box.ledger, row["id"])
    assert [(one["shipment"], one["score"]) for one in shown["raw"]["candidates"]] == [(1, 150), (2, 150)]
    with pytest.raises(review.Refused, match="--to"):
        review.assign(box.config, box.ledger, row["id"], "jane", project="P1")
    with pytest.raises(review.Refused, match="no session"):
        review.assign_raw(box.ledger, row["id"], "jane", 99)
    with pytest.raises(review.Refused, match="0 series 7"):
        review.assign_raw(box.ledger, row["id"], "jane", 2, "7")
    review.assign_raw(box.ledger, row["id"], "jane", 2, "2")
    box.delivered(2)
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["session"], row["series_uid"]) == (State.READY, "S1_MR5", "1.2.826.0.1.3680043.8.498.5.2")
    assert sidecar(box, row["id"])["match"]["state"] == "by hand"
    assert any(entry["actor"] == "jane" for entry in report.shipment(box.ledger, row["id"])["history"])


def test_without_a_session_it_is_held_after_the_deadline_and_still_takes_one(tmp_path):
    box = RawBox(tmp_path, settings(kspace='deadline = "1 s"'))
    box.land(raw())
    box.work(2)
    time.sleep(1.1)
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.HELD and row["reason"].startswith("within 1 s no session was found")
    assert [name for name, _, _ in account.conditions(box.config, box.ledger, time.time())] == ["raw unmatched"]
    box.dicom(exam())
    box.delivered(2)
    box.work()
    assert states(box) == [State.READY], "its DICOM came after all"


@pytest.mark.parametrize(("setting", "state"), [('unmatched = "ship"', State.READY), ("", State.HELD)])
def test_the_same_patient_and_scanner_is_not_enough_but_may_do_after_the_deadline(tmp_path, setting, state):
    box = RawBox(tmp_path, settings(kspace='deadline = "2 s"', raw=setting))
    box.dicom(exam(frame=OTHER_FRAME))
    box.delivered(1)
    box.land(raw())
    box.work(2)
    assert states(box) == [State.WAITING] and "no UID tells its session" in box.raws()[0]["reason"]
    time.sleep(2.1)
    box.work()
    (row,) = box.raws()
    assert row["state"] == state
    if state == State.READY:
        found = manifest(box.config, box.ledger, row["id"])
        assert (found.resource, found.scan, found.session) == ("KSPACE_UNMATCHED", "", "S1_MR1")
        assert sidecar(box, row["id"])["match"]["state"] == "ambiguous"


@pytest.mark.parametrize(("kwargs", "content", "state", "words"), [
    ({"raw": 'protocols = ["t2_.*"]'}, raw(), State.REJECTED, "does not want its protocol"),
    ({"raw": 'protocols = ["t2_.*", "t1_.*"]'}, raw(), State.READY, None),
    ({"raw": 'smallest = "1 MB"'}, raw(), State.REJECTED, "smaller than"),
    ({"raw": ""}, raw(protocol="AdjCoilSens"), State.REJECTED, "an adjustment of the scanner"),
    ({"raw": ""}, build(File(scans=(ADJUSTMENT, Scan()))), State.READY, None),
    ({"source": 'receivers = ["RELAY"]'}, raw(), State.READY, None),
    ({}, raw(baseline="N4_VG99A", software="syngo MR G99"), State.HELD, "the software version"),
    ({}, raw(baseline="", software="syngo MR XA61", family="XA"), State.HELD, "the software version XA61 is not known"),
    ({"raw": 'versions = ["XA61"]'}, raw(baseline="", software="syngo MR XA61", family="XA"), State.READY, None),
    ({"raw": "scrub = false"}, raw(), State.READY, None)])
def test_what_a_route_wants(tmp_path, kwargs, content, state, words):
    box = RawBox(tmp_path, settings(**kwargs))
    box.dicom(exam())
    box.delivered(1)
    box.land(content)
    box.work()
    (row,) = box.raws()
    assert row["state"] == state, row["reason"]
    assert words is None or words in row["reason"]
    if "scrub = false" in kwargs.get("raw", ""):
        (item, _) = manifest(box.config, box.ledger, row["id"]).items
        assert item.sha256 == row["study_uid"] and item.path.read_bytes() == content
        assert sidecar(box, row["id"])["scrubbed"] is False


def test_a_route_without_raw_data_rejects_them_and_may_have_them_deleted(tmp_path):
    text = settings(kspace='discard = "1 d"').replace("[route.kspace]\n", "")
    box = RawBox(tmp_path, text)
    box.dicom(exam())
    box.delivered(1)
    box.land(raw())
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.REJECTED and "delivers no raw data" in row["reason"]
    made = box.config.kspace_deidentified
    assert purge.discard(box.ledger, box.spool, made, DAY, time.time() + DAY / 2) == 0
    assert [purge.discard(box.ledger, box.spool, made, DAY, time.time() + 2 * DAY) for _ in range(2)] == [1, 0]
    assert not list(box.config.kspace_spool.rglob("*.dat"))
    assert balance(box.ledger).difference == 0 and balance(box.ledger).rejected == 1


def test_a_person_reviews_and_what_was_approved_is_what_goes(tmp_path):
    box = RawBox(tmp_path, settings(route="review = true"))
    box.dicom(exam())
    review.release(box.ledger, 1, "jane")
    box.decide_sessions()
    box.delivered(1)
    box.land(raw())
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.REVIEW
    shown = summary(box.config, box.ledger, row["id"])
    assert shown["raw"]["report"]["scrubbed"] and not shown["approved"]
    review.release(box.ledger, row["id"], "jane", shown["digest"])
    box.work()
    assert states(box) == [State.READY]
    require_current(box.config, box.ledger, row["id"])
    box.config = box.config.model_copy(update={"route": (box.config.route[0].model_copy(update={
        "kspace": box.config.route[0].kspace.model_copy(update={"keep": ("age",)})}),)})
    with pytest.raises(Lapsed, match="settings for raw data"):
        require_current(box.config, box.ledger, row["id"])


def test_what_dicom_says_of_the_patient_is_searched_in_raw_data_that_the_vendor_anonymised(box):
    anonymous = Person(name="xxxx", id="xxxxxxxx", birth="xxxxxxxx")
    content = build(File(person=anonymous, more={"Phoenix": f'tComment = "{PERSON.name.split("^")[0]} moved"\n'}))
    box.dicom(exam())
    box.delivered(1)
    box.land(content)
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.READY
    made = manifest(box.config, box.ledger, row["id"]).items[0].path.read_bytes()
    assert b"Quellenhofer" in content and b"quellenhofer" not in made.lower() and b"moved" in made


def test_the_clocks_are_learnt_and_then_tell_runs_apart(tmp_path):
    box = RawBox(tmp_path)
    ahead = 600.0
    for number in range(1, 4):
        frame = FRAME.replace("20240229101112131", f"202402291011{number:05}")
        box.dicom(exam(f"{STUDY}{number}", frame, offset=ahead + number, session=f"S{number}"))
        box.land(elsewhere(300 + number, START + number, frame), f"{number}.dat")
    box.work()
    found = keep.clock(box.ledger, PERSON.serial)
    assert found is not None and found.pairs == 3
    assert found.seconds == pytest.approx(ahead, abs=0.1)
    (told,) = report.status(box.config, box.ledger)["kspace"]["clocks"]
    assert told["scanner"] == PERSON.serial and told["offset_seconds"] == pytest.approx(ahead, abs=0.1)
    runs = exam(f"{STUDY}9", OTHER_FRAME, session="S9", protocols=("localizer", "bold", "bold", "bold"))
    for image in runs:
        if image.ProtocolName == "bold":
            image.AcquisitionTime = f"1{image.SeriesNumber}0000.{image.InstanceNumber}"
    box.dicom(runs)
    box.land(elsewhere(900, 13 * 3600 - ahead, protocol="bold"), "run.dat")
    box.work()
    assert box.raws()[-1]["series_uid"] == f"{STUDY}9.3", "without the offset it would be none, or the run before"


@pytest.mark.parametrize("to", [None, "1"])
def test_adjustments_go_to_a_resource_of_their_own(tmp_path, to):
    """They have no series, unless a person says so, and neither name nor size keeps them where they are wanted."""
    box = RawBox(tmp_path, settings(raw='adjustments = true\nprotocols = ["t1_.*"]\nsmallest = "1 MB"'))
    box.dicom(exam())
    box.delivered(1)
    box.land(raw(357, protocol="AdjCoilSens"))
    box.work()
    (row,) = box.raws()
    if to:
        review.assign_raw(box.ledger, row["id"], "jane", 1, to)
        box.work()
    assert (box.raws()[0]["state"], box.raws()[0]["to_shipment"]) == (State.READY, 1)
    found = manifest(box.config, box.ledger, row["id"])
    assert (found.resource, found.scan) == (("KSPACE", "1") if to else ("KSPACE_ADJ", ""))
    assert sidecar(box, row["id"])["protocol"] == "AdjCoilSens"
    shown = report.shipment(box.ledger, row["id"])
    assert shown["raw"]["adjustment"] and shown["raw"]["match"] == ("by hand" if to else "matched")


@pytest.mark.parametrize(("name", "answer"), [("AdjCoilSens", True), ("AdjShim", True), ("Adjuvant_t1", False),
                                              ("t1_AdjCoilSens", False), ("", False)])
def test_what_is_an_adjustment(name, answer):
    assert facts.is_adjustment(name) is answer


def test_other_formats_go_only_where_a_route_says(tmp_path):
    where = 'opaque = ["prisma/(?P<session>[A-Za-z0-9_]+)/P\\\\d+\\\\.7"]'
    box = RawBox(tmp_path, settings(raw=where, source='patterns = ["*.7"]\nopaque = true'))
    box.dicom(exam())
    box.land(b"GE raw data of nobody" * 99, "S1_MR1/P12345.7")
    box.land(b"something else" * 99, "elsewhere.7")
    box.work()
    strange, found = box.raws() if box.raws()[0]["session"] is None else reversed(box.raws())
    assert strange["state"] == State.HELD and "No route's kspace.opaque" in strange["reason"]
    assert (found["state"], found["to_shipment"]) == (State.WAITING, 1)
    box.delivered(1)
    box.work()
    found = box.shipment(found["id"])
    assert found["state"] == State.READY
    sent = manifest(box.config, box.ledger, found["id"])
    assert (sent.resource, sent.scan) == ("KSPACE", "") and sent.items[0].sop_instance.endswith(".7")
    assert sent.items[0].path.read_bytes() == b"GE raw data of nobody" * 99


def test_not_twix_is_kept_and_goes_by_hand_only_where_a_route_takes_it(box):
    box.dicom(exam())
    box.land(b"version https://git-lfs.github.com/spec/v1\n" * 20)
    box.work()
    (row,) = box.raws()
    assert (row["state"], row["verdict"]) == (State.HELD, Verdict.NOT_TWIX) and "not TWIX" in row["reason"]
    review.assign_raw(box.ledger, row["id"], "jane", 1)
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.HELD and "cannot be de-identified" in row["reason"]


def test_the_session_is_rejected(box):
    box.dicom(exam())
    box.land(raw())
    box.work()
    review.reject(box.ledger, 1, "jane", "no consent")
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.HELD and "its session, shipment 1, is rejected" in row["reason"]


def test_what_a_reviewer_takes_out_does_not_go_as_raw_data(tmp_path):
    box = RawBox(tmp_path, settings(route="review = true"))
    box.dicom(exam(protocols=("localizer", "t1_mprage", "t2_tse")))
    apart = review.exclude(box.ledger, 1, [f"{STUDY}.2"], "jane", "wrong person in the scanner")
    box.decide_sessions()
    review.release(box.ledger, 1, "jane")
    box.decide_sessions()
    box.delivered(1)
    box.land(raw(), "a.dat")
    box.work()
    box.land(raw(359, start=START + 1, protocol="t2_tse"), "b.dat")
    box.work()
    first, second = box.raws()
    assert first["state"] == State.HELD and f"its series was set apart as shipment {apart}" in first["reason"]
    assert second["state"] == State.REVIEW
    assert [name for name, _, _ in account.conditions(box.config, box.ledger, time.time())] == ["raw held"]


@pytest.mark.parametrize(("receivers", "state"), [("", State.HELD), ('receivers = ["OTHER"]', State.WAITING)])
def test_a_study_sent_to_two_receivers_is_two_sessions(tmp_path, receivers, state):
    text = settings(source=receivers).replace("[[destination]]", '[[receiver]]\nae_title = "OTHER"\nport = 0\n'
                                              'allow = ["*"]\n[[destination]]')
    box = RawBox(tmp_path, text)
    box.dicom(exam())
    box.dicom(exam(session="S2_MR1"), "OTHER")
    box.land(raw())
    box.work()
    (row,) = box.raws()
    assert row["state"] == state and row["session"] == (None if state == State.HELD else "S2_MR1")


def test_files_go_after_verification_and_retention(box):
    box.dicom(exam())
    box.delivered(1)
    box.land(raw())
    box.work()
    (row,) = box.raws()
    box.delivered(row["id"])
    made = box.config.kspace_deidentified
    assert purge.purge(box.ledger, box.spool, box.config.deidentified, DAY, time.time(), raw=made) == 0
    assert purge.purge(box.ledger, box.spool, box.config.deidentified, DAY, time.time() + 2 * DAY, raw=made) == 2
    assert not [path for path in made.parent.rglob("*") if path.is_file()]
    assert states(box) == [State.PURGED]
    assert balance(box.ledger).delivered == 7


def test_a_crash_between_file_and_row_loses_and_doubles_nothing(box, monkeypatch):
    box.land(raw())
    before = pickup._record
    monkeypatch.setattr(pickup, "_record", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
    with pytest.raises(RuntimeError):
        box.work()
    assert not box.raws() and len(list(box.config.kspace_spool.rglob("*.dat"))) == 1
    monkeypatch.setattr(pickup, "_record", before)
    monkeypatch.setattr(pickup, "_SETTLED", 0.0)
    box.raw._recovered = -1e9
    box.work()
    assert len(box.raws()) == 1 and len(list(box.config.kspace_spool.rglob("*.dat"))) == 1
    assert balance(box.ledger).received == 1
    box.raw._recovered = -1e9
    box.work()
    assert len(box.raws()) == 1


def test_a_file_whose_stored_copy_was_lost_takes_its_place(box):
    box.land(raw())
    box.work()
    (stored,) = box.config.kspace_spool.rglob("*.dat")
    stored.unlink()
    box.land(raw())
    box.work()
    assert stored.exists() and len(box.raws()) == 1


def test_what_was_damaged_in_the_store_does_not_leave(box):
    box.dicom(exam())
    box.land(raw())
    box.work(2)
    (stored,) = box.config.kspace_spool.rglob("*.dat")
    content = bytearray(stored.read_bytes())
    content[-3000] ^= 1
    stored.write_bytes(content)
    with box.ledger.write() as connection:
        connection.execute("UPDATE raw SET path = NULL")
        connection.execute("UPDATE shipment SET state = 'complete' WHERE kind = 'raw'")
    box.work()
    (row,) = box.raws()
    assert row["state"] == State.HELD and "not what was picked up" in row["reason"]
    assert not list(box.config.kspace_deidentified.rglob("*.dat"))


def test_raw_data_leave_room_for_dicom(tmp_path):
    box = RawBox(tmp_path, settings(kspace='quota = "20 kB"'))
    box.dicom(exam())
    box.land(raw())
    box.work()
    assert states(box) == [State.DEIDENTIFY], "picked up, and not copied: there is no room"
    told = {name: text for name, _, text in account.conditions(box.config, box.ledger, time.time())}
    assert list(told) == ["raw space short"]
    assert "0 B are left" in told["raw space short"] and "22 kB a day" in told["raw space short"]
    with pytest.raises(OSError, match="may not take more"):
        path = tmp_path / "hand.dat"
        path.write_bytes(raw(999))
        pickup.upload(path, Path("hand.dat"), box.config.kspace.source[0], box.config, box.ledger)
    assert room.left(box.config) == 0


@pytest.mark.parametrize(("windows", "raw_windows", "hours"), [
    ([], [], 0), ([("18:00", "06:00")], [], 6), ([], [("18:00", "06:00")], 6), ([], [("11:00", "13:00")], 0),
    ([("18:00", "06:00")], [("11:00", "13:00"), ("20:00", "21:00")], 8),
    ([("18:00", "06:00")], [("05:00", "09:00")], 17),
    ([("11:00", "14:00")], [("10:00", "12:00")], 23), ([("13:00", "20:00")], [("19:00", "13:30")], 1)])
def test_the_outlook_counts_the_time_until_raw_data_may_leave(tmp_path, windows, raw_windows, hours):
    """Both kinds of windows have to be open; those of a destination to which no raw data go do not count."""
    now = time.mktime((2026, 3, 2, 12, 0, 0, 0, 0, -1))
    opens, raw_opens = (toml([{"start": start, "end": end} for start, end in one]) for one in (windows, raw_windows))
    text = settings().replace('.org"', f""".org"
windows = {opens}
[destination.kspace]
windows = {raw_opens}
[[destination]]
name = "other"
url = "https://other.example.org"
windows = [{{ start = "11:58", end = "11:59" }}]""")
    box = RawBox(tmp_path, text)
    box.land(raw())
    box.work(2)
    with box.ledger.write() as connection:
        connection.execute("UPDATE instance SET arrived = ?", (now - 3600,))
    found = room.outlook(box.config, box.ledger, now)
    assert (found.daily, found.window, found.expected) == (22_016, hours * 3600, int(22_016 * (1 + hours / 24)))


def test_the_outlook_knows_what_is_purged_in_time_and_what_is_still_on_the_scanner(tmp_path):
    box = RawBox(tmp_path, settings(kspace='quota = "100 kB"') + '[purge]\nretention = "3 d"\n')
    box.dicom(exam())
    box.delivered(1)
    box.land(raw())
    box.work()
    now, (row,) = time.time(), box.raws()
    ahead = room.outlook(box.config, box.ledger, now)
    assert (ahead.daily, ahead.freed, ahead.there, ahead.short) == (22_016, 0, 0, False)
    with box.ledger.write() as connection:
        connection.execute("INSERT INTO listed (source, name, size, changed, first_seen, last_seen, wanted) VALUES "
                           "('prisma', 'a', 100000, ?, ?, ?, 1)", (now,) * 3)
    ahead = room.outlook(box.config, box.ledger, now)
    assert (ahead.expected, ahead.short) == (122_016, True)
    (text,) = (text for name, _, text in account.conditions(box.config, box.ledger, now) if name == "raw space short")
    assert "hold 100 kB that is not fetched and produced 22 kB a day: 122 kB are expected" in text
    box.delivered(row["id"])
    later = now + 2.5 * DAY
    assert room.outlook(box.config, box.ledger, now).freed == 0, "its retention is not over by then"
    assert room.outlook(box.config, box.ledger, later).freed == 22_016
    (text,) = (text for name, _, text in account.conditions(box.config, box.ledger, later) if name == "raw space short")
    assert "and 22 kB will be purged in time" in text


def test_raw_data_on_the_scanner_that_nobody_has_fetched(box):
    now = time.time()
    with box.ledger.write() as connection:
        connection.executemany(
            "INSERT INTO listed (source, name, size, changed, first_seen, last_seen, wanted, fetched) "
            "VALUES ('prisma', ?, ?, ?, ?, ?, ?, ?)",
            [("a", 5_000_000, now - 1.5 * DAY, now, now, 1, None), ("b", 7, now - 3 * DAY, now, now, 1, now),
             ("c", 7, now - 3 * DAY, now, now, 0, None), ("d", 1_000_000, now, now, now, 1, None)])
    (found,) = report.status(box.config, box.ledger)["kspace"]["sources"]
    assert (found["not_fetched"], found["not_fetched_bytes"]) == (2, 6_000_000)
    assert found["oldest_not_fetched_seconds"] == pytest.approx(1.5 * DAY, abs=5)
    assert found["overwritten_in_seconds"] == pytest.approx(0.5 * DAY, abs=5)
    told = {name: text for name, _, text in account.conditions(box.config, box.ledger, now)}
    assert "2 files (6 MB)" in told["raw data at risk"] and "in 12 h" in told["raw data at risk"]


def test_nothing_is_kept_of_dicom_where_there_is_no_raw_data(tmp_path):
    text = settings().partition("[kspace]")[0]
    box = RawBox.__new__(RawBox)
    Box.__init__(box, tmp_path, text)
    box.stager = Stager(box.config, box.ledger, box.spool)
    box.dicom(exam())
    assert box.ledger.value("SELECT count(*) FROM trait") == 0
    assert report.status(box.config, box.ledger)["kspace"] is None


def test_the_verdict_is_that_of_the_check_for_every_cut(tmp_path_factory):
    content, key = raw(), b"k"
    path = tmp_path_factory.mktemp("cut") / "meas.dat"
    for cut in range(1, len(content), 997):
        path.write_bytes(content[:cut])
        found = pickup.inspect(path, False, key)
        assert found.verdict == check(path).verdict != Verdict.COMPLETE or cut > len(content) - 512
        assert found.sha256 == check(path).sha256


def test_decisions_change_nothing_by_themselves(box):
    box.land(raw())
    box.dicom(exam())
    box.work(2)
    before = [tuple(row) for row in box.ledger.all("SELECT * FROM shipment")]
    for row in box.raws():
        decide.decide(box.config, box.ledger, row["id"])
    assert [tuple(row) for row in box.ledger.all("SELECT * FROM shipment")] == before
    assert isinstance(box.ledger, Ledger)
