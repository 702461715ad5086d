"""The profile at work on one object."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from relay_agent import charset
from relay_agent.dataset import TEXT, Dataset, Element, show, vr_of
from relay_agent.deidentify import residue, risk
from relay_agent.deidentify.profile import csa
from relay_agent.deidentify.profile.table import CURVES, EDITION, row_tag
from relay_agent.deidentify.profile.values import dummy, shifted
from relay_agent.deidentify.script import Context, Failed
from relay_agent.instance import File

if TYPE_CHECKING:
    from relay_agent.deidentify.profile import Profile

DAYS = "retain-modified-dates"
PIXELS = "clean-pixel-data"
CODES = {  # PS3.16 CID 7050
    PIXELS: ("113101", "Clean Pixel Data Option"),
    "clean-graphics": ("113103", "Clean Graphics Option"),
    "clean-structured-content": ("113104", "Clean Structured Content Option"),
    "clean-descriptors": ("113105", "Clean Descriptors Option"),
    "retain-full-dates": ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    DAYS: ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "retain-patient-characteristics": ("113108", "Retain Patient Characteristics Option"),
    "retain-device-identity": ("113109", "Retain Device Identity Option"),
    "retain-uids": ("113110", "Retain UIDs Option"),
    "retain-safe-private": ("113111", "Retain Safe Private Option"),
    "retain-institution-identity": ("113112", "Retain Institution Identity Option"),
}
CSA = "retain-siemens-csa"  # of ours, without a code
OPTIONS = (*CODES, CSA)
_BASIC = ("113100", "Basic Application Confidentiality Profile")
_NAME, _ID, _SOP_CLASS, _TIMEZONE = 0x00100010, 0x00100020, 0x00080016, 0x00080201
_REMOVED, _METHOD, _METHODS, _TEMPORAL = 0x00120062, 0x00120063, 0x00120064, 0x00280303
_PIXEL_DATA = 0x7FE00010
_NOTHING = ("", "")
_NESTED = frozenset({"SQ", "UN"})
_WELL_KNOWN = re.compile(r"1\.2\.840\.10008(?:\.\d+)*")
_UID = re.compile(r"[0-2](?:\.\d+){4,}")
_DATES = frozenset({"DA", "DT", "TM"})
_DOUBT = re.compile(  # what may be a number, a date, an address of a person that no attribute declares
    r"\d{5}|\d[-./]\d{1,2}[-./]\d|@|\^|https?:|\b(?:dr|prof|mrs?|ms|mme|sig)\.\s*[^\W\d_]{2}|\b(?:frau|herr)\b"
    r"|\b(?:dob|mrn|ssn|born|geb|tel|fax|phone)\b", re.IGNORECASE)


class Run:
    """One object on its way through the profile."""

    def __init__(self, profile: Profile, file: File, context: Context) -> None:
        data = file.dataset
        if PIXELS in profile.options:
            self._require_clean(file, profile.name)
        self._profile = profile
        self._data = data
        self._context = context
        self._identifiers: residue.Identifiers | None = None
        if profile.options - {"retain-uids", "retain-full-dates", DAYS}:
            self._identifiers = residue.identifiers(data, profile.identifying)
        self._days = self._shift() if DAYS in profile.options else 0

    @staticmethod
    def _require_clean(file: File, rule: str) -> None:
        """Nothing can be seen by us in pixels; what may show text has to have been painted by a script before."""
        shown = [found.kind for found in risk.risks(file.dataset, file.transfer_syntax) if found.kind in risk.IN_PIXELS]
        dealt_with = file.painted and set(shown) <= risk.PAINTABLE
        if shown and not dealt_with:
            raise Failed(f"{PIXELS}: its pixels may identify ({', '.join(shown)}); paint them by a script before this "
                         "one, or leave the option out and let a person look", rule)
        if _PIXEL_DATA in file.dataset:
            file.dataset.put(0x00280301, "CS", b"NO")

    def all(self) -> None:
        """Every element of every level, then the marks of PS3.15 section E.1.1."""
        data = self._data
        try:
            sop_class = data.text(_SOP_CLASS) or ""
        except charset.Undecodable:
            sop_class = ""
        self._elements(data, sop_class, clean=False)
        self._context.rule = self._profile.name
        if self._context.subject:
            self._subject(self._context.subject)
        self._marks()

    def _elements(self, data: Dataset, sop_class: str | None, clean: bool) -> None:
        private = False
        plan = self._profile.plan(sop_class)
        for element in data:
            tag = element.tag
            if tag >> 16 & 1:
                private = True
                continue
            option, basic = plan.get(row_tag(tag) if tag >= CURVES else tag, _NOTHING)
            if not basic and not clean and element.vr not in _NESTED:
                continue  # most elements
            self._context.rule = f"{self._profile.name} {option or basic or 'clean'}"
            if not basic:
                self._unlisted(data, element, clean)
            elif not option or not self._by_option(data, element, option):
                self._basic(data, element, basic)
        if private:
            self._context.rule = f"{self._profile.name} private"
            self._private(data)

    def _unlisted(self, data: Dataset, element: Element, clean: bool) -> None:
        """An attribute that the table does not name, or one in content that is cleaned."""
        tag, vr = element.tag, element.vr
        items = data.items(tag)
        if items:
            for item in items:
                self._elements(item, None, clean)
        elif vr == "UN" and element.size and vr_of(tag) == "SQ":
            data.remove(tag)  # items that cannot be seen
        elif clean and vr in TEXT and vr != "UI":
            if not self._clean_text(data, element):
                self._basic(data, element, "D")
        elif clean and vr in {"OB", "OW", "UN"}:
            data.remove(tag)

    def _by_option(self, data: Dataset, element: Element, option: str) -> bool:
        """Keep or clean; whether that was possible."""
        tag = element.tag
        items = data.items(tag)
        if items or element.vr == "SQ":
            for item in items:
                self._elements(item, None, option == "C")
            return True
        vr = element.vr if element.vr != "UN" else vr_of(tag)
        if vr == "SQ":
            return False
        if option == "K":
            return vr not in TEXT or _decoded(data, tag) is not None
        if vr in _DATES:
            return self._move(data, element, vr)
        if tag == _TIMEZONE:
            return _decoded(data, tag) is not None
        return vr in TEXT and self._clean_text(data, element)

    def _basic(self, data: Dataset, element: Element, action: str) -> None:
        tag = element.tag
        vr = element.vr if element.vr != "UN" else vr_of(tag)
        if action == "X":
            data.remove(tag)
        elif vr == "SQ":
            self._sequence(data, element, action)
        elif action == "Z":
            data.put(tag, element.vr, b"")
        elif element.size:
            if vr == "UI":
                self._map(data, element)
            else:
                data.put(tag, element.vr, dummy(vr))

    def _sequence(self, data: Dataset, element: Element, action: str) -> None:
        """Z: no items. U*: items with new UIDs. D: items of dummies; codes (CS) stay, so that they are valid."""
        items = data.items(element.tag)
        if not items or action == "Z":
            data.put_items(element.tag, ())
            return
        for item in items:
            if action == "U":
                self._elements(item, None, clean=False)
            else:
                self._dummies(item)

    def _dummies(self, item: Dataset) -> None:
        for element in item:
            items = item.items(element.tag)
            if element.tag >> 16 & 1 or (element.vr in {"OB", "OW", "UN"} and not items):
                item.remove(element.tag)
            elif items:
                for inner in items:
                    self._dummies(inner)
            elif element.vr == "UI":
                self._map(item, element)
            elif element.size and not (element.vr == "CS" and _is_code(item, element.tag)):
                item.put(element.tag, element.vr, dummy(element.vr))

    def _map(self, data: Dataset, element: Element) -> None:
        text = element.value.rstrip(b" \0").decode("latin-1")
        uids = (uid.strip(" \0") for uid in text.split("\\"))
        new = (uid if not uid or _WELL_KNOWN.fullmatch(uid) else self._context.uids.new(uid) for uid in uids)
        data.put(element.tag, element.vr, "\\".join(new).encode("ascii"))

    def _move(self, data: Dataset, element: Element, vr: str) -> bool:
        text = _decoded(data, element.tag)
        moved = shifted(text, vr, self._days) if text is not None else None
        if moved is None:
            return False
        if moved != text:
            data.put(element.tag, element.vr, moved.encode("ascii"))
        return True

    def _clean_text(self, data: Dataset, element: Element) -> bool:
        text = _decoded(data, element.tag)
        if text is None or self._identifiers is None:
            return False
        cleaned = self._identifiers.without(text)
        if cleaned is None or (element.vr not in {"DS", "IS", "TM"} and _DOUBT.search(cleaned)):
            return False
        if cleaned != text:
            data.put_text(element.tag, cleaned)
        return True

    def _private(self, data: Dataset) -> None:
        """Odd groups: all go, but for safe attributes and the creators of their blocks."""
        creators = {}
        needed = set()
        for element in data:
            tag = element.tag
            if not tag >> 16 & 1:
                continue
            number = tag & 0xFFFF
            if 0x10 <= number <= 0xFF:
                creators[tag] = element.value.strip(b" \0").decode("latin-1")
                continue
            block = tag & 0xFFFF0000 | number >> 8
            creator = creators.get(block, "")
            if (tag >> 16, creator, number & 0xFF) in self._profile.safe and self._safe_stays(data, element):
                needed.add(block)
            else:
                data.remove(tag)
        for tag in creators:
            if tag not in needed:
                data.remove(tag)

    def _safe_stays(self, data: Dataset, element: Element) -> bool:
        """Clean a safe private attribute; False when it holds something that identifies all the same."""
        if element.tag >> 16 == csa.GROUP and element.tag & 0xFF in csa.HEADERS:
            return self._csa_stays(data, element)
        items = data.items(element.tag)
        for item in items:
            self._elements(item, None, clean=True)
        if items or self._identifiers is None:
            return bool(items)
        text = _decoded(data, element.tag) if element.vr in TEXT or element.vr == "UN" else None
        if element.vr == "UI" or (text is not None and _UID.fullmatch(text)):
            if "retain-uids" not in self._profile.options:
                self._map(data, element)
            return True
        if element.vr in {"DA", "DT"}:
            return "retain-full-dates" in self._profile.options or (
                DAYS in self._profile.options and self._move(data, element, element.vr))
        if text is None:
            return element.vr not in TEXT and self._identifiers.in_bytes(element.value) is None
        return self._identifiers.in_text(text, element.vr) is None and self._identifiers.in_bytes(element.value) is None

    def _csa_stays(self, data: Dataset, element: Element) -> bool:
        assert self._identifiers is not None
        cleaned = csa.clean(element.value, self._identifiers, "retain-uids" in self._profile.options)
        if cleaned is not None:
            data.put(element.tag, element.vr, cleaned)
        return cleaned is not None

    def _shift(self) -> int:
        if self._profile.days is not None:
            return self._profile.days
        patient = (_decoded(self._data, _ID) or "").strip()
        if not patient:
            raise Failed(f"{show(_ID)} is empty or unreadable, so its dates cannot move as the patient's other data; "
                         f"{DAYS}=DAYS names a number of days for everybody", self._profile.name)
        return self._context.uids.shift_days(patient)

    def _subject(self, subject: str) -> None:
        for tag in (_NAME, _ID):
            if tag in self._data:
                try:
                    self._data.put_text(tag, subject)
                except charset.Undecodable:
                    raise Failed(f"the subject does not fit the character set of {show(tag)}", self._profile.name
                                 ) from None

    def _marks(self) -> None:
        data, options = self._data, self._profile.options
        data.put(_REMOVED, "CS", b"YES")
        method = [f"PS3.15 {EDITION} Basic Profile", *sorted(options)]
        old = _decoded(data, _METHOD)
        before = [value for value in old.split("\\") if value and value not in method] if old else []
        data.put_text(_METHOD, "\\".join(before + method), "LO")
        codes = [_BASIC, *(CODES[option] for option in CODES if option in options)]
        items = [item for item in data.items(_METHODS) if item.text(0x00080100) not in {code for code, _ in codes}]
        for code, meaning in codes:
            item = data.new_item()
            item.put_text(0x00080100, code, "SH")
            item.put_text(0x00080102, "DCM", "SH")
            item.put_text(0x00080104, meaning, "LO")
            items.append(item)
        data.put_items(_METHODS, items)
        temporal = b"MODIFIED" if DAYS in options else b"UNMODIFIED" if "retain-full-dates" in options else b"REMOVED"
        data.put(_TEMPORAL, "CS", temporal)


def _decoded(data: Dataset, tag: int) -> str | None:
    try:
        return data.text(tag)
    except charset.Undecodable:
        return None


def _is_code(data: Dataset, tag: int) -> bool:
    """Whether a CS is written like a defined term (PS3.5 section 6.2)."""
    return re.fullmatch(rb"[A-Z0-9_ \\]*[\0 ]?", data.get(tag).value) is not None  # type: ignore[union-attr]
