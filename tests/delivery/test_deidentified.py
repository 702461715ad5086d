"""De-identification and review on the whole path: what leaves, what waits, what is approved, what is found nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset

from relay_agent.ledger import State, Stop
from tests import data
from tests.delivery.box import Box, Pair, archived_files, requests_for
from tests.harness import wait_for

SITE = '''version "6.6"
(0008,1030) := project
(0010,0010) := subject
(0010,0020) := session
'''
PROJECT = '''version "6.6"
- (0010,4000)
- (0010,0030)
(0008,0050) := ""
(0020,000D) := hashUID[(0020,000D)]
(0020,000E) := hashUID[(0020,000E)]
(0008,0018) := hashUID[(0008,0018)]
removeAllPrivateTags
'''
PLANTED = (data.PATIENT_NAME, data.PATIENT_ID, "19700203", "ACC-PLANTED-99")


def images(count: int = 3, series: int = 1, **elements: Any) -> list[Dataset]:
    return list(data.study(series, count, AccessionNumber="ACC-PLANTED-99", **elements))


def scripts(folder: Path, project: str = PROJECT, site: str = SITE) -> tuple[dict[str, Any], str]:
    """A site-wide script and a project's, as files: the route's settings and the table of the site's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.das").write_text(site, encoding="utf-8")
    (folder / "p1.das").write_text(project, encoding="utf-8")
    more = f'\n[deidentify]\nscripts = ["{folder / "site.das"}"]\nprocesses = 2\n'
    return {"scripts": [str(folder / "p1.das")]}, more


def nothing_planted(*places: Path) -> None:
    """None of the planted values is anywhere in these files, whatever they are."""
    looked = 0
    for place in places:
        for path in [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]:
            content = path.read_bytes()
            looked += 1
            for value in PLANTED:
                assert value.encode() not in content, f"{value} is in {path}"
    assert looked, "nothing was looked at"


def test_what_is_shipped_is_de_identified_and_proved(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route, more=more)
    sent = images(4, series=2)
    box.take(sent)
    box.wait(Stop.VERIFIED)
    files = archived_files(central)
    assert len(files) == len(sent)
    nothing_planted(tmp_path / "central")
    arrived = [dcmread(path) for path in files]
    assert {str(image.PatientName) for image in arrived} == {"S1"}
    assert {image.PatientID for image in arrived} == {"S1_MR1"}
    assert {image.StudyDescription for image in arrived} == {"P1"}
    assert len({image.StudyInstanceUID for image in arrived}) == 1
    assert len({image.SeriesInstanceUID for image in arrived}) == 2
    assert not {image.SOPInstanceUID for image in arrived} & {image.SOPInstanceUID for image in sent}
    assert sorted(image.PixelData for image in arrived) == sorted(image.PixelData for image in sent)
    receipt = box.proved()
    assert {entry["received_as"] for entry in receipt["instances"]} == {image.SOPInstanceUID for image in sent}
    assert {entry["sop_instance"] for entry in receipt["instances"]} == {image.SOPInstanceUID for image in arrived}
    assert receipt["recipe_sha256"] and receipt["study"] == arrived[0].StudyInstanceUID
    assert box.balances().delivered == len(sent)
    assert list((box.config.deidentified / "1").iterdir())


def test_a_supplement_gets_the_same_uids(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route, more=more)
    sent = images(4)
    box.take(sent[:2])
    box.wait(Stop.VERIFIED)
    box.take(sent[2:])
    box.wait(Stop.VERIFIED, shipment=2)
    arrived = [dcmread(path) for path in archived_files(central)]
    assert len(arrived) == 4 and len({image.SeriesInstanceUID for image in arrived}) == 1


