"""Bandwidth limits and time windows of one destination, shared by its streams; and narrower ones within them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta

from relay_agent.config_values import Window

_SLICE = 0.1  # seconds of the limit that may go out at once


class Closed(Exception):
    """No window is open; ``seconds`` until one opens."""

    def __init__(self, seconds: float) -> None:
        super().__init__("outside the destination's time windows")
        self.seconds = seconds


class Throttle:
    """Says when the next bytes may go. Thread-safe; one for each destination, and one ``within`` it for raw data."""

    def __init__(self, bandwidth: float | None, windows: Sequence[Window] = (), within: Throttle | None = None, *,
                 now: Callable[[], datetime] = datetime.now, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self._bandwidth = bandwidth
        self._windows = windows
        self._within = within
        self._now, self._clock, self._sleep = now, clock, sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def limit(self) -> float | None:
        """Bytes per second that are allowed now, None for no limit; :class:`Closed` outside all windows."""
        own, outer = self._own(), self._within.limit() if self._within is not None else None
        return own if outer is None else outer if own is None else min(own, outer)

    def _own(self) -> float | None:
        if not self._windows:
            return self._bandwidth
        now = self._now()
        for window in self._windows:
            if window.holds(now.time()):
                return window.bandwidth if window.bandwidth is not None else self._bandwidth
        raise Closed(min(_until(window, now) for window in self._windows))

    def paced(self, stream: Iterable[bytes]) -> Iterator[bytes]:
        """The same bytes, not faster than allowed; :class:`Closed` when the window ends on the way."""
        for block in self._within.paced(stream) if self._within is not None else stream:
            limit = self._own()
            if limit is None:
                yield block
                continue
            step = max(int(limit * _SLICE), 1024)
            for position in range(0, len(block), step):
                piece = block[position:position + step]
                self._wait(len(piece), limit)
                yield piece

    def _wait(self, count: int, limit: float) -> None:
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - _SLICE)  # an idle moment is not saved up
            self._free_at = start + count / limit
            pause = self._free_at - now
        if pause > 0:
            self._sleep(pause)


def _until(window: Window, now: datetime) -> float:
    opens = now.replace(hour=window.start.hour, minute=window.start.minute, second=window.start.second, microsecond=0)
    if opens <= now:
        opens += timedelta(days=1)
    return (opens - now).total_seconds()
