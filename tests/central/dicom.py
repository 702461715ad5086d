"""The few things the stand-in must know about a DICOM object: header values, file name, site script."""

from __future__ import annotations

import io
from dataclasses import dataclass

from pydicom import dcmread
from pydicom.tag import Tag

# One pass over the header collects these; nothing else is decoded.
TAGS = {
    "study_uid": 0x0020000D,
    "series_uid": 0x0020000E,
    "sop_uid": 0x00080018,
    "sop_class": 0x00080016,
    "series_number": 0x00200011,
    "instance_number": 0x00200013,
    "modality": 0x00080060,
    "series_description": 0x0008103E,
    "study_description": 0x00081030,
    "accession": 0x00080050,
    "patient_name": 0x00100010,
    "patient_id": 0x00100020,
    "patient_comments": 0x00104000,
    "study_comments": 0x00324000,
    "additional_history": 0x001021B0,
    "study_date": 0x00080020,
    "study_time": 0x00080030,
}
WANTED = [Tag(tag) for tag in TAGS.values()]


class NotDicom(ValueError):
    """The bytes are not a DICOM object XNAT could file."""


@dataclass(slots=True, frozen=True)
class Header:
    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    sop_class: str = ""
    series_number: str = ""
    instance_number: str = ""
    modality: str = ""
    series_description: str = ""
    study_description: str = ""
    accession: str = ""
    patient_name: str = ""
    patient_id: str = ""
    patient_comments: str = ""
    study_comments: str = ""
    additional_history: str = ""
    study_date: str = ""
    study_time: str = ""


def read_header(data: bytes) -> Header:
    try:
        dataset = dcmread(io.BytesIO(data), stop_before_pixels=True, force=True, specific_tags=list(WANTED))
        values = {
            name: str(dataset[tag].value or "").strip() if tag in dataset else ""
            for name, tag in TAGS.items()
        }
    except Exception as error:  # pydicom raises almost anything on bytes that are not DICOM
        raise NotDicom(str(error)) from error
    header = Header(**values)
    if not (header.sop_uid and header.sop_class):
        raise NotDicom("no SOP class or instance UID")
    return header


def java_hash(value: str) -> int:
    """String.hashCode() as an unsigned 32-bit number."""
    units = value.encode("utf-16-be")
    result = 0
    for high, low in zip(units[::2], units[1::2], strict=True):
        result = (31 * result + (high << 8 | low)) & 0xFFFFFFFF
    return result


def base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def template_name(header: Header) -> str:
    """XNAT's default file name: study UID, series and instance number, hash of the two SOP UIDs.

    The hash is that of a Java list of the SOP class and the SOP instance UID, as 32 unsigned bits in
    base 36, so that the names are the very ones XNAT gives.
    """
    digest = (961 + 31 * java_hash(header.sop_class) + java_hash(header.sop_uid)) & 0xFFFFFFFF
    study = header.study_uid or "no-value-for-StudyInstanceUID"
    series = header.series_number or "no-value-for-SeriesNumber"
    instance = header.instance_number or "no-value-for-InstanceNumber"
    return f"{study}-{series}-{instance}-{base36(digest)}.dcm"


def apply_site_script(data: bytes, project: str, subject: str, session: str) -> bytes:
    """What XNAT's default site script does: project, subject and session over three header fields."""
    dataset = dcmread(io.BytesIO(data), force=True)
    if project != "Unassigned":
        dataset.StudyDescription = project
    dataset.PatientName = subject
    dataset.PatientID = session
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()
