"""Values of elements as the text that DicomEdit sees, and text as values (its dcm4che 2 rules by VR)."""

from __future__ import annotations

import math
import re
import struct
from decimal import Decimal

from relay_agent.charset import Undecodable
from relay_agent.dataset import TEXT, Dataset, Element, show, vr_of
from relay_agent.deidentify.dicomedit.errors import Cannot

_INTEGERS = frozenset({"US", "SS", "UL", "SL", "UV", "SV"})
_FLOATS = frozenset({"FL", "FD"})
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_FLOAT = re.compile(r"[+-]?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)


def read(data: Dataset, element: Element) -> str:
    """The value as text, several values joined by a backslash. Raises :class:`Cannot`."""
    vr, tag = element.vr, element.tag
    try:
        if vr in TEXT:
            return "\\".join(data.values(tag))
        if vr in _INTEGERS:
            return "\\".join(str(number) for number in data.numbers(tag))
        if vr in _FLOATS:
            return "\\".join(java_float(number, vr) for number in data.numbers(tag))
        if vr == "AT":
            words = [f"{int(word):04X}" for word in data.numbers(tag)]
            return "\\".join(map("".join, zip(words[::2], words[1::2], strict=False)))
        if vr == "OB" and not element.fragments:
            return "\\".join(f"{byte:02X}" for byte in element.value)
        if vr == "UN" and not data.items(tag):
            text = element.value.rstrip(b" \0").decode("ascii")
            if text.isprintable():
                return text
    except (Undecodable, UnicodeDecodeError):
        raise Cannot(f"the value of {show(tag)} is no text in its character set") from None
    raise Cannot(f"the value of {show(tag)} ({vr}) cannot be read as text")


def write(data: Dataset, tag: int, text: str) -> None:
    """Set an element to a text; its VR stays, or is the dictionary's (UN for private). Raises :class:`Cannot`."""
    element = data.get(tag)
    vr = element.vr if element is not None else vr_of(tag)
    if element is not None and (element.fragments or data.items(tag)):
        raise Cannot(f"{show(tag)} holds items or fragments and cannot be set to a text")
    try:
        if vr in TEXT:
            data.put_text(tag, text, vr)
        elif vr in ("OB", "OW", "UN"):
            data.put(tag, vr, text.encode())
        elif vr in _INTEGERS and all(map(_INTEGER.fullmatch, _parts(text))):
            data.put_numbers(tag, vr, *map(int, _parts(text)))
        elif vr in _FLOATS and all(map(_FLOAT.fullmatch, _parts(text))):
            data.put_numbers(tag, vr, *map(float, _parts(text)))
        elif vr == "OF" and _FLOAT.fullmatch(text):
            data.put(tag, vr, struct.pack("<f" if data.encoding.little else ">f", float(text)))
        elif vr == "AT" and all(re.fullmatch("[0-9A-Fa-f]{8}", part) for part in _parts(text)):
            data.put_numbers(tag, vr, *(int(part[i:i + 4], 16) for part in _parts(text) for i in (0, 4)))
        else:
            raise Cannot(f"the text does not fit {show(tag)}, whose VR is {vr}")
    except (Undecodable, UnicodeEncodeError):
        raise Cannot(f"the text for {show(tag)} has characters that its character set lacks") from None
    except (struct.error, OverflowError):
        raise Cannot(f"the number does not fit {show(tag)}, whose VR is {vr}") from None


def _parts(text: str) -> list[str]:
    return [part.strip(" ") for part in text.split("\\")] if text else []


def java_float(number: float, vr: str) -> str:
    """A number as Java writes it (Double.toString, Float.toString): 1.0, 1.25, 1.0E10."""
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    shortest = repr(number)
    if vr == "FL":
        for digits in range(1, 10):
            shortest = f"{number:.{digits}g}"
            if struct.pack("<f", float(shortest)) == struct.pack("<f", number):
                break
    sign, digits_, exponent = Decimal(shortest).normalize().as_tuple()
    text = "".join(map(str, digits_))
    point = len(text) + int(exponent)  # position of the decimal point in the digits
    minus = "-" if sign else ""
    if number == 0:
        return f"{minus}0.0"
    if -2 <= point <= 7:
        text = text.rjust(len(text) - point + 1, "0") if point <= 0 else text.ljust(point, "0")
        point = max(point, 1)
        return f"{minus}{text[:point]}.{text[point:] or '0'}"
    return f"{minus}{text[0]}.{text[1:] or '0'}E{point - 1}"
