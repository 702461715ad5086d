"""How what identifies a patient may appear elsewhere: names, numbers and codes, dates in the forms that people write.

So that a find means something, an identifier gives no form when it is too short or says nothing:

* names: components of one or two letters (of one character in ideographic and phonetic groups; the whole name counts
  all the same), particles such as "van der", prefix and suffix; a component counts only as a whole word ("Ann" is not
  in "planning") and not among terms (Image Type, Frame Type, Body Part Examined); upper and lower case, accents and
  "ue" for "ü" do not matter;
* numbers and codes: below three characters not at all, below five only as a whole value that is not numeric;
  separators, other ones or none, and leading zeros do not matter, nor letters around six digits; a number of less than
  eight digits, or like a date, is not searched in DS, IS, DA, TM, DT and AS, and in a UID only as a whole component;
* dates: placeholders before 1905;
* words such as ANONYMOUS, UNKNOWN or PHANTOM.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import date

_EMPTY_WORDS = frozenset({
    "anon", "anonym", "anonymous", "anonymized", "anonymised", "deidentified", "removed", "redacted", "unknown",
    "unspecified", "undefined", "none", "null", "nobody", "noname", "test", "phantom", "patient", "name", "male",
    "female", "other", "xxx", "xxxx", "van", "von", "der", "den", "del", "dos", "das", "los", "las", "bin", "ibn",
    "ter", "ten", "the", "and"})
_GERMAN = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe"})
_MONTHS = ("january|januar", "february|februar", "march|maerz|marz", "april", "may|mai", "june|juni", "july|juli",
           "august", "september", "october|oktober", "november", "december|dezember")
_SEPARATORS = b" -_./,:^=\\+()\0\t\r"
_LOWER = bytes(range(256)).lower()
_DAY = re.compile(r"(?:19|20)\d\d[01]\d[0-3]\d")
_BETWEEN = r"[\s\-_/()+]{0,2}"


def fold(text: str) -> str:
    """Without case, accents and forms of width."""
    if text.isascii():
        return text.lower()
    parts = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFC", "".join(c for c in parts if not unicodedata.combining(c)))


def squeezed(text: str) -> str:
    """Folded, letters and digits only."""
    return "".join(c for c in fold(text) if c.isalnum())


def squeeze(value: bytes) -> bytes:
    """Bytes in lower case and without separators and NUL, so that UTF-16 of ASCII looks like ASCII."""
    return value.translate(_LOWER, _SEPARATORS)


def stored_forms(vr: str, stored: bytes, text: str | None) -> Iterator[bytes]:
    """The parts of a value with other characters than ASCII as binary values may hold them."""
    if stored.isascii() and b"\x1b" not in stored:
        return
    yield from re.split(rb"[\\^=]", stored) if vr == "PN" else [stored]
    for part in re.split(r"[\\^=]" if vr == "PN" else r"\\", text or ""):
        for case in {part, part.lower(), part.upper(), part.title()}:
            yield from (case.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))


def forms(vr: str, value: str) -> Iterator[tuple[str, str, bool]]:
    """How a value may appear: needle for the quick look, pattern for the sure one, whether it is weak.

    An empty pattern: only as a whole value.
    """
    if vr == "PN":
        yield from _name_forms(value)
    elif vr == "DA":
        yield from _date_forms(value.strip())
    else:
        yield from _code_forms(value)


def _name_forms(value: str) -> Iterator[tuple[str, str, bool]]:
    for group in value.split("="):
        components = [component.strip() for component in group.split("^")[:3]]
        for component in components:
            words = re.split(r"[\s\-]+", component)
            for part in {component, *(words if len(words) > 1 else ())}:
                if _EMPTY_WORDS.issuperset(fold(word) for word in re.split(r"[\s\-]+", part)):
                    continue
                for form in _spellings(part):
                    least = 3 if form.isascii() else 2
                    if len(squeezed(form)) >= least and not form.isdigit():
                        yield squeezed(form), _word(form), True
        if len(components) > 1 and components[0] and components[1]:
            for family in _spellings(components[0]):
                for given in _spellings(components[1]):
                    if not _EMPTY_WORDS.issuperset({squeezed(family), squeezed(given)}):
                        for form in (f"{family} {given}", f"{given} {family}"):
                            if len(squeezed(form)) >= (5 if form.isascii() else 3):
                                yield squeezed(form), _word(form), False


def _spellings(text: str) -> set[str]:
    german = fold(unicodedata.normalize("NFC", text).casefold().translate(_GERMAN))
    return {fold(text), german}


def _word(text: str) -> str:
    words = r"[\W_]*".join(re.escape(word) for word in re.split(r"[\W_]+", text) if word)
    return words if not text.isascii() and not any("a" <= c <= "z" for c in text) else _bounded(words, text)


def _bounded(pattern: str, text: str) -> str:
    """Not within a longer word or number."""
    kinds = [r"\d" if end.isdigit() else r"[^\W\d_]" for end in (text.strip()[:1], text.strip()[-1:])]
    return f"(?<!{kinds[0]}){pattern}(?!{kinds[1]})"


def _code_forms(value: str) -> Iterator[tuple[str, str, bool]]:
    code = squeezed(value)
    if not code.isdecimal():
        for run in re.findall(r"\d{6,}", code):  # "MRN" in front is often left out; a date says nothing
            if not _DAY.fullmatch(run):
                yield from _code_forms(run)
    if code.isdecimal() and len(code.lstrip("0")) >= 5:
        core = code.lstrip("0")
        extra = re.escape("".join({c for c in value if c in ".,:"}))
        between = f"[\\s\\-_/()+{extra}]{{0,2}}"
        weak = len(core) < 8 or _DAY.fullmatch(core) is not None
        yield core, f"(?<!\\d){'' if extra else '0*'}{between.join(core)}(?!\\d)", weak
    elif code.isdecimal() or len(code) < 5:
        if len(code) >= 3 and code not in _EMPTY_WORDS and code.strip("0"):
            yield code, "", True
    elif code not in _EMPTY_WORDS:
        if len(code) <= 24:
            yield code, _bounded(_BETWEEN.join(re.escape(c) for c in code), code), False
        else:
            yield code, _word(fold(value)), False


def _date_forms(value: str) -> Iterator[tuple[str, str, bool]]:
    digits = value.replace(".", "")
    try:
        day = date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        return
    if day.year < 1905 or len(digits) != 8:
        return
    y, m, d = f"{day:%Y}", f"{day:%m}", f"{day:%d}"
    after = r"(?:(?=\d{6})|(?!\d))"  # a time may follow
    yield y + m + d, rf"(?<!\d){y}[\W_]?{m}[\W_]?{d}{after}", False
    for first, second in ((d, m), (m, d)):
        yield first + second + y, rf"(?<!\d){first}[\W_]?{second}[\W_]?{y}(?!\d)", False
        short = first.lstrip("0"), second.lstrip("0")
        one = rf"(?<!\d)0?{short[0]}[./\-]\s?0?{short[1]}[./\-]\s?"
        for needle in {first, short[0]}:
            for following in {second, short[1]}:
                yield needle + following + y, one + y + r"(?!\d)", False
                yield needle + following + y[2:], one + y[2:] + r"(?!\d)", True
    for month in _MONTHS[day.month - 1].split("|"):
        name = f"{month[:3]}(?:{month[3:]})?"
        bare = d.lstrip("0")
        for needle in (bare + month[:3], month[:3] + bare, month[:3] + d, month + bare, month + d):
            yield needle, rf"(?<!\d)0?{bare}[\W_]*{name}[\W_]*{y}|{name}[\W_]*0?{bare}[\W_]+{y}", False
