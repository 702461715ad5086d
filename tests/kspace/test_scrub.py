"""Planted identities never survive, k-space never changes, and what cannot be done right is held."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent.deidentify.uids import UIDs
from relay_agent.kspace import identity, protocol
from relay_agent.kspace.scrub import Held, plan, scrub
from relay_agent.kspace.twix import NotTwix, Verdict, check
from tests.kspace.others import by_mapvbvd, by_twixtools
from tests.kspace.synthetic import (
    ADJUSTMENT,
    FAMILIES,
    FIRST,
    FRAME,
    PERSON,
    PLANNED,
    File,
    Person,
    Scan,
    build,
    parts,
    written,
)

UID = UIDs(b"key of a box", "P1")
PEOPLE = {
    "plain": PERSON,
    "umlauts": Person(name="Müßiggänger^Ägidius", institution="Universitätsklinikum Ödland", physician="Weiß^Öl"),
    "number": Person(id="20031777", serial="141414", name="4711^4712"),
    "lower case": Person(name="quellenhofer^annegret", id="ab-12 cd/34"),
    "short": Person(name="Li^Bo", id="77"),
    "uid as ID": Person(id="1.2.826.0.1.3680043.2.1125.1.12345678901234567890"),
    "words of the format": Person(name="Position^Precision", id="Sequence-1", physician="Baseline^Kspace"),
    "birth date in the name": Person(name="Quellenhofer,19530417"),
}


def scrubbed(folder: Path, content: bytes, **options: object) -> bytes:
    source, target = written(folder, content), folder / "out.dat"
    target.unlink(missing_ok=True)
    done = scrub(source, plan(source, UID, **options), target)  # type: ignore[arg-type]
    result = target.read_bytes()
    assert done.sha256 == hashlib.sha256(result).hexdigest()
    assert done.check.sha256 == hashlib.sha256(content).hexdigest()
    return result


def kspace(file: File, content: bytes) -> list[str]:
    return [hashlib.sha256(content[begin:end]).hexdigest() for begin, end in parts(file)]


@pytest.mark.parametrize("person", PEOPLE)
def test_planted_identities_do_not_survive(made, person, tmp_path):
    made = made.but(person=PEOPLE[person], more={"Phoenix": f"sComment = \"seen with {PEOPLE[person].name} today\"\n"})
    content = build(made)
    result = scrubbed(tmp_path, content)
    assert len(result) == len(content)
    assert kspace(made, result) == kspace(made, content)
    planted = [text for text in made.person.planted() if len(text) >= 3]
    assert sum(text in content for text in planted) > len(planted) * 2 // 3
    left = protocol.contents(result)
    assert [text for text in planted if text in left] == []
    if person == "short":  # too short to be looked for, so at least where the labels say
        for label in (b"PatientID", b"tPatientName", b"PatientsName"):
            assert not re.search(label + rb'">\s*\{\s*(?:<Visible> "true"\s*)?"(?!x+"|0+")[^"]', result)


def test_words_of_the_format_stay(tmp_path):
    """Somebody is called like a part of it."""
    person = Person(name="Position^Precision", physician="Baseline^Kspace", id="Double")
    result = scrubbed(tmp_path, build(File(person=person)))
    for word in (b"sProtConsistencyInfo.tBaselineString", b"sKSpace.lBaseResolution", b"<Precision> 6", b"<ParamLong."):
        assert word in result


@pytest.mark.parametrize("value", ["033Y", "M", "1.7e+02", "70"])
def test_numbers_written_as_text(value, tmp_path):
    person = Person(age=f'"{value}"', weight=value if value[0].isdigit() and value[-1].isdigit() else "70")
    result = scrubbed(tmp_path, build(File(person=person)))
    assert f'"{value}"'.encode() not in result


@pytest.mark.slow  # the readers of others are slow to load
def test_the_result_is_read_as_before_by_others(made, tmp_path):
    source = written(tmp_path, build(made))
    before = by_twixtools(source), by_mapvbvd(source)
    written(tmp_path, scrubbed(tmp_path, source.read_bytes()))
    assert (by_twixtools(source), by_mapvbvd(source)) == before
    found = check(source)
    assert found.verdict is Verdict.COMPLETE
    with source.open("rb") as file:
        texts = {name: text for name, _, text in protocol.texts(file.fileno(), found.measurements[-1])}
    assert protocol.first(texts["Meas"], "tProtocolName") == made.scans[-1].protocol.encode()
    assert protocol.first(texts["Dicom"], "flReadoutOSFactor") == b"2.000000"


def test_uids_are_those_that_the_dicom_side_gets(made, tmp_path):
    source = written(tmp_path, scrubbed(tmp_path, build(made)))
    found = check(source)
    with source.open("rb") as file:
        texts = {name: text for name, _, text in protocol.texts(file.fileno(), found.measurements[-1])}
    assert protocol.first(texts["Config"], "FrameOfReference").decode() == UID.new(FRAME)
    for number, old in enumerate(PLANNED):
        assert protocol.first(texts["MeasYaps"], f"tReferenceImage{number}").decode() == UID.new(old)
    assert UID.new(FRAME) != UIDs(b"key of a box", "P2").new(FRAME)


def test_short_and_embedded_uids(tmp_path):
    short, within = "1.3.12.2.1107.5.2.43.67890", "1.3.12.2.1107.5.2.31.30058.1.20081112184038343.0.0.0"
    class_uid = "1.2.840.10008.5.1.4.1.1.4"
    content = build(File(more={"Meas": f'<ParamString."DICOM_UID_ROOT"> {{ "{short}" }}\n'
                               f'<Comment> "e.g. FOR={within};MI=20" bare {within} end\n"{class_uid}"\n'}))
    result = scrubbed(tmp_path, content)
    assert b'"2.25"' in result
    assert f"FOR={UID.new(within)};MI=20\"".encode() in result
    assert f"bare {UID.new(within)} ".encode() in result
    assert class_uid.encode() in result


def test_what_is_neither_text_nor_readout_becomes_zero(made, tmp_path):
    """Real files hold scraps of the imager's memory there."""
    junk = b"no label says what this is"
    made = made.but(junk=junk)
    content = build(made)
    assert junk in content
    result = scrubbed(tmp_path, content)
    assert junk[:9] not in result
    for begin, _ in parts(made):
        assert not any(result[begin - 29:begin])


