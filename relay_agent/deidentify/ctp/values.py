"""What CTP's functions compute: hashes in decimal, shifted dates, rounded ages, Blowfish; texts in, texts out."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
from collections.abc import Callable
from datetime import date

from cryptography.hazmat.decrepit.ciphers.algorithms import Blowfish
from cryptography.hazmat.primitives.ciphers import Cipher, modes

_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)((?:\d\d(?:\d\d(?:\d\d(?:\.\d{1,6})?)?)?)?)", re.ASCII)
_FILL = "tszyihnnphlyeaglle"  # CTP lengthens a short key with it
_START = date(2000, 1, 1)
_MONTH_FIRST = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{1,4})", re.ASCII)


def md5(text: str, longest: int | None = None) -> str:
    """MD5 of the UTF-8 text as a decimal number, cut to ``longest`` digits when that is positive."""
    digest = hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    digits = str(int.from_bytes(digest, "big"))
    return digits[:longest] if longest is not None and longest > 0 else digits


def uid(root: str, old: str) -> str:
    """A UID below a root, cut to the 64 characters that one may have (PS3.5 section 9.1)."""
    digits = md5(old)
    return (root + ("9" if digits[0] == "0" else "") + digits)[:64]


def name(text: str, longest: int, words: int) -> str:
    """Hash of the first words (parts of a name; 0 for all), without blanks and punctuation, in upper case."""
    parts = text.split("^")
    text = "".join(parts[:words] if words > 0 else parts)
    return md5(re.sub(r"[\s,'^.]", "", text, flags=re.ASCII).upper(), longest)


def initials(text: str) -> str:
    """First letters of the words, the family name's last; X for an empty name."""
    words = re.sub(r"\s+", " ", text.replace("^", " "), flags=re.ASCII).strip().split(" ")
    letters = "".join(word[0] for word in words if word)
    return (letters[1:] + letters[0]).upper() if letters else "X"


def caesar(letters: str, offset: int) -> str | None:
    """Letters moved along the alphabet; None when there are others than A to Z."""
    if not re.fullmatch("[A-Z]*", letters):
        return None
    return "".join(chr(65 + (ord(letter) - 65 + offset) % 26) for letter in letters)


def rounded(text: str, size: int) -> str | None:
    """An age in groups of ``size``, computed in four-byte numbers as CTP does; None for what is no age."""
    text = text.strip()
    digits = re.sub("[^0-9]", "", text)
    if not text:
        return ""
    if not digits or len(digits) > 9:
        return None
    whole = math.floor(_four(_four(float(digits)) / _four(float(size))) + 0.5) * size
    result = str(whole) + re.sub("[0-9]", "", text)
    return "0" * (len(result) % 2) + result


def _four(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def shifted(text: str, days: int) -> str | None:
    """Dates (DA, DT; joined by backslashes) moved by days, the time of day kept; None for anything that is no date."""
    return _each(text, lambda year, month, day: (year, month, day + days))


def modified(text: str, parts: tuple[int, int, int]) -> str | None:
    """Dates with year, month, day set, negative to leave one; what overflows carries, as in Java's calendar."""
    year, month, day = parts
    return _each(text, lambda y, m, d: (year if year >= 0 else y, month if month >= 0 else m, day if day >= 0 else d))


def _each(text: str, change: Callable[[int, int, int], tuple[int, int, int]]) -> str | None:
    out = []
    for part in text.split("\\"):
        found = _DATE.fullmatch(part)
        if found is None:
            return None
        out.append(_calendar(*change(int(found[1]), int(found[2]), int(found[3]))) + found[4])
    return "\\".join(out)


def _calendar(year: int, month: int, day: int) -> str:
    """yyyymmdd of a date whose month or day may be any number; years before 1 count backwards as in Java."""
    year, month = divmod(year * 12 + month - 1, 12)
    days = date(_START.year + year % 400, month + 1, 1).toordinal() + day - 1 - _START.toordinal()
    cycles, days = divmod(days, 146_097)  # the calendar repeats after 400 years
    moved = date.fromordinal(_START.toordinal() + days)
    year = moved.year - _START.year + (year // 400 + cycles) * 400
    return f"{year if year > 0 else 1 - year:04}{moved.month:02}{moved.day:02}"


def days_between(text: str, base: str) -> int | None:
    """Days from a date month/day/year to one of a DICOM value; None when one of them is no date."""
    first, second = _MONTH_FIRST.match(base), re.match(r"(\d{4})(\d\d)(\d\d)", text, re.ASCII)
    try:
        if first is not None and second is not None:
            return (date(*map(int, second.groups())) - date(int(first[3]), int(first[1]), int(first[2]))).days
    except ValueError:
        pass
    return None


def encrypted(text: str, key: str) -> str:
    """Blowfish (ECB, padded as in PKCS 5) of the UTF-8 text, in Base64."""
    value = text.encode("utf-8", "surrogatepass")
    fill = 8 - len(value) % 8
    encryptor = Cipher(Blowfish(_key(key)), modes.ECB()).encryptor()  # noqa: S305 - CTP's format
    return base64.b64encode(encryptor.update(value + bytes([fill]) * fill) + encryptor.finalize()).decode()


def decrypted(text: str, key: str) -> str | None:
    """What was encrypted so, None for anything else."""
    try:
        decryptor = Cipher(Blowfish(_key(key)), modes.ECB()).decryptor()  # noqa: S305
        value = decryptor.update(base64.b64decode(text, validate=True)) + decryptor.finalize()
        fill = value[-1]
        return value[:-fill].decode() if 1 <= fill <= 8 and value.endswith(bytes([fill]) * fill) else None
    except (ValueError, IndexError):
        return None


def _key(text: str) -> bytes:
    letters = re.sub("[^a-zA-Z0-9+/]", "", text)
    return base64.b64decode((letters + _FILL * 2)[:22] + "==")
