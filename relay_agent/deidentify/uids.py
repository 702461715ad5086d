"""New UIDs for old: one keyed function for each project, so that a study, its later parts and its raw data still match.

new = "2.25." + decimal of the first 16 bytes of HMAC-SHA-256(key of the project, "uid" NUL old), with the version and
variant bits of a UUID set (version 8, RFC 9562; 2.25 is the root for UUIDs, PS3.5 section B.2). The same key gives the
days by which the dates of a patient are shifted. The project's key is
HMAC-SHA-256(key of the box, "project" NUL project). Without the box's key nobody finds the old UID of a new one; with
it, and only with it, the same function gives the same UIDs on another box.
"""

from __future__ import annotations

import hashlib
import hmac

_LONGEST = 64  # PS3.5 section 9.1


class UIDs:
    """The mapping of one project."""

    def __init__(self, key: bytes, project: str) -> None:
        self._key = hmac.digest(key, b"project\0" + project.encode(), "sha256")

    def new(self, old: str) -> str:
        """The new UID for an old one, always the same."""
        return "2.25." + str(_uuid(self._digest("uid", old)))

    def under(self, prefix: str, old: str) -> str:
        """The same below a root that a script names; :class:`ValueError` when that leaves too few digits (38)."""
        prefix = prefix.rstrip(".")
        digits = str(int.from_bytes(self._digest("under", f"{prefix}\0{old}"), "big"))[:_LONGEST - len(prefix) - 1]
        if len(digits) < 20:
            raise ValueError("the root leaves too little room for a UID of 64 characters")
        return f"{prefix}.{digits}"

    def fresh(self, seed: str, count: int) -> str:
        """A UID that nothing else has, the same again for the same object (``seed``) and count."""
        return "2.25." + str(_uuid(self._digest("fresh", f"{seed}\0{count}")))

    def shift_days(self, patient_id: str) -> int:
        """By how many days the dates of a patient move: -1 to -365, the same for all data of the patient.

        Always back, so that nothing lies in the future; blanks around the ID do not count.
        """
        return -1 - int.from_bytes(self._digest("days", patient_id.strip())[:8], "big") % 365

    def _digest(self, purpose: str, text: str) -> bytes:
        return hmac.digest(self._key, f"{purpose}\0{text}".encode("utf-8", "surrogatepass"), hashlib.sha256)


def _uuid(digest: bytes) -> int:
    number = int.from_bytes(digest[:16], "big")
    return number & ~(0xF << 76 | 0x3 << 62) | 0x8 << 76 | 0x2 << 62