def test_fields_that_a_project_keeps(tmp_path):
    content = build(File())
    result = scrubbed(tmp_path, content, keep=["age", "weight", "institution"])
    for value, stays in ((PERSON.age, True), (PERSON.weight, True), (PERSON.institution, True), (PERSON.address, True),
                         (PERSON.height, False), (PERSON.name, False), (PERSON.id, False), (FRAME, False)):
        assert (value.encode() in result) is stays, value
    with pytest.raises(ValueError, match="can be kept"):
        scrubbed(tmp_path, content, keep=["name"])


def test_what_only_dicom_knows_must_not_occur_either(tmp_path):
    """The vendor's tool replaces what it knows of by x, and leaves a name in a comment."""
    person = Person(name="xxxxxxx", id="xxxxxxxxxxxx", birth="xxxxxxxx")
    content = build(File(person=person, more={"Meas": 'tComment = "repeat for Waldemar"\n'}))
    assert b"Waldemar" in scrubbed(tmp_path, content)
    assert b"aldemar" not in scrubbed(tmp_path, content, known=["Habersack^WALDEMAR"])


@pytest.mark.parametrize("change", [
    {"software": "syngo MR XA99", "family": "XA"}, {"software": "other", "baseline": ""},
    {"baseline": "N4_VF11A_LATEST", "software": "syngo MR F11"}, {"software": "syngo MR D13"}])  # contradicts itself
def test_an_unknown_software_version_is_held(change, tmp_path):
    source = written(tmp_path, build(File().but(**change)))
    with pytest.raises(Held, match="software version"):
        plan(source, UID)
    if change.get("family"):
        assert plan(source, UID, versions=["XA99"]).versions == ("XA99",)


