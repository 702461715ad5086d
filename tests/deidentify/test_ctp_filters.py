"""CTP's filters and pixel scripts."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType

import pytest

from relay_agent.dataset import Dataset
from relay_agent.deidentify import ctp
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File


def made() -> File:
    data = Dataset()
    for tag, text in ((0x00080008, "ORIGINAL\\PRIMARY"), (0x00080060, "MR"), (0x00081030, "Brain Study"),
                      (0x00100010, "Secret^Name")):
        data.put_text(tag, text)
    data.put_numbers(0x00280010, "US", 10)
    data.put_numbers(0x00280011, "US", 20)
    data.put(0x7FE00010, "OW", bytes(400))
    return File("1.2.840.10008.1.2.1", data)


@pytest.mark.parametrize(("text", "want"), [
    ('Modality.equals("MR")', True), ('Modality.equalsIgnoreCase("mr")', True), ('!Modality.equals("MR")', False),
    ('false. + true. * true.', True), ('(true. + false.) * false.', False), ('true. + false. * false.', True),
    ('!(false. + false.)', True), ('!false. * !false.', True), ('PatientID.equals("")', True),
    ('[0008,0060].startsWith("M") // "CT"\n* StudyDescription.endsWithIgnoreCase("STUDY")', True),
    ('StudyDescription.containsIgnoreCase("BRAIN")', True), ('StudyDescription.matches("(?i)brain\\s.*")', True),
    ('Rows.isGreaterThan("9") * Rows.isLessThan("11")', True), ('ImageType.equals("ORIGINAL\\PRIMARY")', True),
])
def test_filters(text: str, want: bool) -> None:
    assert ctp.parse_filter(text, "f").matches(made().dataset) is want


@pytest.mark.parametrize(("text", "message"), [
    ('Modality.equals("MR")\n  & true.', "line 2, column 3: * (and), + (or) or the end"),
    ('(true. * true.', "line 1, column 15: ) is expected"),
    ('true.\n* Modality.is("a")', "line 2, column 12: CTP knows"),
    ("", "line 1, column 1: an element"), ("Modality", "column 9: .equals"),
    ('zz.b', "CTP does not know an element zz"),
    ('Modality.matches("[")', "expression"), ('!!true.', "column 2: !!"),
    ("(" * 500 + "true.", "nested deeper"),
    ('this.equals("a")', "outermost level"), ('SeriesNumber.isLessThan("99999999999")', "too large"),
])
def test_errors_of_filters_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(ScriptError) as error:
        ctp.parse_filter(text, "f")
    assert message in str(error.value)


def test_an_object_for_which_it_is_false_is_rejected() -> None:
    context = Context(UIDs(b"k", "P"))
    ctp.parse_filter("true.", "site.filter").apply(made(), context)
    assert context.rule == "site.filter"
    with pytest.raises(Rejected, match=r"site\.filter"):
        ctp.parse_filter('Modality.equals("CT")', "site.filter").apply(made(), context)


def test_what_cannot_be_told_fails_without_the_value() -> None:
    file = made()
    file.dataset.put(0x00080005, "CS", b"ISO_IR 192")
    file.dataset.put(0x00100010, "PN", b"Secret\xff")
    with pytest.raises(Failed, match=r"^site.filter: \(0010,0010\) is no text in its character set$"):
        ctp.parse_filter('true. + PatientName.contains("x")', "site.filter").apply(file, Context(UIDs(b"k", "P")))


def test_comparisons_of_digits_are_pointed_out() -> None:
    assert [finding.line for finding in ctp.parse_filter('true. +\nRows.isLessThan("1")', "f").findings()] == [2]
    assert ctp.parse_filter("true.", "f").touches() == set()


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int, int, int]]]:
    calls: list[list[tuple[int, int, int, int]]] = []
    module = ModuleType("relay_agent.deidentify.pixels")
    module.paint = lambda file, rectangles, value=0: calls.append(list(rectangles))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "relay_agent.deidentify.pixels", module)
    return calls


SIGNATURES = """A library of regions (from many sites, 2 of 3), see http://example.org
*** CT ***
Dose (all) { Modality.equals("CT") } (0,0,1,1)
 MR 512 x 512 - screen
{ Modality.equals("MR") * // magnetic
  Rows.isGreaterThan("5") }
(2, 3, 4, 5)(-5,-4,90,2) // two
{ true. } (0,0,9,9)
"""


def test_the_first_signature_paints(painted: list[list[tuple[int, int, int, int]]]) -> None:
    context = Context(UIDs(b"k", "P"))
    script = pickle.loads(pickle.dumps(ctp.parse_pixels(SIGNATURES, "site.pixels")))
    script.apply(made(), context)
    assert painted == [[(2, 3, 7, 9), (15, 6, 20, 9)]]
    assert context.rule == "site.pixels line 5"
    assert script.touches() == {0x7FE00010}


def test_no_signature_and_no_pixels_change_nothing(painted: list[list[tuple[int, int, int, int]]]) -> None:
    context = Context(UIDs(b"k", "P"))
    ctp.parse_pixels('{ Modality.equals("CT") } (0,0,1,1)', "p").apply(made(), context)
    file = made()
    file.dataset.remove(0x7FE00010)
    ctp.parse_pixels("{ true. } (0,0,1,1)", "p").apply(file, context)
    file = made()
    script = ctp.parse_pixels("{ true. }", "p")
    script.apply(file, context)
    assert painted == []
    assert "never painted" in script.findings()[0].text


def test_an_image_without_size_fails(painted: list[list[tuple[int, int, int, int]]]) -> None:
    file = made()
    file.dataset.remove(0x00280010)
    with pytest.raises(Failed, match="p line 1: the image has no rows"):
        ctp.parse_pixels("{ true. } (0,0,1,1)", "p").apply(file, Context(UIDs(b"k", "P")))
    assert painted == []


def test_float_pixels_fail(painted: list[list[tuple[int, int, int, int]]]) -> None:
    file = made()
    file.dataset.remove(0x7FE00010)
    file.dataset.put(0x7FE00008, "OF", bytes(800))
    with pytest.raises(Failed, match="type float"):
        ctp.parse_pixels("{ true. } (0,0,1,1)", "p").apply(file, Context(UIDs(b"k", "P")))
    assert painted == []


@pytest.mark.parametrize(("text", "message"), [
    ("", "no signature"), ("{ true. } (0,0,1)", "line 1, column 11: a region"), ("(0,0,1,1)", "has no signature"),
    ("(0,0,1,1) { true. }", "{ filter } is expected before"), ("\n{ true. * }", "line 2, column 11: an element"),
    ("{ true. } (0,0,51O,9)", "a region is expected"), ("{ true. } (0,0,9,9", "a region is expected"),
    ("{ true. } { true.", "column 11: a region is expected"),
])
def test_errors_of_pixel_scripts(text: str, message: str) -> None:
    with pytest.raises(ScriptError) as error:
        ctp.parse_pixels(text, "p")
    assert message in str(error.value)
