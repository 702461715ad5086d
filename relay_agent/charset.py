"""Text in DICOM's character sets (PS3.5 section 6.1, PS3.3 section C.12.1.1.2).

pydicom knows the codecs; here a value that does not decode, or a text that does not fit, is an error and not a row of
question marks. Without Specific Character Set, bytes beyond ASCII are read as Latin-1, as everybody reads them.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

from pydicom.charset import decode_bytes, encode_string, python_encoding
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

_FREE = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN", "UN"})  # VRs that Specific Character Set rules
_DEFAULT = ("iso8859",)


class Undecodable(ValueError):
    """Bytes that are no text in their character set, or text that the character set has no bytes for."""


@lru_cache(256)
def codecs(terms: bytes) -> tuple[str, ...] | None:
    """Python's codecs for a value of Specific Character Set (0008,0005); None when a term in it is unknown."""
    found = [python_encoding.get(term.strip(" \0")) for term in terms.decode("ascii", "replace").split("\\")]
    return tuple(codec for codec in found if codec) if all(found) else None


def decode(value: bytes, vr: str, terms: bytes) -> str:
    """The text of a value, padding included; :class:`Undecodable` when it is none."""
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    if vr not in _FREE:
        return value.decode("latin-1")
    known = codecs(terms) or ()
    try:
        if b"\x1b" in value and known:
            with warnings.catch_warnings():  # pydicom warns where it replaces; that is looked for below
                warnings.simplefilter("ignore")
                text = str(decode_bytes(value, known, set(PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS)))
        else:
            text = value.decode(known[0] if known else "ascii")
    except (UnicodeError, LookupError):
        raise Undecodable("a value is no text in its character set") from None
    if "\ufffd" in text or "\x1b" in text:  # what pydicom makes of bytes and of escape sequences that it does not know
        raise Undecodable("a value is no text in its character set")
    return text


def encode(text: str, vr: str, terms: bytes) -> bytes:
    """The bytes of a text, without padding; :class:`Undecodable` when the character set lacks a character."""
    if text.isascii():
        return text.encode("ascii")
    known = codecs(terms)
    if known is None or vr not in _FREE:
        raise Undecodable("a text has characters that the data set's character set lacks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = bytes(encode_string(text, known or _DEFAULT))
        except (UnicodeError, LookupError):
            value = b""
    if not value or decode(value, vr, terms) != text:
        raise Undecodable("a text has characters that the data set's character set lacks")
    return value
