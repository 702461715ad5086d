"""A generated study through the profile, judged by the ten kinds of actions of MIDI-B; and the checks themselves."""

from __future__ import annotations

import pytest

from relay_agent.dataset import PIXELS
from relay_agent.deidentify import profile, residue
from relay_agent.deidentify.script import Context
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from tests.deidentify import midi, planted
from tests.deidentify.planted import instance, reread

REQUEST = 0x00400275
REFERENCE = (0x00081115, 0, 0x00081199, 0, 0x00081155)
OPTIONS = "retain-modified-dates clean-descriptors retain-safe-private retain-patient-characteristics"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[File, File]]:
    """Two patients with two series of two images each."""
    script = profile.parse(f"ps3.15 {OPTIONS}", "site")
    made = []
    for patient_id, subject in ((planted.ID, "S1"), ("PHT-5577991", "S2")):
        for series, number in ((1, 1), (1, 2), (2, 1), (2, 2)):
            one = {"number": number, "series": series, "patient_id": patient_id}
            result = instance(**one)
            script.apply(result, Context(UIDs(b"key", "P1"), project="P1", subject=subject))
            made.append((instance(**one), reread(result)))
    return made


def test_a_study_passes_all_ten(pairs):
    uids = UIDs(b"key", "P1")
    for original, result in pairs:
        for tag in (0x00080060, 0x00180020, 0x00280010, 0x0019100C, 0x00101010, PIXELS, REQUEST):
            assert midi.tag_retained(original, result, tag)
        for tag in (0x00080020, 0x00080070, 0x0008103E, 0x00100020, 0x00081030):
            assert midi.text_notnull(original, result, tag)
        assert midi.text_retained(original, result, 0x00081030, "MR Brain")
        assert midi.text_retained(original, result, 0x0008103E, "t1_mprage_sag_p2_iso_1.0")
        assert midi.text_retained(original, result, (REQUEST, 0, 0x00400007), "head of")
        for place, text in ((0x00100010, "SMITHERSON"), (0x00081030, "smitherson"), (0x00181030, "Jonathan"),
                            (0x00080050, "4711007"), (0x00081070, "TURNBULL"), (0x00321060, "Turnbull"),
                            ((REQUEST, 0, 0x00400007), "SMITHERSON"), ((0x00101002, 0, 0x00100020), "5550123"),
                            ((0x00101002, 0, 0x00091001), "SMITHERSON"),
                            ((REQUEST, 0, 0x00400008, 0, 0x00080104), "Smith")):
            assert midi.text_removed(original, result, place, text), (place, text)
        days = uids.shift_days(original.dataset.text(0x00100020))
        for tag in (0x00080020, 0x00080021, 0x00080023, 0x0008002A):
            assert midi.date_shifted(original, result, tag, days)
        for place in (0x00080018, 0x0020000D, 0x0020000E, 0x00200052, REFERENCE):
            assert midi.uid_changed(original, result, place)
        assert midi.pixels_retained(original, result)
        assert residue.search(result.dataset, residue.identifiers(original.dataset, (), ["S1", "S2"])) == []
    assert midi.uid_consistent(pairs, 0x00080018, REFERENCE)
    assert midi.uid_consistent(pairs, 0x0020000D) and midi.uid_consistent(pairs, 0x0020000E)
    assert midi.patid_consistent(pairs)


def test_the_checks_fail_where_they_should():
    original, other = instance(), instance(number=2, patient_id="OTHER-1")
    same, empty = instance(), instance()
    for tag in (0x00080020, 0x00080060, 0x00100020):
        empty.dataset.put(tag, "LO", b"")
    empty.dataset.remove(0x00081030)
    assert not midi.tag_retained(original, empty, 0x00081030)
    assert not midi.tag_retained(original, same, (0x00081140, 5, 0x00081155))
    assert not midi.text_notnull(original, empty, 0x00080060)
    assert not midi.text_retained(original, empty, 0x00081030, "MR")
    assert not midi.text_removed(original, same, 0x00100010, "smitherson")
    with pytest.raises(AssertionError):
        midi.text_removed(original, same, 0x00100010, "nobody")
    assert not midi.date_shifted(original, same, 0x00080020)
    assert not midi.date_shifted(original, empty, 0x00080020)
    same.dataset.put_text(0x0008002A, "20240101000000")  # moved, but the time is another
    assert not midi.date_shifted(original, same, 0x0008002A)
    assert not midi.uid_changed(original, same, 0x00080018)
    assert not midi.patid_consistent([(original, same)])
    assert not midi.patid_consistent([(original, empty)])
    assert not midi.uid_consistent([(original, same), (original, other)], 0x00080018)  # one became two
    assert not midi.uid_consistent([(original, same), (other, same)], 0x00080018)  # two became one
    assert midi.uid_consistent([(original, other), (other, original)], 0x00080018)


def test_checks_of_pixels():
    original, result = instance(), instance()
    corner = (12, 0, 4, 2)
    assert not midi.pixels_hidden(original, result, corner) and midi.pixels_retained(original, result, corner)
    pixels = bytearray(original.dataset.get(PIXELS).value)
    for row in (0, 1):
        pixels[row * 32 + 24:row * 32 + 32] = bytes(8)
    result.dataset.put(PIXELS, "OW", bytes(pixels))
    assert midi.pixels_hidden(original, result, corner) and midi.pixels_retained(original, result, corner)
    assert not midi.pixels_hidden(original, result, (11, 0, 4, 2))
    assert not midi.pixels_retained(original, result) and not midi.pixels_retained(original, result, (0, 0, 4, 2))
