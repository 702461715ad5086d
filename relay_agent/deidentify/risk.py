"""What may show or say who the patient is where no script can look: in pixels, documents, graphics and free text.

The rule for a shipment: whatever :func:`risks` finds holds it for a person, unless the route lets that kind pass
(``pixel_risks_allowed``). Nothing is recognised in the pixels themselves; the header says which objects may carry text
(as in Duke's study, 10.1007/s10278-024-01098-7, where that left 10 of 12,578 images with text).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from relay_agent.charset import Undecodable
from relay_agent.dataset import PIXELS, Dataset


class Kind(StrEnum):
    """Kinds of risk, by the words that a route's ``pixel_risks_allowed`` holds."""

    BURNED_IN = "burned-in"                          # (0028,0301) says so, or anything other than NO
    BURNED_IN_UNKNOWN = "burned-in-unknown"          # (0028,0301) is silent and the modality often burns text in
    SECONDARY_CAPTURE = "secondary-capture"          # pictures of screens, films and paper; film printed or digitised
    SCREEN_SAVE = "screen-save"                      # those that say so in Image Type
    DOSE_REPORT = "dose-report"                      # dose and protocol pages; as a structured report it is that, too
    ULTRASOUND = "ultrasound"                        # scanners write the name above the image
    PHOTOGRAPH = "photograph"                        # visible light: endoscopy, skin, eye, microscopy, faces
    SLIDE_LABEL = "slide-label"                      # the label or overview of a microscope slide
    VIDEO = "video"                                  # moving pictures, with sound at times
    FACE = "recognizable-face"                       # (0028,0302) Recognizable Visual Features says so
    OVERLAY = "overlay"                              # graphics in groups 60xx, in (60xx,3000) or in the pixels
    CURVE = "curve"                                  # graphics in groups 50xx, retired
    ANNOTATION = "annotation"                        # text and graphics on images: presentation states
    STRUCTURED_REPORT = "structured-report"          # findings and names as free text in a tree, key object notes
    ENCAPSULATED_DOCUMENT = "encapsulated-document"  # PDF, CDA, STL and other files inside an object
    AUDIO = "audio"                                  # spoken notes
    PRIVATE_CLASS = "private-class"                  # the manufacturer's own SOP class, or none


_WHY = {
    Kind.BURNED_IN: "Burned In Annotation (0028,0301) is not NO",
    Kind.BURNED_IN_UNKNOWN: "nothing says that no text is burned in, which is usual for this modality (0008,0060)",
    Kind.SECONDARY_CAPTURE: "a secondary capture: a picture of a screen, a film or paper",
    Kind.SCREEN_SAVE: "a screen save by its Image Type (0008,0008)",
    Kind.DOSE_REPORT: "a dose report or protocol page",
    Kind.ULTRASOUND: "an ultrasound image: scanners write names and dates into it",
    Kind.PHOTOGRAPH: "an image in visible light, which may show the patient",
    Kind.SLIDE_LABEL: "the label or overview of a slide",
    Kind.VIDEO: "a video",
    Kind.FACE: "Recognizable Visual Features (0028,0302) is not NO",
    Kind.OVERLAY: "an overlay (60xx,3000), which may draw text",
    Kind.CURVE: "a curve or graphic in a group 50xx",
    Kind.ANNOTATION: "a Graphic Annotation Sequence (0070,0001), which may hold text",
    Kind.STRUCTURED_REPORT: "a structured report, which holds free text and names",
    Kind.ENCAPSULATED_DOCUMENT: "a document inside the object, which no script reads",
    Kind.AUDIO: "a recording of sound",
    Kind.PRIVATE_CLASS: "no standard SOP Class (0008,0016): nobody else knows what it holds",
}
PAINTABLE = frozenset({Kind.BURNED_IN, Kind.BURNED_IN_UNKNOWN, Kind.SECONDARY_CAPTURE, Kind.SCREEN_SAVE,
                        Kind.DOSE_REPORT, Kind.ULTRASOUND, Kind.SLIDE_LABEL})
IN_PIXELS = PAINTABLE | {Kind.PHOTOGRAPH, Kind.VIDEO, Kind.FACE}

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_CLASSES = (  # by the beginning of the SOP Class UID
    ("1.2.840.10008.5.1.1.29", Kind.SECONDARY_CAPTURE), ("1.2.840.10008.5.1.1.30", Kind.SECONDARY_CAPTURE),
    (f"{_STORAGE}7", Kind.SECONDARY_CAPTURE),
    (f"{_STORAGE}3", Kind.ULTRASOUND), (f"{_STORAGE}6", Kind.ULTRASOUND),
    (f"{_STORAGE}77", Kind.PHOTOGRAPH),
    *((f"{_STORAGE}77.1.{number}.1", Kind.VIDEO) for number in (1, 2, 4)),
    (f"{_STORAGE}9.4", Kind.AUDIO),
    (f"{_STORAGE}104", Kind.ENCAPSULATED_DOCUMENT),
    (f"{_STORAGE}88", Kind.STRUCTURED_REPORT),
    *((f"{_STORAGE}88.{number}", Kind.DOSE_REPORT) for number in (67, 68, 73, 76)),
)
_MODALITIES = {"US": Kind.ULTRASOUND, "IVUS": Kind.ULTRASOUND, "ES": Kind.PHOTOGRAPH, "XC": Kind.PHOTOGRAPH,
               "GM": Kind.PHOTOGRAPH, "SM": Kind.PHOTOGRAPH, "DMS": Kind.PHOTOGRAPH, "OP": Kind.PHOTOGRAPH,
               "SR": Kind.STRUCTURED_REPORT, "DOC": Kind.ENCAPSULATED_DOCUMENT, "AU": Kind.AUDIO}
