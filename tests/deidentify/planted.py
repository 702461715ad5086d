"""Generated MR instances with a planted identity in every kind of place."""

from __future__ import annotations

from relay_agent.dataset import EXPLICIT, IMPLICIT, PIXELS, Dataset, Encoding
from relay_agent.instance import File

MR = "1.2.840.10008.5.1.4.1.1.4"
ROOT = "1.3.12.2.1107.5.2.19.45152"
NAME, ID, BIRTH, ACCESSION = "SMITHERSON^JONATHAN^PAUL", "MRN-88123450", "19600107", "ACC4711007"
INSTITUTION, PHYSICIAN, OPERATOR = "Saint Example Hospital", "QUACKENBUSH^MARTHA", "TURNBULL^IDA"
SECRETS = ("SMITHERSON", "JONATHAN", "88123450", "19600107", "ACC4711007")  # of the patient
OTHERS = ("QUACKENBUSH", "TURNBULL", "Saint Example")


def patient(data: Dataset, name: str = NAME, patient_id: str = ID, birth: str = BIRTH) -> None:
    data.put_text(0x00100010, name)
    data.put_text(0x00100020, patient_id)
    data.put_text(0x00100030, birth)
    data.put_text(0x00100040, "M")
    data.put_text(0x00101010, "064Y")


def item(data: Dataset, tag: int, **values: str) -> Dataset:
    """Add an item with texts (``_gggg_eeee="..."``) to a sequence."""
    new = data.new_item()
    for place, text in values.items():
        new.put_text(int(place.replace("_", ""), 16), text)
    data.put_items(tag, [*data.items(tag), new])
    return new


def instance(number: int = 1, series: int = 1, patient_id: str = ID, name: str = NAME, encoding: Encoding = EXPLICIT,
             charset: str = "ISO_IR 100") -> File:
    """An MR image of 16 x 8 pixels of 16 bits, read from its bytes."""
    data = Dataset(encoding)
    data.put_text(0x00080005, charset)
    patient(data, name, patient_id)
    for tag, text in {
        0x00080008: "ORIGINAL\\PRIMARY\\M", 0x00080012: "20240131", 0x00080016: MR,
        0x00080018: f"{ROOT}.9.{series}.{number}", 0x00080020: "20240131", 0x00080021: "20240131",
        0x00080023: "20240131", 0x0008002A: "20240131101500.125000+0100",
        0x00080030: "101500", 0x00080031: "102000.5", 0x00080050: ACCESSION, 0x00080060: "MR", 0x00080070: "SIEMENS",
        0x00080080: INSTITUTION, 0x00080081: "1 Example Street, Exampleton", 0x00080090: PHYSICIAN,
        0x00081010: "AWP45152", 0x00081030: "MR Brain SMITHERSON with contrast", 0x0008103E: "t1_mprage_sag_p2_iso_1.0",
        0x00081070: OPERATOR, 0x00101000: "99887766", 0x00101040: "7 Lookout Lane", 0x00104000: "seen by Dr. Who",
        0x00180020: "GR", 0x00181000: "45152", 0x00181030: "tfl 3d1 for Jonathan Smitherson", 0x00181200: "20230501",
        0x0020000D: f"{ROOT}.7", 0x0020000E: f"{ROOT}.8.{series}", 0x00200010: "1", 0x00200052: f"{ROOT}.6",
        0x00204000: "call 030 1234567", 0x00321060: "MRT Schädel Turnbull", 0x00400254: "MR Brain",
    }.items():
        data.put_text(tag, text)
    reference = item(data, 0x00081140, _0008_1150=MR, _0008_1155=f"{ROOT}.9.{series}.1")
    assert len(reference) == 2
    others = item(data, 0x00081115, _0020_000E=f"{ROOT}.8.1")
    item(others, 0x00081199, _0008_1150=MR, _0008_1155=f"{ROOT}.9.1.1")
    request = item(data, 0x00400275, _0040_0007="head of SMITHERSON", _0040_1001="RP-4711", _0040_0009="SPS1")
    item(request, 0x00400008, _0008_0100="MRHEAD", _0008_0102="99X", _0008_0104="MR head J. Smitherson")
    other = item(data, 0x00101002, _0010_0020="OLD-5550123", _0010_0022="TEXT")
    other.put(0x00091001, "UN", b"nested SMITHERSON")
    data.put(0x00190010, "LO", b"SIEMENS MR HEADER")
    data.put(0x0019100C, "IS", b"1000")
    data.put(0x00191008, "CS", b"IMAGE NUM 4")
    data.put(0x00290010, "LO", b"SIEMENS CSA HEADER")
    header = b"SV10\4\3\2\1" + bytes(40) + b"PatientName\0\0SMITHERSON^JONATHAN\0\0" + bytes(range(256))
    data.put(0x00291010, "OB", header)
    data.put(0x00290011, "LO", b"MY VENDOR")
    data.put(0x00291101, "UN", b"88123450")
    for tag, value in ((0x00280010, 8), (0x00280011, 16), (0x00280100, 16)):
        data.put_numbers(tag, "US", value)
    data.put(PIXELS, "OW", bytes(range(256)))
    return reread(File("1.2.840.10008.1.2" if encoding == IMPLICIT else "1.2.840.10008.1.2.1", data))


def reread(file: File) -> File:
    """The file as a receiver reads it."""
    return File.parse(b"".join(bytes(piece) for piece in file.encode()))