def test_review_shows_what_will_leave_and_releases_just_that(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"review": True}, more=more)
    sent = images(3, series=2)
    box.take(sent)
    box.wait_shipment(State.REVIEW)
    assert len(central.requests) == 0
    [row] = box.json("review", "list")
    assert (row["shipment"], row["project"], row["subject"], row["session"]) == (1, "P1", "S1", "S1_MR1")
    shown = box.cli("review", "show", "1", "--changes", "--json", "--thumbnails", str(tmp_path / "pictures")).stdout
    for value in PLANTED:
        assert value not in shown, "the patient-free view shows the patient"
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    found = box.json("review", "show", "1", "--changes")
    changed = {change["path"]: change for change in found["changes"]}
    assert changed["(0010,0010)"]["after"] == "S1" and "site.das" in changed["(0010,0010)"]["rule"]
    assert changed["(0010,4000)"]["after"] is None and "p1.das" in changed["(0010,4000)"]["rule"]
    assert box.json("show", "1", "--changes")["changes"] == found["changes"]
    assert "(absent)" in box.cli("show", "1", "--changes").stdout
    assert box.cli("review", "show", "1", "--identified").returncode == 1
    assert box.cli("review", "release", "1", "--digest", "0" * 64).returncode == 1
    assert box.cli("review", "release", "1", "--digest", found["digest"]).returncode == 0
    box.wait(Stop.VERIFIED)
    assert len(archived_files(central)) == len(sent)
    assert box.proved()["approved"] == found["digest"]


def test_labels_that_a_reviewer_gives_flow_into_the_headers(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"review": True, "headers": {"0008,0050": "{accession}"}}, more=more)
    box.take(images(2))
    box.wait_shipment(State.REVIEW)
    before = box.json("review", "show", "1")["digest"]
    assert box.cli("assign", "1", "--subject", "S7", "--session", "S7_MR2", "--accession", "NEW-1").returncode == 0
    box.wait_shipment(State.REVIEW)
    found = box.json("review", "show", "1")
    assert found["digest"] != before and found["subject"] == "S7"
    assert box.cli("review", "release", "1").returncode == 0
    box.wait(Stop.VERIFIED)
    [*arrived] = [dcmread(path) for path in archived_files(central, "S7_MR2")]
    assert {(str(image.PatientName), image.PatientID, image.AccessionNumber) for image in arrived} == {
        ("S7", "S7_MR2", "NEW-1")}


def test_an_accession_number_from_the_comments_goes_into_the_header(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"headers": {"0008,0050": "{accession}"}}, more=more)
    box.take(images(2, comments="Project:P1 Subject:S1 Session:S1_MR1 Accession:STUDY-7"))
    box.wait(Stop.VERIFIED)
    assert {dcmread(path).AccessionNumber for path in archived_files(central)} == {"STUDY-7"}


def test_an_approval_lapses_when_the_script_changes(pair: Pair, tmp_path: Path) -> None:
    """Approved, not yet sent, script changed: it is made anew and a person is asked again."""
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"review": True}, more=more, destination={"windows": [_closed()]})
    box.take(images(2))
    box.wait_shipment(State.REVIEW)
    assert box.cli("review", "release", "1").returncode == 0
    box.wait_shipment(State.READY)
    box.wait_words("time window", attempts=0)
    (tmp_path / "scripts" / "p1.das").write_text(PROJECT + "- (0018,1000)\n", encoding="utf-8")
    box.retry()
    row = box.wait_shipment(State.REVIEW)
    assert "changed since" in row["reason"]
    assert requests_for(central) == []


def _closed() -> dict[str, str]:
    from datetime import datetime, timedelta
    start = datetime.now() + timedelta(hours=3)
    return {"start": start.strftime("%H:%M"), "end": (start + timedelta(hours=1)).strftime("%H:%M")}


def test_an_identifier_that_the_scripts_leave_holds_the_shipment(pair: Pair, tmp_path: Path) -> None:
    """The patient's name in a private element and in a description: no script touches them, and nothing leaves."""
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route, more=more)
    sent = images(2, ImageComments=f"seen with {data.PATIENT_NAME.partition('^')[0].upper()} today")
    box.take(sent)
    row = box.wait_shipment(State.HELD)
    assert "(0020,4000)" in row["reason"]
    for value in ("Planted", "PLANTED", "Name"):
        assert value not in row["reason"]
    assert len(central.requests) == 0
    box.all_here(sent)
    (tmp_path / "scripts" / "p1.das").write_text(PROJECT + "- (0020,4000)\n", encoding="utf-8")
    box.retry()
    box.wait(Stop.VERIFIED)
    nothing_planted(tmp_path / "central")


