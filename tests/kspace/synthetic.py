"""Siemens raw data that nobody measured: VB, VD and XA-like files with planted identities, whole or with faults."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from tests.harness import PROJECT

REAL = Path(os.environ.get("RELAY_TWIX_CORPUS", PROJECT.parent / "shared/corpora/twix"))

ACQEND, SYNC, LAST = 1, 1 << 5, 1 << 11
BLOCK, FIRST = 512, 10240
FRAME = "1.3.12.2.1107.5.2.43.67890.1.20240229101112131.0.0.0"
PLANNED = tuple(f"1.3.12.2.1107.5.2.43.67890.20240229102{n}1540000011111" for n in range(3))
STUDY_LOID, SERIES_LOID, PATIENT_LOID = "6.0.77712345", "6.0.77712399", "6.0.77712301"
START = 36_900.0  # 10:15:00



def real_file(name: str) -> Path:
    """A file that a scanner wrote; skips where it is not, for such files cannot be given away with the project."""
    if not (REAL / name).exists():
        pytest.skip(f"{name} of a real scanner is not here and may not be part of the project: RELAY_TWIX_CORPUS names "
                    "its folder")
    return REAL / name


@dataclass(frozen=True)
class Person:
    """Identity to plant. All of it must be gone after scrubbing."""

    name: str = "Quellenhofer^Annegret"
    id: str = "PLANTED-4711-A"
    birth: str = "19530417"
    physician: str = "Drossel^Ottokar"
    institution: str = "Klinikum Sankt Planta"
    address: str = "Musterallee 17,Plantahausen,District,DE,12345"
    serial: str = "67890"
    age: str = "70.000000"
    weight: str = "81.646627"
    height: str = "1727.200000"
    sex: int = 2

    def planted(self) -> list[bytes]:
        """What no byte of the result may hold (what numbers say is looked at in their fields)."""
        texts = [self.name, *self.name.split("^"), self.id, self.birth, "1953-04-17", self.physician, "Ottokar",
                 self.institution, self.address, STUDY_LOID, SERIES_LOID, PATIENT_LOID, "77712345", "20240229",
                 FRAME, *PLANNED, self.weight, self.height, f'"{self.serial}"', f".{self.serial}."]
        return [text.encode() for text in texts] + [self.name.upper().encode(), self.name.replace("^", ", ").encode()]


PERSON = Person()


@dataclass(frozen=True)
class Scan:
    """One measurement."""

    uid: int = 358
    readouts: int = 6
    channels: int = 2
    samples: int = 16
    protocol: str = "t1_mprage"
    acqend: bool = True
    finalised: bool = True  # the table tells its length
    syncs: int = 1
    sync: bytes = b"PMU of nobody"
    start: float = START
    seed: int = 1


@dataclass(frozen=True)
class File:
    """A file to be made."""

    scans: tuple[Scan, ...] = (Scan(),)
    family: str = "VE"  # VB, VE, XA
    person: Person = PERSON
    padded: bool = True
    junk: bytes = b"scrap of memory: Quellenhofer"  # in what no program looks at
    more: dict[str, str] = field(default_factory=dict)  # text to add to buffers
    software: str = ""
    baseline: str | None = None

    def but(self, **changes: object) -> File:
        """The same with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


_VERSIONS = {"VB": ("syngo MR B17", "N4_VB17A_LATEST_20090307"), "VE": ("syngo MR E11", "N4_VE11C_LATEST_20160120"),
             "XA": ("syngo MR XA30", "")}


def _param(kind: str, label: str, value: str, lines: bool) -> str:
    if lines:
        return f'      <Param{kind}."{label}"> \n      {{\n        <Visible> "true" \n        {value} \n      }}\n'
    return f'      <Param{kind}."{label}">  {{ {value}  }}\n'


def _xprotocol(name: str, fields: list[tuple[str, str, str]], lines: bool = False) -> str:
    body = "".join(_param(*one, lines) for one in fields)
    return f'<XProtocol> \n{{\n  <Name> "{name}"\n  <ParamMap.""> \n  {{\n    <ParamMap."{name.upper()}"> \n    {{\n' \
           f'{body}    }}\n  }}\n}}\n'


