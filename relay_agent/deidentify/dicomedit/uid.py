"""New UIDs for old."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from relay_agent.deidentify.dicomedit.arguments import need
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.run import Run, as_text


def hash_uid(text: str) -> str:
    """DicomEdit's hashUID: a UUID of SHA-1 without a name space, as a UID."""
    digest = hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    number = int.from_bytes(digest[:16], "big") & ~(0xF << 76 | 0x3 << 62) | 5 << 76 | 2 << 62
    return f"2.25.{number}"


def map_uid(run: Run, prefix: Any, uid: str) -> str:
    """mapUID: below a prefix, always the same for a UID and project. Raises :class:`Cannot`."""
    text = need(as_text(prefix))
    if not re.fullmatch(r"[0-9]+(?:\.[0-9]+)*\.?", text, re.ASCII):
        raise Cannot("the prefix for new UIDs must be a UID itself")
    try:
        return run.context.uids.under(text, uid)
    except ValueError as error:
        raise Cannot(str(error)) from None
