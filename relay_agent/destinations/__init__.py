"""Destinations: what a shipment can be delivered to. One module a kind, all with the same few verbs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from relay_agent.package import Item, Manifest


class DeliveryError(Exception):
    """A delivery did not get on. The message is for operators: what happened, what to do; no patient values."""


class Retry(DeliveryError):
    """It may work later: look again, send what is missing. ``after`` is a pause in seconds, None for the back-off."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Stopped(DeliveryError):
    """Only a person can help; nothing is tried again until ``relay-agent retry``."""


class Waiting(DeliveryError):
    """Everything is there but not final (in the prearchive); look again later."""

    def __init__(self, message: str, location: str) -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True, slots=True)
class Proof:
    """How the arrival of one instance was proved, for the receipt."""

    sop_instance: str
    how: str  # md5 | content | bytes | find | status
    server_name: str = ""  # the server's name or address of it
    server_size: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a preflight check."""

    ok: bool
    what: str  # what was looked at, and what was found
    remedy: str = ""  # what to do, when not ok


class Destination(Protocol):
    """The verbs. All may be called again after any failure, by another process, at any later time."""

    @property
    def trouble(self) -> str:
        """What operators should know early about the credential; empty when all is well."""

    def idle(self) -> None:
        """Called about once a second while there is nothing to deliver: keep up what would expire."""

    def missing(self, manifest: Manifest, location: str | None) -> Sequence[Item]:
        """The items that the destination does not hold (or not in full), wherever it keeps them.

        ``location`` is what :meth:`finish` or :class:`Waiting` gave earlier, if anything.
        """

    def send(self, manifest: Manifest, part: Sequence[Item]) -> str:
        """Send one part; what the server said, for the receipt. Called from several threads at once."""

    def finish(self, manifest: Manifest) -> str:
        """Make what was sent final (commit, archive); the location for people and for the receipt."""

    def prove(self, manifest: Manifest, location: str) -> Sequence[Proof]:
        """Prove each item's arrival; raises :class:`Retry` naming how many are not proved."""

    def check(self) -> Iterator[Finding]:
        """Preflight: what ``relay-agent check`` shows."""
