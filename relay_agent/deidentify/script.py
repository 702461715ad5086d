"""What all anonymisation engines share: the script, what it is told of the object, and how it may end.

An engine changes one object in place, once. Whatever it cannot do exactly as its script says is :class:`Failed`: the
object is then thrown away, and nothing of it leaves the box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File


class ScriptError(Exception):
    """The script cannot be used; the message says what was expected. Line and column count from 1, 0 is unknown."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        where = f"line {line}, column {column}: " if column else f"line {line}: " if line else ""
        super().__init__(where + message)
        self.line = line
        self.column = column


class Failed(Exception):
    """The object cannot be de-identified; ``rule`` names where in the script, the message never holds a value."""

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(f"{rule}: {message}" if rule else message)
        self.rule = rule


class Rejected(Exception):
    """The script says that this object does not go on (DicomEdit ``reject[]``, CTP ``@quarantine()``, a filter)."""

    def __init__(self, rule: str = "") -> None:
        super().__init__(f"{rule}: rejected by the script" if rule else "rejected by the script")
        self.rule = rule


@dataclass(slots=True)
class Context:
    """What a script may know beside the object.

    ``number(kind, value)`` gives each value of a kind the next whole number, for ever the same (CTP ``@integer``).
    Nothing in here is random and ``now`` is fixed for a shipment: an approved result can be made again, bit for bit.
    """

    uids: UIDs
    project: str | None = None
    subject: str | None = None
    session: str | None = None
    now: datetime = field(default_factory=datetime.now)
    number: Callable[[str, str], int] | None = None
    rule: str = ""  # where the engine is in its script, for messages and for the list of changes: "site.das line 12"
    fresh: int = 0  # UIDs made for this object so far


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a script that its author should know; ``grave`` when it will not run."""

    text: str
    line: int = 0
    grave: bool = False


class Script(Protocol):
    """One anonymisation script, parsed; usable for any number of objects, from one thread at a time."""

    name: str
    language: str  # as shown to people: "DicomEdit 6.6", "CTP DicomAnonymizer", "PS3.15 2024b"

    def apply(self, file: File, context: Context) -> None:
        """Change the object. Raises :class:`Failed` or :class:`Rejected`, and then leaves it in no certain state."""

    def findings(self) -> list[Finding]:
        """What the author should know: unknown functions, statements without effect, where the original fails open."""

    def touches(self) -> set[int]:
        """Tags (gggg * 65536 + eeee) that the script names by themselves, public ones only."""
