"""Which objects are held: every kind by the header that gives it away, and none for plain images."""

import pytest
from pydicom.data import get_testdata_file

from relay_agent.dataset import EXPLICIT, PIXELS, Dataset
from relay_agent.deidentify.risk import Kind, Risk, risks
from relay_agent.image import EXPLICIT_LITTLE
from relay_agent.instance import File

MR = "1.2.840.10008.5.1.4.1.1.4"
STORAGE = "1.2.840.10008.5.1.4.1.1."


def header(sop_class: str = MR, modality: str = "MR", pixels: bool = True, **text: str) -> Dataset:
    data = Dataset(EXPLICIT)
    data.put_text(0x00080016, sop_class)
    data.put_text(0x00080060, modality)
    for tag, value in text.items():
        data.put_text(int(tag[1:], 16), value)
    if pixels:
        data.put(PIXELS, "OW", bytes(32))
    return data


def kinds(data: Dataset, transfer_syntax: str = EXPLICIT_LITTLE, **more) -> set[str]:
    return {risk.kind.value for risk in risks(data, transfer_syntax, **more)}


@pytest.mark.parametrize(("sop_class", "modality"), [
    (MR, "MR"), (f"{STORAGE}2", "CT"), (f"{STORAGE}2.1", "CT"), (f"{STORAGE}4.1", "MR"), (f"{STORAGE}128", "PT"),
    (f"{STORAGE}20", "NM"), (f"{STORAGE}1.1", "DX"), (f"{STORAGE}66", "MR"), (f"{STORAGE}481.2", "RTDOSE"),
    (f"{STORAGE}66.4", "SEG")])
def test_plain_objects_have_none(sop_class, modality):
    assert not kinds(header(sop_class, modality, _00080008="DERIVED\\SECONDARY\\MPR", _0008103E="T1 low dose"))


@pytest.mark.parametrize(("expected", "sop_class", "modality"), [
    ({"secondary-capture"}, f"{STORAGE}7", "MR"), ({"secondary-capture"}, f"{STORAGE}7.4", "OT"),
    ({"secondary-capture"}, "1.2.840.10008.5.1.1.30", "HC"),
    ({"ultrasound"}, f"{STORAGE}6.1", "US"), ({"ultrasound"}, f"{STORAGE}3.1", "US"), ({"ultrasound"}, MR, "IVUS"),
    ({"photograph"}, f"{STORAGE}77.1.4", "XC"), ({"photograph"}, f"{STORAGE}77.1.5.1", "OP"),
    ({"photograph", "video"}, f"{STORAGE}77.1.1.1", "ES"),
    ({"encapsulated-document"}, f"{STORAGE}104.1", "DOC"), ({"encapsulated-document"}, f"{STORAGE}104.3", "M3D"),
    ({"structured-report"}, f"{STORAGE}88.11", "SR"), ({"structured-report"}, f"{STORAGE}88.59", "KO"),
    ({"structured-report", "dose-report"}, f"{STORAGE}88.67", "SR"), ({"audio"}, f"{STORAGE}9.4.1", "AU"),
    ({"private-class"}, "1.3.12.2.1107.5.9.1", "MR"), ({"private-class"}, "", "MR"),
    ({"burned-in-unknown"}, f"{STORAGE}2", "OT"), ({"burned-in-unknown"}, MR, "")])
def test_classes_and_modalities(expected, sop_class, modality):
    assert kinds(header(sop_class, modality)) == expected


@pytest.mark.parametrize(("expected", "tag", "value"), [
    ("burned-in", "_00280301", "YES"), ("burned-in", "_00280301", "yes "), ("burned-in", "_00280301", "MAYBE"),
    ("recognizable-face", "_00280302", "YES"), ("screen-save", "_00080008", "DERIVED\\SECONDARY\\SCREEN SAVE"),
    ("dose-report", "_00080008", "DERIVED\\SECONDARY\\OTHER\\CT_SOM5 PROT"),
    ("dose-report", "_0008103E", "Dose Report"),
    ("dose-report", "_0008103E", "PATIENT_PROTOCOL"), ("secondary-capture", "_00080064", "WSD")])
def test_what_the_header_says(expected, tag, value):
    assert kinds(header(**{tag: value})) == {expected}