@pytest.mark.parametrize("more", [
    {"Meas": '<ParamString."tPatientName"> "Quellenhofer"\n'},  # no body
    {"Meas": '<ParamString."tPatientName"> { "Quellenhofer"\n'},  # which does not end
    {"Meas": '<ParamString."tPatientName"> { "Quellen "Other" hofer" }\n'},  # quotes within
    {"Meas": '<ParamString."Comment"> { "an odd quote }\n'},
    {"Meas": '<ParamString."A"> { "odd" quote" }\n<ParamString."B"> { "x" }\n<ParamString."C"> { "odd" quote" }\n'},
    {"Spice": "<PatientName>Other</PatientName>\n"},
    {"Spice": "PatientID: Other\n"}])
def test_texts_that_nobody_understands_are_held(more, tmp_path):
    with pytest.raises(Held) as error:
        plan(written(tmp_path, build(File(more=more))), UID)
    assert "Quellenhofer" not in str(error.value)
    assert "Other" not in str(error.value)


def test_a_name_among_the_readouts_is_held(tmp_path):
    source, target = written(tmp_path, build(File(scans=(Scan(sync=b"physio of QUELLENHOFER"),)))), tmp_path / "out"
    made = plan(source, UID)
    with pytest.raises(Held, match="readouts"):
        scrub(source, made, target)
    assert not target.exists()


@pytest.mark.parametrize("cut", [9000, 12_000, 20_000])
def test_an_incomplete_file_is_held(cut, tmp_path):
    with pytest.raises(Held):
        plan(written(tmp_path, build(File())[:cut]), UID)
    with pytest.raises(NotTwix):
        plan(written(tmp_path, b"nothing of the kind"), UID)


def test_damaged_readouts_are_held_and_nothing_is_left(tmp_path):
    content = bytearray(build(File()))
    begin, end = parts(File())[0]
    content[begin + 300:end - 352] = bytes(end - 352 - begin - 300)
    source, target = written(tmp_path, bytes(content)), tmp_path / "out"
    with pytest.raises(Held, match="incomplete"):
        scrub(source, plan(source, UID), target)
    assert not target.exists()


@pytest.mark.parametrize("gap", [0, 2**19, 2**20, 2**34])
def test_a_gap_behind_the_table_is_wiped_or_held(gap, tmp_path):
    """It may hold anything, and it may be larger than any memory."""
    content = build(File())
    path = tmp_path / "meas.dat"
    with path.open("wb") as file:
        file.write(content[:8 + 8] + struct.pack("<Q", FIRST + gap) + content[24:FIRST])
        file.write(PERSON.name.encode() if gap else b"")
        file.seek(FIRST + gap)
        file.write(content[FIRST:])
    if gap < 2**20:
        assert PERSON.name.encode() not in scrubbed(tmp_path, path.read_bytes())
    else:
        with pytest.raises(Held, match="between its table and its measurements"):
            plan(path, UID)


def test_a_plan_is_for_the_file_that_it_was_made_from(tmp_path):
    source, target = written(tmp_path, build(File())), tmp_path / "out"
    made = plan(source, UID)
    other = bytearray(source.read_bytes())
    source.write_bytes(other)
    os.utime(source, ns=(1, 1))
    with pytest.raises(Held, match="changed"):
        scrub(source, made, target)
    assert not target.exists()


def test_an_existing_target_is_left_alone(tmp_path):
    source, target = written(tmp_path, build(File())), tmp_path / "out"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        scrub(source, plan(source, UID), target)
    assert target.read_bytes() == b"mine"


def test_an_aborted_scan_is_scrubbed_too(tmp_path):
    made = File(scans=(Scan(acqend=False),))
    content = build(made)
    result = scrubbed(tmp_path, content)
    assert kspace(made, result) == kspace(made, content)
    assert PERSON.name.encode() not in result


def test_identity_of_one_measurement_is_looked_for_in_all(tmp_path):
    """The first says the name where its label is, the second only in the name of its protocol."""
    made = File(scans=(ADJUSTMENT, Scan(protocol="tse_for_Quellenhofer")))
    result = scrubbed(tmp_path, build(made))
    assert b"tse_for_xxxxxxxxxxxx" in result
    assert b"uellenhofer" not in result