def buffers(made: File, scan: Scan) -> dict[str, str]:
    """The texts of a header."""
    one, quoted = made.person, '"{}"'.format
    software, baseline = _VERSIONS[made.family]
    software, baseline = made.software or software, baseline if made.baseline is None else made.baseline
    exam = "6_0_77712345_20240229_101112_650"
    identity = [("String", "PatientID", quoted(one.id)), ("String", "PatientBirthDay", quoted(one.birth)),
                ("Long", "PatientSex", str(one.sex)), ("String", "tPatientName", quoted(one.name)),
                ("String", "PatientName", quoted(one.name)), ("String", "PatientsName", quoted(one.name)),
                ("String", "PatientLOID", quoted(PATIENT_LOID)), ("String", "StudyLOID", quoted(STUDY_LOID)),
                ("String", "SeriesLOID", quoted(SERIES_LOID)), ("String", "Study", quoted(STUDY_LOID)),
                ("String", "FrameOfReference", quoted(FRAME)), ("String", "ExamMemoryUID", quoted(exam)),
                ("String", "tStudyDescription", quoted("Glioma follow-up")),
                ("String", "tProtocolName", quoted(scan.protocol)), ("Long", "MeasUID", str(scan.uid))]
    dicom = [("String", "SoftwareVersions", quoted(software)), ("String", "Manufacturer", '"SIEMENS"'),
             ("String", "ManufacturersModelName", '"Prisma"'), ("String", "DeviceSerialNumber", quoted(one.serial)),
             ("String", "InstitutionName", quoted(one.institution)), ("String", "Modality", '"MR"'),
             ("String", "InstitutionAddress", quoted(one.address)), ("Double", "flReadoutOSFactor",
              "<Precision> 6  2.000000"), ("Double", "flUsedPatientWeight", f"<Precision> 6  {one.weight}"),
             ("Double", "flPatientAge", f"<Precision> 6  {one.age}"), ("Long", "lPatientSex", str(one.sex)),
             ("Double", "flPatientHeight", f'<Unit> "[mm]" <Precision> 6  {one.height}'),
             ("String", "tPerfPhysiciansName", quoted(one.physician)), ("String", "tPatientName", quoted(one.name)),
             ("String", "tProtocolName", quoted(scan.protocol)), ("String", "tSequenceVariant", '"SP"')]
    meas = [("Long", "iNoOfFourierColumns", str(scan.samples)), ("Long", "iNoOfFourierLines", str(scan.readouts)),
            ("Long", "lFirstFourierLine", "0"), ("Long", "lFirstFourierPartition", "0"),
            ("Long", "iMaxNoOfRxChannels", str(scan.channels)), ("Long", "lFrequency", "123263034")]
    double = '""{}""'.format if made.family == "VB" else quoted
    ascconv = "### ASCCONV BEGIN ###\n" + "".join(f"{label}\t = \t{value}\n" for label, value in [
        ("ulVersion", "51130001"), ("tProtocolName", double(scan.protocol)),
        *((f"tReferenceImage{n}", double(uid)) for n, uid in enumerate(PLANNED)),
        ("alTR[0]", "2300000"), ("sKSpace.lBaseResolution", str(scan.samples // 2)),
        ("sProtConsistencyInfo.tBaselineString", double(baseline))]) + "### ASCCONV END ###\n"
    texts = {"Config": _xprotocol("Config", identity), "Dicom": _xprotocol("Dicom", dicom),
             "Meas": _xprotocol("Meas", [*identity, *dicom, *meas], lines=True) + ascconv, "MeasYaps": ascconv,
             "Phoenix": _xprotocol("Phoenix", []) + ascconv,
             "Spice": _xprotocol("Spice", [("String", "PatientsName", quoted(one.name))])}
    if made.family == "XA":
        registered = " ".join(f'{{ "{value}" }}' for value in (one.name, one.id, one.birth))
        texts["Protocol"] = _xprotocol("Protocol", [("Array", "PatientRegistrationData", registered), (
            "String", "tComment", quoted(f"{one.name.upper()} moved"))])
    for name, text in made.more.items():
        texts[name] = texts.get(name, "") + text
    return texts


def header(made: File, scan: Scan) -> bytes:
    """A header. That of VB is so long that the readers do not take it for a table."""
    texts = buffers(made, scan)
    if made.family == "VB":
        texts["Spice"] += " " * (10_000 - sum(map(len, texts.values())))
    out = b"".join(name.encode() + b"\0" + struct.pack("<I", len(raw := text.encode("utf-8"))) + raw
                   for name, text in texts.items())
    out += made.junk[:29].ljust(29, b"#")
    out += b"#" * (-(len(out) + 8) % 32)
    return struct.pack("<II", len(out) + 8, len(texts)) + out


def _mdh(made: File, scan: Scan, length: int, number: int, mask: int, samples: int, channels: int, line: int) -> bytes:
    ticks = round((scan.start + 0.01 * number) / 0.0025)
    common = struct.pack("<IiIII", length, scan.uid, number, ticks, 0)
    counters = struct.pack("<14H", line, *[0] * 13)
    rest = struct.pack("<4H", 0, 0, samples // 2, 0)
    if made.family == "VB":
        return (common + struct.pack("<QHH", mask, samples, channels) + counters + rest).ljust(128, b"\0")
    return (common + bytes(20) + struct.pack("<QHH", mask, samples, channels) + counters + rest).ljust(192, b"\0")


def readouts(made: File, scan: Scan) -> bytes:
    """All blocks of a measurement."""
    noise = np.random.default_rng(scan.seed)
    vb, out = made.family == "VB", []
    number = 1
    for line in range(scan.readouts):
        if line < scan.syncs:
            payload = scan.sync.ljust(64, b"\0")
            lead = _mdh(made, scan, (128 if vb else 192) + len(payload), number, SYNC, 0, 0, 0)
            out.append(lead + payload)
        signal = noise.normal(size=(scan.channels, 2 * scan.samples)).astype("<f4")
        mask = LAST if line == scan.readouts - 1 else 0
        # The pack bit with a length that is wrong: readers compute it instead.
        length = 0x02000000 | scan.channels * (128 + 8 * scan.samples) if vb else 192 + scan.channels * (
            32 + 8 * scan.samples)
        mdh = _mdh(made, scan, length, number, mask, scan.samples, scan.channels, line)
        if vb:
            out += [mdh[:124] + struct.pack("<H", channel) + mdh[126:] + signal[channel].tobytes()
                    for channel in range(scan.channels)]
        else:
            out.append(mdh)
            out += [struct.pack("<I", 32 + 8 * scan.samples).ljust(32, b"\0") + signal[channel].tobytes()
                    for channel in range(scan.channels)]
        number += 1
    if scan.acqend:
        length = 128 + 256 if vb else 192 + 160
        out.append(_mdh(made, scan, length, number, ACQEND, 16, scan.channels, 0).ljust(length, b"\0"))
    return b"".join(out)


def build(made: File) -> bytes:
    """The whole file."""
    if made.family == "VB":
        (scan,) = made.scans
        return header(made, scan) + readouts(made, scan)
    out = bytearray(FIRST)
    struct.pack_into("<II", out, 0, 0, len(made.scans))
    for number, scan in enumerate(made.scans):
        offset = len(out)
        out += header(made, scan) + readouts(made, scan)
        struct.pack_into("<iIQQ64s64s", out, 8 + 152 * number, scan.uid, 117_000 + number, offset,
                         len(out) - offset if scan.finalised else 0, made.person.name.encode() + b"\0" + made.junk,
                         scan.protocol.encode())
        if made.padded or number < len(made.scans) - 1:
            out += (made.junk * 20)[:-len(out) % BLOCK]
    out[9736 - 60:9736 - 60 + len(made.junk)] = made.junk  # unused entries of the table
    return bytes(out)


def parts(made: File) -> list[tuple[int, int]]:
    """Where the readouts of each measurement begin and end."""
    found, at = [], 0 if made.family == "VB" else FIRST
    for scan in made.scans:
        begin = at + len(header(made, scan))
        found.append((begin, begin + len(readouts(made, scan))))
        at = found[-1][1] + -found[-1][1] % BLOCK
    return found


def written(folder: Path, content: bytes) -> Path:
    """The file that holds it."""
    path = folder / "meas.dat"
    path.write_bytes(content)
    return path


ADJUSTMENT = Scan(uid=357, readouts=3, protocol="AdjCoilSens", seed=3)
FAMILIES = {"VB": File(family="VB"), "VE": File(), "XA": File(family="XA"), "several": File(scans=(ADJUSTMENT, Scan()))}
