"""What is searched in every result: planted identifiers are found wherever they stand, and nothing else is."""

from __future__ import annotations

import time
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent.dataset import EXPLICIT, IMPLICIT, PIXELS, Dataset, scan
from relay_agent.deidentify import residue
from tests.deidentify import planted
from tests.deidentify.planted import item, reread

NAME, ID, BIRTH = "Smitherson^Jon-Paul^Lee", "MRN-0088123", "19600107"


def original(name: str = NAME, patient_id: str = ID, birth: str = BIRTH, charset: str = "ISO_IR 192", **values: str
             ) -> Dataset:
    data = Dataset()
    data.put_text(0x00080005, charset)
    planted.patient(data, name, patient_id, birth)
    for place, text in values.items():
        data.put_text(int(place.replace("_", ""), 16), text)
    return data


def result(tag: int = 0, vr: str = "LO", value: str | bytes = b"", charset: str = "ISO_IR 192") -> Dataset:
    """A clean data set, with one value in it."""
    data = Dataset()
    data.put_text(0x00080005, charset)
    data.put_text(0x00080060, "MR")
    if tag:
        data.put(tag, vr, value if isinstance(value, bytes) else value.encode())
    return data


def found(before: Dataset, after: Dataset, **more: object) -> list[tuple[str, int]]:
    kept = more.pop("kept", ())
    return [(one.path, one.source) for one in residue.search(after, residue.identifiers(before, **more), kept)]


# ------------------------------------------------------------------------------------------------ found


@pytest.mark.parametrize("text, source", [
    ("SMITHERSON", 0x00100010), ("head of smitherson, 2nd", 0x00100010), ("SMITHERSON_JON_T1", 0x00100010),
    ("SmithersonJon-Paul", 0x00100010), ("JONPAUL", 0x00100010), ("Paul", 0x00100010), ("x-lee.nii", 0x00100010),
    ("MRN-0088123", 0x00100020), ("mrn 0088123", 0x00100020), ("MRN0088123", 0x00100020), ("id0088123", 0x00100020),
    ("19600107", 0x00100030), ("07.01.1960", 0x00100030), ("1960-01-07", 0x00100030), ("01/07/1960", 0x00100030),
    ("7.1.1960", 0x00100030), ("7. Januar 1960", 0x00100030), ("Jan 7, 1960", 0x00100030), ("07-JAN-1960", 0x00100030),
    ("07.01.60", 0x00100030), ("1960.01.07", 0x00100030), ("born 07011960", 0x00100030),
    ("19600107143000", 0x00100030)])
@pytest.mark.parametrize("tag, vr", [(0x0008103E, "LO"), (0x00204000, "LT"), (0x00091001, "UN"), (0x00091001, "OB")])
def test_forms(text, source, tag, vr):
    too_short = vr == "OB" and text == "x-lee.nii"  # three letters are anywhere in binary values
    assert found(original(), result(tag, vr, text)) == ([] if too_short else [(residue.path_text((), tag), source)])


@pytest.mark.slow
@settings(max_examples=200)
@given(
    secret=st.sampled_from(["SMITHERSON", "smitherson", "0088123", "MRN-0088123", "07.01.1960", "19600107"]),
    around=st.tuples(*[st.text("-_ .:;()[]\0\n#", max_size=6)] * 2),
    place=st.sampled_from([
        (0x0008103E, "LO"), (0x00204000, "LT"), (0x00091001, "UN"), (0x00091001, "OB"), (0x00420011, "OB"),
        (0x00091001, "OW"), (0x0040A160, "UT"), (0x00081010, "SH"), (0x00080070, "LO"), (0x00091001, "PN"),
        (0x00080104, "UC"), (0x00081190, "UR"), (0x00700002, "CS")]),
    depth=st.integers(0, 3), encoding=st.sampled_from([EXPLICIT, IMPLICIT]))
def test_a_planted_identifier_is_found_anywhere(secret, around, place, depth, encoding):
    data = top = Dataset(encoding)
    for level in range(depth):
        data = item(data, 0x00400275 + level * 0x1000, _0008_0100="A")
    data.put(place[0], place[1], secret.join(around).encode())
    assert len(found(original(), top)) == 1


def test_paths_and_words():
    data = result()
    inner = item(data, 0x00400275, _0008_0100="A")
    inner = item(item(data, 0x00400275, _0008_0100="B"), 0x00400008, _0008_0104="of Smitherson")
    assert len(inner) == 1
    (one,) = residue.search(data, residue.identifiers(original()))
    assert (one.path, one.tag, one.source) == ("(0040,0275)[1]/(0040,0008)[0]/(0008,0104)", 0x00080104, 0x00100010)
    assert "smitherson" not in f"{one} {one!r}".casefold()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "latin-1"])
def test_binary_values(encoding):
    secret = "Müllersön".encode(encoding)
    before = original("Müllersön^Ute", charset="ISO_IR 100")
    assert found(before, result(0x00091001, "OB", b"\1\2\3\0" + secret + b"\0\xff\xfe"))
    assert found(before, result(0x00091001, "OB", b"\1\2\3\0" + b"nobody knows" + b"\0\xff\xfe")) == []


