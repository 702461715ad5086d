"""Test clients made of pynetdicom, mended in two places."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pynetdicom import evt
from pynetdicom.association import Association

_ASLEEP = 5.0  # seconds in which the reactor has to come by; it does so every millisecond


def no_delay(event: evt.Event) -> None:
    """Switch Nagle's algorithm off (a handler of EVT_CONN_OPEN): it costs 40 ms an instance, and is left on."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def undisturbed(association: Association) -> Iterator[None]:
    """Keep an established association's reactor asleep while we send and wait for answers ourselves.

    pynetdicom's ``send_*`` methods pause it for each message, but look at a flag that the reactor sets a moment
    before it sleeps: an answer that comes at once may be taken off the queue by the reactor and is lost.

    A report (N-EVENT-REPORT) is served in a thread of its own, which takes the flag away when it ends: join it before,
    or the next ``send_*`` or ``release`` waits for ever for a reactor that sleeps already.
    """
    before, hold = association._reactor_checkpoint, _Hold(association)
    association._reactor_checkpoint = hold
    try:
        hold.asleep.wait(_ASLEEP)
        yield
    finally:
        association._reactor_checkpoint = before
        hold.end()


class _Hold(threading.Event):
    """A checkpoint that stays closed: pynetdicom's own ``set`` and ``clear`` do nothing to it."""

    def __init__(self, association: Association) -> None:
        super().__init__()
        self._association = association
        self.asleep = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self._association._is_paused = True  # again: a report's thread may have ended since the reactor said so
        self.asleep.set()
        return super().wait(timeout)

    def set(self) -> None:
        """Ignored, see :meth:`end`."""

    def end(self) -> None:
        """Let the reactor go on."""
        super().set()
