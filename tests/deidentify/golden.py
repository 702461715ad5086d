"""Recorded outcomes of other engines: cases, inputs, and our own output flattened the same way (by pydicom).

Path: 8 hex digits; items ``TAG[index]/TAG``. Entry:
``{"vr", "value"}`` or, of a sequence, ``{"vr": "SQ", "items": n}``.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
from pathlib import Path

import pydicom
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from relay_agent.instance import File

HERE = Path(__file__).parent / "golden"
NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
ONE_TEXT = ("LT", "ST", "UT", "UR")
TEXT = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "PN", "SH", "TM", "UC", "UI", *ONE_TEXT)


def cases(folder: str) -> list[dict]:
    """The cases of a folder (``dicomedit``, ``ctp``) in their order."""
    return [json.loads(line) for line in (HERE / folder / "cases.jsonl").read_text("utf-8").splitlines()]


def inputs(folder: str) -> dict[str, dict]:
    """The flattened input files by name."""
    return json.loads((HERE / folder / "inputs.json").read_text("utf-8"))


def read(folder: str, name: str) -> File:
    """An input file, fresh for each case."""
    return File.parse((HERE / folder / "inputs" / name).read_bytes())


def expected(case: dict, flat_input: dict) -> dict:
    """What the other engine wrote, flattened."""
    flat = {path: entry for path, entry in flat_input.items() if path not in case["expected"]["removed"]}
    return flat | case["expected"]["set"]


def broken_invariants(case: dict, flat_input: dict, flat: dict) -> list[str]:
    """What does not hold of the rules for random values."""
    rules = case["expected"]["invariants"]
    text = {path: "\\".join(entry["value"]) for path, entry in flat.items() if isinstance(entry.get("value"), list)
            and all(isinstance(value, str) for value in entry["value"])}
    wrong = [path for path, prefix in rules.get("prefix", {}).items() if not text[path].startswith(prefix)]
    wrong += [path for path in rules.get("changed", []) if flat[path] == flat_input.get(path)]
    wrong += [f"{one} {two}" for one, two in rules.get("equal", []) if text[one] != text[two]]
    wrong += [f"{one} {two}" for one, two in rules.get("different", []) if text[one] == text[two]]
    others = [path for path in flat.keys() | flat_input.keys() if flat.get(path) != flat_input.get(path)]
    return wrong + sorted(set(others) - set(rules.get("only", others)))


def flatten(file: File) -> dict[str, dict]:
    """Our output, encoded and read again by pydicom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(io.BytesIO(b"".join(file.encode())))
        flat = {f"0002{number}": {"vr": "UI", "value": [str(data.file_meta.get(int(f"0002{number}", 16)).value or "")]}
                for number in ("0002", "0003", "0010")}
        _flatten(data, "", data.original_encoding[1], ["iso8859"], flat)
    return flat


def _flatten(data: pydicom.Dataset, where: str, little: bool, terms: list[str], flat: dict) -> None:
    elements = [data.get_item(tag) for tag in sorted(data.keys())]  # at once: pydicom decodes some when items are read
    given = data.get("SpecificCharacterSet")
    if given is not None:
        terms = convert_encodings([given] if isinstance(given, str) else list(given))
    for element in elements:
        tag = element.tag
        path = f"{where}{int(tag):08X}"
        vr = element.VR or _implicit_vr(int(tag))
        if vr == "SQ":
            items = list(data[tag].value)
            flat[path] = {"vr": "SQ", "items": len(items)}
            for index, item in enumerate(items):
                _flatten(item, f"{path}[{index}]/", little, terms, flat)
        else:
            value = element.value or b""
            if tag == 0x00080005 and not isinstance(value, bytes):  # pydicom has decoded this one for itself
                value = "\\".join([value] if isinstance(value, str) else value).encode()
            flat[path] = {"vr": str(vr), **_value(value, vr, little, terms)}


def _implicit_vr(tag: int) -> str:
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    return {"US or SS": "US", "OB or OW": "OW"}.get(vr, vr[:2])


def _value(value: bytes, vr: str, little: bool, terms: list[str]) -> dict:
    if not value:
        return {"value": []}
    if vr in NUMBERS:
        size = len(value) // struct.calcsize(NUMBERS[vr])
        return {"value": list(struct.unpack(f"{'<' if little else '>'}{size}{NUMBERS[vr]}", value))}
    if vr == "AT":
        numbers = struct.unpack(f"{'<' if little else '>'}{len(value) // 2}H", value)
        return {"value": [f"{numbers[i]:04X}{numbers[i + 1]:04X}" for i in range(0, len(numbers), 2)]}
    if vr not in TEXT:
        if len(value) <= 64:
            return {"value": {"hex": value.hex()}}
        return {"value": {"sha256": hashlib.sha256(value).hexdigest(), "length": len(value)}}
    stripped = value.rstrip(b" \0")
    text = decode_bytes(stripped, terms, set(PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS))
    parts = [] if not text else [text] if vr in ONE_TEXT else text.split("\\")
    entry = {"value": [part.strip(" ") for part in parts]}
    return entry if stripped.isascii() and b"\x1b" not in stripped else {**entry, "raw": stripped.hex()}