def test_limits_of_what_is_looked_at():
    large = b"SMITHERSON" + bytes(residue.BINARY_LIMIT)
    assert found(original(), result(PIXELS, "OW", b"SMITHERSON")) == []
    assert found(original(), result(0x00091001, "OB", large)) == []
    assert len(found(original(), result(0x00420011, "OB", large))) == 1
    assert len(found(original(), result(0x00091001, "UT", large))) == 1


@pytest.mark.parametrize("name, text", [
    ("Müller^Änne", "MULLER"), ("Müller^Änne", "mueller"), ("Müller^Änne", "herr müller"), ("Groß^Åse", "GROSS"),
    ("Núñez^José", "nunez"), ("van der Berg^Ida", "VANDERBERG"), ("van der Berg^Ida", "Berg"),
    ("O'Neill^Tim", "ONEILL"),
    ("Li^Wei-Ling", "LI WEI-LING"), ("Yamada^Tarou=山田^太郎=やまだ^たろう", "山田先生"),
    ("Hong^Gildong=洪^吉洞", "洪吉洞"),
    ("Hong^Gildong=洪^吉洞", "吉洞")])
def test_names_of_the_world(name, text):
    assert found(original(name), result(0x0008103E, "LO", text)) == [("(0008,103e)", 0x00100010)]
    assert found(original(name), result(0x0008103E, "LO", "T1 schnell, ぶ")) == []


def test_iso_2022():
    before = original("Yamada^Tarou=山田^太郎=やまだ^たろう", charset="\\ISO 2022 IR 87")
    stored = before.get(0x00100010).value
    assert b"\x1b" in stored
    assert found(before, result(0x00091001, "UN", b"\1\2\3" + stored.split(b"=")[1]))
    assert found(before, result(0x0008103E, "LO", stored.split(b"=")[1].replace(b"^", b" "), "\\ISO 2022 IR 87"))
    other = original("別の^人", charset="\\ISO 2022 IR 87").get(0x00100010).value
    assert found(before, result(0x0008103E, "LO", other, "\\ISO 2022 IR 87")) == []


def test_undecodable_text_is_residue():
    after = result(0x0008103E, "LO", b"Sch\xe4del")
    assert found(original(), after) == [("(0008,103e)", 0)]
    (one,) = residue.search(after, residue.identifiers(original()))
    assert "cannot be decoded" in str(one)
    unreadable = original()
    unreadable.put(0x00100010, "PN", b"M\xfcllers^X")
    assert found(unreadable, result(0x00091001, "UN", b"a M\xfcllers \1"))[0][1] == 0x00100010


def test_identifiers_of_items_and_further_tags():
    before = original(_0008_0080="Saint Example Hospital", _0008_0050="ACC-777001")
    item(before, 0x00101002, _0010_0020="OLD5550123")
    assert found(before, result(0x0008103E, "LO", "OLD 5550123"))
    assert found(before, result(0x0008103E, "LO", "acc777001")) == [("(0008,103e)", 0x00080050)]
    text = result(0x0008103E, "LO", "at Saint-Example Hospital")
    assert found(before, text) == []
    assert found(before, text, extra_tags=[0x00080080]) == [("(0008,103e)", 0x00080080)]


# ------------------------------------------------------------------------------------------------ not found


@pytest.mark.parametrize("name, text", [
    ("Ng^Al", "angle long ng"), ("Ann^Philip", "planning cannot Philips Annotation"),
    ("Anonymous", "Anonymous anonymous"),
    ("Phantom^Test", "Phantom test MR"), ("^^^Dr^Jr", "Dr jr"), ("van der^", "van der"), ("洪", "洪水"),
    ("", "anything")])
def test_names_that_say_nothing(name, text):
    assert found(original(name), result(0x0008103E, "LO", text)) == []


@pytest.mark.parametrize("patient_id, vr, text", [
    ("1", "LO", "1"), ("M", "CS", "M"), ("12", "SH", "12"), ("1234", "LO", "b 1234 t"), ("1234", "DS", "1234"),
    ("12840", "UI", "1.2.840.10008.1.2"), ("12840", "LO", "b=1 2 8.40"), ("12345", "DS", "12345"),
    ("12345", "TM", "12345"),
    ("20240131", "DA", "20240131"), ("20240131", "DT", "20240131101500"), ("A20240131", "DA", "20240131"),
    ("12345", "LO", "3123456"),
    ("ANONYMOUS", "LO", "ANONYMOUS"), ("0000", "LO", "0000")])
def test_numbers_that_say_nothing(patient_id, vr, text):
    assert found(original("", patient_id, ""), result(0x0018103F, vr, text)) == []


@pytest.mark.parametrize("patient_id, vr, text", [
    ("1234", "LO", "1234"), ("A-12", "SH", "x\\a12"), ("12840", "UI", "1.3.12840.7"), ("12345678", "DS", "12345678"),
    ("12345", "LO", "3-12345"), ("00012345", "LO", "12345"), ("12345", "LO", "00012345"),
    ("12-34.56", "LO", "12.34-56")])