_OFTEN_BURNED = frozenset({"US", "IVUS", "ES", "XC", "GM", "SM", "OP", "OT", "SC", "HC", "HD", "FID", ""})
_SEQUENCES = frozenset({"SQ", "UN"})
_CONVERSIONS = frozenset({"DV", "DF", "WSD", "SD", "SI", "DRW"})  # Conversion Type, PS3.3 section C.8.6.1
_DOSE_WORDS = ("dose report", "dose info", "dose record", "dose summary", "dose page", "patient protocol",
               "exam protocol", "protocol page")
_VIDEO_SYNTAXES = ("1.2.840.10008.1.2.7.", *(f"1.2.840.10008.1.2.4.{number}." for number in range(100, 109)))


class Risk(NamedTuple):
    """One finding; the reason holds no value of the object."""

    kind: Kind
    reason: str


def risks(dataset: Dataset, transfer_syntax: str, before: Sequence[Risk] = (), painted: bool = False) -> list[Risk]:
    """The risks of an object, each kind once.

    ``before``: what was found in the object as it was received. A script that empties Image Type or sets Burned In
    Annotation takes nothing out of the pixels, so what these were said to show stays while there is Pixel Data.
    ``painted``: scripts have painted rectangles in this run. If (0028,0301) then is NO, text in the pixels counts as
    dealt with; faces, videos, overlays and documents do not. Raises :class:`relay_agent.dataset.Broken`.
    """
    kinds = {risk.kind for risk in before if risk.kind in IN_PIXELS and PIXELS in dataset}
    kinds.update(_found(dataset, transfer_syntax))
    specific = kinds & {Kind.ULTRASOUND, Kind.PHOTOGRAPH, Kind.SECONDARY_CAPTURE, Kind.SCREEN_SAVE, Kind.DOSE_REPORT,
                        Kind.SLIDE_LABEL, Kind.VIDEO}
    burned_in = _words(dataset, 0x00280301)
    if (PIXELS in dataset and not specific and not burned_in
            and (_words(dataset, 0x00080060) or [""])[0] in _OFTEN_BURNED):
        kinds.add(Kind.BURNED_IN_UNKNOWN)
    if painted and burned_in == ["NO"]:
        kinds -= PAINTABLE
    return [Risk(kind, _WHY[kind]) for kind in Kind if kind in kinds]


def _found(data: Dataset, transfer_syntax: str) -> Iterator[Kind]:
    sop_class = (_words(data, 0x00080016) or [""])[0]
    modality = (_words(data, 0x00080060) or [""])[0]
    image_type = _words(data, 0x00080008)
    if not sop_class.startswith("1.2.840.10008."):
        yield Kind.PRIVATE_CLASS
    yield from (kind for uid, kind in _CLASSES if f"{sop_class}.".startswith(f"{uid}."))
    if modality in _MODALITIES:
        yield _MODALITIES[modality]
    if not _CONVERSIONS.isdisjoint(_words(data, 0x00080064)):
        yield Kind.SECONDARY_CAPTURE
    if any("SCREEN" in word for word in image_type):
        yield Kind.SCREEN_SAVE
    titles = " ".join(word for tag in (0x0008103E, 0x00181030, 0x00204000) for word in _words(data, tag)).lower()
    if (any("DOSE" in word or word.endswith(" PROT") for word in image_type)  # CT_SOM5 PROT: Siemens, as CT images
            or any(word in titles.replace("_", " ") for word in _DOSE_WORDS)) and modality != "RTDOSE":
        yield Kind.DOSE_REPORT
    if modality == "SM" and not {"LABEL", "OVERVIEW"}.isdisjoint(image_type):
        yield Kind.SLIDE_LABEL
    if f"{transfer_syntax}.".startswith(_VIDEO_SYNTAXES):
        yield Kind.VIDEO
    for tag, kind in ((0x00280301, Kind.BURNED_IN), (0x00280302, Kind.FACE)):
        if _words(data, tag) not in ([], ["NO"]):
            yield kind
    if 0x00420011 in data:
        yield Kind.ENCAPSULATED_DOCUMENT
    if data.items(0x0040A730):
        yield Kind.STRUCTURED_REPORT
    yield from _graphics(data)


def _graphics(data: Dataset) -> Iterator[Kind]:
    for element in data:
        tag = element.tag
        if element.vr in _SEQUENCES:
            if tag == 0x00700001:
                yield Kind.ANNOTATION
            for item in data.items(tag):
                yield from _graphics(item)
        elif 0x50000000 <= tag < 0x51000000 and not tag & 0x10000 and element.size:
            yield Kind.CURVE
        elif 0x60000000 <= tag < 0x61000000 and not tag & 0x10000:
            if tag & 0xFFFF == 0x3000 and element.value.strip(b"\0"):
                yield Kind.OVERLAY
            elif tag & 0xFFFF == 0x0100 and data.numbers(tag) not in ((), (1,)):
                yield Kind.OVERLAY  # in bits of the pixels that these do not use, retired


def _words(data: Dataset, tag: int) -> list[str]:
    """The values in upper case; one that is no text where the value cannot be read."""
    try:
        return [value.strip().upper() for value in data.values(tag)]
    except Undecodable:
        return ["\ufffd"]