def test_what_a_script_rejects_is_set_apart_and_the_rest_goes(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts", PROJECT + '(0020,0011) = "2" ? reject[]\n')
    box, central = pair(route=route, more=more)
    sent = images(3, series=2)
    box.take(sent)
    wait_for(lambda: (box.balances().delivered, box.balances().rejected) == (3, 3), say="three go and three stay")
    assert len(archived_files(central)) == 3
    rows = box.ledger.all("SELECT * FROM shipment WHERE state = 'rejected'")  # more than one when this machine is slow
    assert all("p1.das" in row["reason"] and "rejected by the script" in row["reason"] for row in rows)
    box.kept(sent)


def test_a_reviewer_sets_a_series_apart(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"review": True}, more=more)
    sent = images(3, series=2)
    box.take(sent)
    box.wait_shipment(State.REVIEW)
    series = sent[0].SeriesInstanceUID
    assert box.cli("review", "exclude", "1", "--series", series, "--reason", "a screen capture").returncode == 0
    box.wait_shipment(State.REVIEW)
    assert box.cli("review", "release", "1").returncode == 0
    box.wait(Stop.VERIFIED)
    assert len(archived_files(central)) == 3
    assert (box.balances().delivered, box.balances().rejected) == (3, 3)


def test_objects_whose_pixels_may_identify_wait_for_a_person(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route, more=more)
    sent = images(2, sop_class="1.2.840.10008.5.1.4.1.1.7")
    box.take(sent)
    row = box.wait_shipment(State.REVIEW)
    assert "secondary-capture" in row["reason"]
    assert len(central.requests) == 0
    assert box.cli("review", "release", "1").returncode == 0
    box.wait(Stop.VERIFIED)


def test_a_project_may_let_a_kind_of_object_pass(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, _ = pair(route=route | {"pixel_risks_allowed": ["secondary-capture"]}, more=more)
    box.take(images(2, sop_class="1.2.840.10008.5.1.4.1.1.7"))
    box.wait(Stop.VERIFIED)


def test_a_name_that_would_leave_as_a_label_waits_for_a_person(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route, more=more)
    box.take(images(2, comments="Project:P1"))
    row = box.wait_shipment(State.REVIEW)
    assert row["reason"] == "what is in the patient's data became the label of the subject and the session"
    assert len(central.requests) == 0
    assert box.cli("assign", "1", "--subject", "S7", "--session", "S7_MR2").returncode == 0
    box.wait(Stop.VERIFIED)
    assert len(archived_files(central, "S7_MR2")) == 2


def test_a_route_may_say_that_the_patients_name_is_a_study_code(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, _ = pair(route=route | {"patient_labels_allowed": True}, more=more)
    box.take(images(2, comments="Project:P1"))
    box.wait(Stop.VERIFIED)


def test_a_script_that_is_wrong_holds_with_line_and_column(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts", PROJECT + "(0010,0010) :=\n")
    box, central = pair(route=route, more=more)
    sent = images(2)
    box.take(sent)
    row = box.wait_shipment(State.HELD)
    assert "p1.das" in row["reason"] and "line 9, column 15" in row["reason"]
    for command in (["retry", "1"], ["assign", "1", "--route", "all"], ["release", "1"]):
        box.cli(*command)
        box.wait_shipment(State.HELD)
    assert len(central.requests) == 0
    box.all_here(sent)


def test_what_was_made_and_is_damaged_is_not_shipped_and_made_again(pair: Pair, tmp_path: Path) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, central = pair(route=route | {"review": True}, more=more)
    box.take(images(2))
    box.wait_shipment(State.REVIEW)
    [path, _] = (box.config.deidentified / "1").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert box.cli("review", "release", "1").returncode == 0
    row = box.wait_shipment(State.HELD)
    assert "what was made of instance" in row["reason"]
    box.retry()
    box.wait(Stop.VERIFIED)  # the same again, bit for bit: the approval holds
    assert len(archived_files(central)) == 2


def test_nothing_planted_is_in_logs_receipts_or_exports(tmp_path: Path, pair: Pair) -> None:
    route, more = scripts(tmp_path / "scripts")
    box, _ = pair(route=route, more=more)
    box.take(images(3))
    box.wait(Stop.VERIFIED)
    for command in (("status",), ("list",), ("show", "1"), ("receipt", "1"), ("review", "show", "1", "--changes")):
        for done in (box.cli(*command), box.cli(*command, "--json")):
            assert done.returncode == 0, done.stderr
            for value in PLANTED:
                assert value not in done.stdout + done.stderr, command
    nothing_planted(tmp_path / "central", box.config.deidentified)
    assert isinstance(box, Box)