def test_numbers_that_do(patient_id, vr, text):
    assert len(found(original("", patient_id, ""), result(0x0018103F, vr, text))) == 1


@pytest.mark.parametrize("birth, text", [("19000101", "19000101"), ("00010101", "00010101"), ("1960", "1960"),
    ("", "")])
def test_dates_that_say_nothing(birth, text):
    assert found(original("", "", birth), result(0x0018103F, "LO", text)) == []


def test_labels_of_the_project():
    before = original(patient_id="SUBJ001", name="Smitherson")
    after = result(0x00100020, "LO", "SUBJ001")
    assert len(found(before, after)) == 1
    assert found(before, after, allowed=["SUBJ001"]) == []
    assert found(before, result(0x0008103E, "LO", "P1_SUBJ001_MR1"), allowed=["SUBJ001"]) == []
    assert found(before, result(0x0008103E, "LO", "smitherson SUBJ001"), allowed=["SUBJ001"])
    short = original(patient_id="S01")
    assert found(short, result(0x00100020, "LO", "S01"))
    assert not found(short, result(0x00100020, "LO", "S01"), allowed=["S01"])


def test_terms():
    assert found(original("Perfusion^Head"), result(0x00080008, "CS", "DERIVED\\PERFUSION")) == []
    assert found(original("Perfusion^Head"), result(0x00080008, "CS", "DERIVED\\PERFUSION_HEAD"))
    assert found(original("Perfusion^Head"), result(0x0008103E, "LO", "perfusion"))


def test_a_sequence_of_undefined_length_that_was_changed():
    """Its element still knows the bytes that it was read from; what is written is its items."""
    inner = b"\x08\0\x04\1\x0a\0\0\0SMITHERSON"
    raw = (b"\x09\0\x01\x10UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0" + len(inner).to_bytes(4, "little") + inner
           + b"\xfe\xff\xdd\xe0\0\0\0\0")
    data = Dataset(EXPLICIT, buffer=raw)
    scan(data, 0, len(raw))
    assert found(original(), data) == [("(0009,1001)[0]/(0008,0104)", 0x00100010)]
    data.items(0x00091001)[0].remove(0x00080104)
    assert found(original(), data) == []


def test_kept_tags():
    both = original(patient_id="12345", _0008_0050="12345")
    assert found(both, result(0x0008103E, "LO", "12345"), kept=[0x00080050]) == [("(0008,103e)", 0x00100020)]
    assert found(both, result(0x0008103E, "LO", "12345"), kept=[0x00100020]) == [("(0008,103e)", 0x00080050)]
    after = result(0x00100030, "DA", BIRTH)
    after.put_text(0x00080020, BIRTH)
    assert len(found(original(), after)) == 2
    assert found(original(), after, kept=[0x00100030]) == []
    assert found(original(), result(0x00091001, "LO", "Smitherson"), kept=[0x00091001]) == []


# ------------------------------------------------------------------------------------------------ texts without


@pytest.mark.parametrize("text, left", [
    ("MR Brain of SMITHERSON, 07.01.1960", "MR Brain of ,"), ("T1 mprage", "T1 mprage"), ("Smitherson", ""),
    ("é Smitherson é", "é é")])
def test_cut_out(text, left):
    assert residue.identifiers(original()).without(text) == left


def test_cutting_out_is_refused_when_it_is_not_certain():
    assert residue.identifiers(original(patient_id="123")).without("no 123") is None
    assert residue.identifiers(original()).without("ﬁne Smitherson") is None  # the ligature has another length


# ------------------------------------------------------------------------------------------------ robustness, speed


@settings(max_examples=100)
@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=12), st.binary(max_size=200),
       st.sampled_from(["LO", "UN", "OB", "PN", "UI", "DS"]))
def test_any_identity_and_any_value(name, patient_id, birth, value, vr):
    before = Dataset()
    before.put_text(0x00080005, "ISO_IR 192")
    for tag, kind, text in ((0x00100010, "PN", name), (0x00100020, "LO", patient_id), (0x00100030, "DA", birth)):
        before.put(tag, kind, text.encode())
    residue.search(result(0x00091001, vr, value), residue.identifiers(before, (), [patient_id]))


def test_speed():
    """0.2 ms of a core for 150 elements; here ten times as much, since other things take its cache as well."""
    data = planted.instance().dataset
    for number in range(150 - len(data)):
        data.put_text(0x00189100 + number, f"some value {number}", "LO")
    data = reread(planted.File("1.2.840.10008.1.2.1", data)).dataset
    other = residue.identifiers(original("Featherstone^Beatrice", "ZZ-7700881", "19550505", _0008_0050="Q99120077"))
    assert residue.search(data, other) == []
    taken = timeit.repeat(lambda: residue.search(data, other), number=20, repeat=5, timer=time.thread_time)
    assert min(taken) / 20 < 0.002