def test_slide_labels_and_videos():
    assert kinds(header(f"{STORAGE}77.1.6", "SM", _00080008="ORIGINAL\\PRIMARY\\LABEL\\NONE")) == {
        "photograph", "slide-label"}
    for syntax in ("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102.1", "1.2.840.10008.1.2.4.108"):
        assert kinds(header(), syntax) == {"video"}
    assert not kinds(header(), "1.2.840.10008.1.2.4.90")


def test_graphics():
    data = header()
    data.put(0x60003000, "OW", bytes(64))
    data.put_numbers(0x60000100, "US", 1)
    assert not kinds(data)  # nothing is drawn
    data.put(0x60023000, "OW", bytes(63) + b"\1")
    assert kinds(data) == {"overlay"}
    data = header()
    data.put_numbers(0x60000100, "US", 16)  # in unused bits of the pixels
    assert kinds(data) == {"overlay"}
    data = header()
    data.put(0x50003000, "OW", b"\1\0")
    assert kinds(data) == {"curve"}
    data = header(f"{STORAGE}11.1", "PR", pixels=False)
    assert not kinds(data)
    data.put_items(0x00700001, [data.new_item()])
    assert kinds(data) == {"annotation"}
    data = header(pixels=False)
    data.put(0x00420011, "OB", b"%PDF")
    assert kinds(data) == {"encapsulated-document"}
    data = header(pixels=False)
    data.put_items(0x0040A730, [data.new_item()])
    assert kinds(data) == {"structured-report"}


def test_a_script_takes_nothing_away_by_renaming():
    received = header(_00080008="DERIVED\\SECONDARY\\SCREEN SAVE", _00280301="YES", _00280302="YES")
    before = risks(received, EXPLICIT_LITTLE)
    result = header(_00280301="NO")
    assert not kinds(result)
    assert kinds(result, before=before) == {"screen-save", "burned-in", "recognizable-face"}
    assert kinds(result, before=before, painted=True) == {"recognizable-face"}
    result.remove(0x00280301)
    assert kinds(result, before=before, painted=True) == {"screen-save", "burned-in", "recognizable-face"}
    assert not kinds(header(pixels=False), before=before)
    overlay = [Risk(Kind.OVERLAY, "")]
    assert not kinds(header(), before=overlay)  # graphics are gone when the script has removed them


def test_painted_ultrasound_passes_only_with_the_word_no():
    assert not kinds(header(f"{STORAGE}6.1", "US", _00280301="NO"), painted=True)
    assert kinds(header(f"{STORAGE}6.1", "US"), painted=True) == {"ultrasound"}
    assert kinds(header(f"{STORAGE}6.1", "US", _00280301="NO")) == {"ultrasound"}
    assert kinds(header(f"{STORAGE}77.1.4", "XC", _00280301="NO"), painted=True) == {"photograph"}


def test_each_kind_is_found_once_and_in_order():
    found = risks(header(f"{STORAGE}7", "US", _00280301="YES"), EXPLICIT_LITTLE)
    assert [risk.kind for risk in found] == [Kind.BURNED_IN, Kind.SECONDARY_CAPTURE, Kind.ULTRASOUND]


def test_reasons_hold_no_values():
    data = header(f"{STORAGE}7", "US", _00280301="DOE", _0008103E="Dose report of DOE", _00080008="SCREEN\\DOE")
    found = risks(data, EXPLICIT_LITTLE)
    assert len(found) == 5 and not any("DOE" in risk.reason for risk in found)
    assert len({risk.reason for risk in found}) == 5 and all(risk.reason for risk in found)


@pytest.mark.parametrize(("name", "expected"), [
    ("CT_small.dcm", set()), ("MR_small.dcm", set()), ("examples_overlay.dcm", {"overlay"}),
    ("SC_rgb.dcm", {"secondary-capture"}), ("US1_UNCR.dcm", {"ultrasound"}), ("test-SR.dcm", {"structured-report"})])
def test_real_objects(name, expected):
    with open(get_testdata_file(name, download=False), "rb") as file:
        instance = File.parse(file.read())
    assert kinds(instance.dataset, instance.transfer_syntax) == expected
