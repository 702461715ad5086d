"""Raw data and their DICOM: matched by what they share, never by a guess."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from relay_agent.kspace import facts
from relay_agent.kspace.match import Raw, Series, Session, State, clock_offset, difference, match
from relay_agent.kspace.protocol import Unreadable
from relay_agent.kspace.twix import check
from tests.kspace.synthetic import FAMILIES, FRAME, PERSON, PLANNED, START, File, Person, Scan, build, written

RAW = Raw(frozenset({"f"}), frozenset({"i1", "i2"}), "67890", "", "t1", 36_900.0, 2.3)
T1 = Series("s4", 4, frozenset({"t1"}), 36_901.0)
HERE = Session("here", frozenset({"f"}), frozenset({"i1", "x"}), frozenset({"67890"}), frozenset({"P"}),
               (Series("s1", 1, frozenset({"localizer"}), 36_500.0), T1,
                Series("s5", 5, frozenset({"t1_ND", "t1"}), 36_901.5), Series("s9", 9, frozenset({"t1"}), 38_000.0)))
ELSEWHERE = Session("elsewhere", frozenset({"g"}), frozenset({"y"}), HERE.serials, frozenset({"Q"}), HERE.series)


def test_everything_agrees():
    found = match(RAW, [ELSEWHERE, HERE])
    assert found.state is State.MATCHED
    (best,) = found.candidates
    assert (best.session, best.score) == ("here", 100 + 60 + 10 + 40)
    assert [one.number for one in best.series] == [4, 5]  # the lowest first, all recorded
    assert best.reasons == ("frame of reference", "planned on its images", "serial number", "series by name and time")


@pytest.mark.parametrize(("session", "state", "score"), [
    (replace(HERE, images=frozenset()), State.MATCHED, 150),
    (replace(HERE, frames=frozenset({"repositioned"})), State.MATCHED, 110),  # localizers of the same session
    (replace(HERE, frames=frozenset(), images=frozenset()), State.UNMATCHED, None),  # the same scanner says nothing
    (replace(HERE, serials=frozenset({"other"})), State.UNMATCHED, None),  # whatever the UIDs say
    (replace(HERE, serials=frozenset()), State.MATCHED, 200),
    (replace(HERE, series=()), State.MATCHED, 170)])
def test_what_each_key_is_worth(session, state, score):
    found = match(RAW, [session])
    assert found.state is state
    assert [one.score for one in found.candidates] == ([] if score is None else [score])


def test_another_patient_is_rejected_and_the_same_alone_is_not_enough():
    assert match(replace(RAW, patient="P"), [HERE]).candidates[0].score == 230
    assert match(replace(RAW, patient="R"), [HERE]).state is State.UNMATCHED
    found = match(replace(RAW, patient="P", frames=frozenset(), planned_on=frozenset()), [HERE, ELSEWHERE])
    assert found.state is State.AMBIGUOUS  # a person decides
    assert [one.session for one in found.candidates] == ["here"]


def test_two_sessions_of_one_frame_of_reference_are_for_a_person():
    other = replace(HERE, name="other", images=frozenset())
    found = match(replace(RAW, planned_on=frozenset()), [HERE, other])
    assert found.state is State.AMBIGUOUS
    assert [(one.session, one.score) for one in found.candidates] == [("here", 150), ("other", 150)]
    assert match(RAW, [HERE, other]).state is State.MATCHED  # planned in one of them
    contradicts = replace(HERE, frames=frozenset({"g"}), name="planned there")
    assert match(RAW, [other, contradicts]).state is State.AMBIGUOUS


@pytest.mark.parametrize(("start", "offset", "numbers"), [
    (36_900.0, 0.0, [4, 5]), (36_903.2, 0.0, [4, 5]), (36_300.0, 600.0, [4, 5]), (36_300.0, 0.0, []),
    (37_000.0, 0.0, [4, 5]), (37_999.0, 0.0, [9]), (37_900.0, 0.0, []), (None, 0.0, [])])
def test_the_series(start, offset, numbers):
    found = match(replace(RAW, start=start), [HERE], offset)
    assert [one.number for one in found.candidates[0].series] == numbers
    exact = "series by name and time" in found.candidates[0].reasons
    assert exact is (start in (36_900.0, 37_999.0) or start == 36_903.2 or offset == 600.0)


def test_midnight_is_no_border():
    assert difference(5.0, 86_395.0) == pytest.approx(10.0)
    assert difference(86_395.0, 5.0) == pytest.approx(-10.0)
    late = replace(HERE, series=(Series("s", 3, frozenset({"t1"}), 0.5),))
    assert match(replace(RAW, start=86_399.5), [late]).candidates[0].series


def test_the_clock_is_learnt_from_three_pairs_and_more():
    assert clock_offset([(10.0, 70.0), (20.0, 80.5)]) is None
    found = clock_offset([(10.0, 70.0), (20.0, 80.5), (30.0, 90.2), (40.0, 9000.0)])  # one was wrong
    assert found is not None
    assert found.seconds == pytest.approx(60.35, abs=0.2)
    assert found.pairs == 4
    assert found.spread < 1
    wrapped = clock_offset([(86_390.0, 20.0)] * 3)
    assert wrapped is not None
    assert wrapped.seconds == pytest.approx(30.0)


@given(st.lists(st.sampled_from([HERE, ELSEWHERE, replace(HERE, name="c"), Session("d")]), max_size=5),
       st.floats(0, 9e4))
def test_never_a_guess(sessions, start):
    found = match(replace(RAW, start=start), sessions)
    scores = [one.score for one in found.candidates]
    assert scores == sorted(scores, reverse=True)
    if found.state is State.MATCHED:
        assert scores[0] >= 60
        assert len(scores) == 1 or scores[0] - scores[1] >= 40
    assert (found.state is State.UNMATCHED) is (not scores)


def dicom(folder: Path, number: int, frame: str = FRAME, study: str = "1.2.3", protocol: str = "t1_mprage",
          at: str = "101500.5", sop: str = "", patient: str = "77") -> None:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, sop or f"1.2.3.{number}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.SeriesNumber = study, f"{study}.{number}", number
    data.FrameOfReferenceUID, data.ProtocolName, data.AcquisitionTime = frame, protocol, at
    data.PatientID, data.DeviceSerialNumber = patient, PERSON.serial
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = MRImageStorage, "1.2.3"
    folder.mkdir(exist_ok=True)
    pydicom.dcmwrite(folder / f"{study}-{number}.dcm", data, enforce_file_format=True)


@pytest.mark.parametrize("family", ["VB", "VE", "XA"])
def test_facts_of_files(family, tmp_path):
    anonymised = Person(name="xxxx", id="xxxxxxxx", birth="xxxxxxxx")
    raw = written(tmp_path, build(File(family=family, scans=(Scan(start=START),), person=anonymised)))
    found = facts.raw(raw, check(raw))
    assert found == Raw(frozenset({FRAME}), frozenset(PLANNED), PERSON.serial, "", "t1_mprage", found.start, 2.3)
    assert found.start == pytest.approx(START + 0.01, abs=0.003)
    for number, name in ((3, "localizer"), (7, "t1_mprage"), (8, "t1_mprage")):
        dicom(tmp_path / "dicom", number, protocol=name, sop=PLANNED[0] if number == 3 else "")
    dicom(tmp_path / "dicom", 1, frame="1.9.9", study="1.2.4")
    (tmp_path / "dicom" / "notes.txt").write_text("no DICOM")
    result = match(found, facts.sessions(sorted((tmp_path / "dicom").iterdir())))
    assert result.state is State.MATCHED
    assert result.candidates[0].session == "1.2.3"
    assert [one.number for one in result.candidates[0].series] == [7, 8]


@pytest.mark.slow
@settings(max_examples=100)
@given(data=st.data())
def test_facts_of_damaged_files(data, tmp_path_factory):
    content = bytearray(build(FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]))
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(list(b'"{}<> \n9\xff')))
    path = written(tmp_path_factory.getbasetemp(), bytes(content))
    found = check(path)
    if found.measurements:
        with suppress(Unreadable):
            facts.describe(path, found)
            facts.raw(path, found)


@pytest.mark.parametrize(("text", "value"), [("101500.25", 36_900.25), ("20240229101500", 36_900.0), ("", None),
                                             ("10", None), ("101500", 36_900.0)])
def test_times(text, value):
    assert facts.seconds(text) == value