def test_the_report_and_the_plan_tell_no_values(made, tmp_path):
    found = plan(written(tmp_path, build(made)), UID)
    shown = repr(found.report) + repr(found.versions)
    assert not [text for text in made.person.planted() if text.decode() in shown]
    assert {kind for _, kind, _ in found.report} >= {"name", "id", "birth", "uid", "institution", "exam"}
    assert {where for where, _, _ in found.report} >= {"measurement 1, Config", "measurement 1, Meas"}
    assert PERSON.name not in repr(found.needles)


def test_the_search_of_the_result_fails_closed(tmp_path, monkeypatch):
    """Were the replacing broken, the search would hold the file."""
    monkeypatch.setattr(identity, "blank", lambda value: value)
    with pytest.raises(Held, match="is left"):
        plan(written(tmp_path, build(File())), UID)


def test_a_uid_that_stays_fails_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(UIDs, "new", lambda _, old: old)
    with pytest.raises(Held, match="is left"):
        plan(written(tmp_path, build(File())), UID)


def test_patches_hold_at_any_border(tmp_path):
    source = written(tmp_path, build(File()))
    made, content = plan(source, UID), source.read_bytes()
    whole = bytearray(content)
    made.apply(0, memoryview(whole))
    for size in (1, 7, 63, 64, 65, 1000, 4096):
        pieces = b""
        for at in range(0, len(content), size):
            piece = bytearray(content[at:at + size])
            made.apply(at, memoryview(piece))
            pieces += piece
        assert pieces == whole


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_headers_are_held_or_scrubbed(data, tmp_path_factory):
    """One byte of a header changed: a clear error, or none of the planted texts in the result."""
    content = bytearray(build(FAMILIES["XA"]))
    at = data.draw(st.integers(10_240, parts(FAMILIES["XA"])[0][0] - 30))
    content[at] = data.draw(st.sampled_from(list(b'"{}<>x= \0\n5\xff')))
    source, target = written(tmp_path_factory.getbasetemp(), bytes(content)), tmp_path_factory.getbasetemp() / "out"
    target.unlink(missing_ok=True)
    try:
        scrub(source, plan(source, UID), target)
    except (Held, NotTwix) as error:
        assert not [text for text in PERSON.planted() if text.decode() in str(error)]
        return
    result = target.read_bytes()
    numbers = {PERSON.weight.encode(), PERSON.height.encode()}  # their only label may be what was changed
    assert [text for text in PERSON.planted() if text not in numbers and text in result] == []


@pytest.mark.parametrize(("label", "kind"), [
    ("tPatientName", "name"), ("PatientsName", "name"), ("PatientID", "id"), ("PatientBirthDay", "birth"),
    ("flUsedPatientWeight", "weight"), ("lPatientSex", "sex"), ("SeriesLOIDS4SplitAndPause", "exam"),
    ("tCurrentMppsLoid", "exam"), ("Study", "exam"), ("ExamMemoryUID", "exam"), ("DeviceSerialNumber", "device"),
    ("InstitutionAddress", "institution"), ("PatientRegistrationData", "name"), ("tPerfPhysiciansName", "physician"),
    ("PatientPosition", ""), ("tProtocolName", ""), ("SequenceDescription", ""), ("lBTB1SerialCapacity", ""),
    ("PatientIDFromRIS", "id"), ("PatientsShoeSize", "other"), ("sPatientPos", ""), ("PatChanged", ""),
    ("ResetEntriesInExamMemory", ""), ("SaveExamMemoryPath", ""), ("MeasUID", "")])
def test_kinds_of_fields(label, kind):
    assert identity.kind(label) == kind


def test_real_files_lose_everything_but_k_space(real, tmp_path):
    content = real.read_bytes()
    (one,) = check(real).measurements
    result = scrubbed(tmp_path, content)
    assert result[one.data:] == content[one.data:]
    for text in (b"20210622", b"45385", b"DZNE", b"Sigmund", b"66327775", b"6.0.663", b"33.000000"):
        assert text in content
        assert text not in result[:one.data]
    frame = "1.3.12.2.1107.5.2.19.45385.1.20210622151635693.0.0.0"
    assert result.count(f'"{UID.new(frame)}"'.encode()) == content.count(f'"{frame}"'.encode())
    before = by_twixtools(real)
    assert by_twixtools(written(tmp_path, result)) == before
