"""Bandwidth and time windows, with clocks of the test's own."""

from __future__ import annotations

import threading
import time as wall
from datetime import datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_agent.config_values import Window
from relay_agent.throttle import Closed, Throttle


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def throttle(bandwidth: float | None, clock: Clock) -> Throttle:
    return Throttle(bandwidth, clock=clock, sleep=clock.sleep)


@given(st.lists(st.binary(max_size=5000), max_size=10), st.integers(1000, 10**6))
def test_all_bytes_come_in_their_order_and_not_faster_than_allowed(blocks: list[bytes], bandwidth: int) -> None:
    clock = Clock()
    out, start = b"", clock.now
    for piece in throttle(bandwidth, clock).paced(blocks):
        out += piece
        # A tenth of a second's worth may go ahead.
        assert clock.now - start >= len(out) / bandwidth - 0.1001
    assert out == b"".join(blocks)
    assert clock.now - start == pytest.approx(max(len(out) / bandwidth - 0.1, 0), abs=0.1)


def test_without_a_limit_nothing_waits_and_blocks_stay_whole() -> None:
    clock = Clock()
    blocks = [bytes(10**6), b"x"]
    assert list(throttle(None, clock).paced(blocks)) == blocks and clock.now == 1000.0


def test_several_streams_share_one_limit() -> None:
    clock = Clock()
    shared = throttle(1000.0, clock)
    streams = [shared.paced([bytes(5000)]) for _ in range(3)]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
    assert clock.now - 1000.0 == pytest.approx(15, abs=0.2)


def test_threads_share_one_limit() -> None:
    shared = Throttle(200_000.0)
    started = wall.monotonic()
    threads = [threading.Thread(target=lambda: list(shared.paced([bytes(25_000)]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wall.monotonic() - started > 0.35  # half a second's worth, a tenth of which may go at once


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    shared = throttle(1000.0, clock)
    list(shared.paced([bytes(1000)]))
    clock.now += 3600
    start = clock.now
    list(shared.paced([bytes(10_000)]))
    assert clock.now - start == pytest.approx(9.9, abs=0.11)


def window(start: str, end: str, bandwidth: str | None = None) -> Window:
    return Window.model_validate({"start": start, "end": end} | ({"bandwidth": bandwidth} if bandwidth else {}))


@pytest.mark.parametrize(("start", "end", "at", "open_"), [
    ("18:00", "06:00", "18:00", True), ("18:00", "06:00", "17:59:59", False), ("18:00", "06:00", "00:00", True),
    ("18:00", "06:00", "05:59:59", True), ("18:00", "06:00", "06:00", False), ("08:00", "12:00", "08:00", True),
    ("08:00", "12:00", "12:00", False), ("08:00", "12:00", "07:59:59", False), ("00:00", "23:59", "12:00", True)])
def test_windows_include_their_start_and_not_their_end(start: str, end: str, at: str, open_: bool) -> None:
    now = datetime.combine(datetime(2026, 1, 2), time.fromisoformat(at))
    found = Throttle(None, [window(start, end)], now=lambda: now)
    if open_:
        assert found.limit() is None
    else:
        with pytest.raises(Closed):
            found.limit()


@pytest.mark.parametrize(("at", "seconds"), [("06:00", 12 * 3600), ("17:59:30", 30), ("12:30", 1800)])
def test_closed_says_when_the_next_window_opens(at: str, seconds: float) -> None:
    now = datetime.combine(datetime(2026, 1, 2), time.fromisoformat(at))
    windows = [window("18:00", "06:00")] + ([window("13:00", "14:00")] if at == "12:30" else [])
    with pytest.raises(Closed) as caught:
        Throttle(None, windows, now=lambda: now).limit()
    assert caught.value.seconds == seconds


TIMES = st.times().map(lambda moment: moment.replace(microsecond=0))


@given(TIMES, TIMES.filter(bool), st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)))
def test_whoever_comes_back_when_told_finds_it_open(start: time, end: time, now: datetime) -> None:
    if start == end:
        return
    windows = [Window(start=start, end=end)]
    try:
        Throttle(None, windows, now=lambda: now).limit()
    except Closed as closed:
        assert 0 < closed.seconds <= 86400
        later = now + timedelta(seconds=closed.seconds)
        assert Throttle(None, windows, now=lambda: later).limit() is None


def test_a_windows_own_limit_comes_before_the_destinations() -> None:
    windows = [window("08:00", "12:00", "80 kbit/s"), window("12:00", "13:00")]
    for hour, limit in ((9, 10_000), (12, 500)):
        assert Throttle(500.0, windows, now=lambda hour=hour: datetime(2026, 1, 2, hour)).limit() == limit


def test_a_window_that_ends_stops_the_stream_on_its_way() -> None:
    moments = [datetime(2026, 1, 2, 11, 59), datetime(2026, 1, 2, 12, 0)]
    paced = Throttle(None, [window("08:00", "12:00")], now=lambda: moments.pop(0)).paced([b"a", b"b"])
    assert next(paced) == b"a"
    with pytest.raises(Closed):
        next(paced)


def test_one_within_another_keeps_to_both() -> None:
    """Raw data have a limit of their own, and count against that of the destination."""
    clock = Clock()
    outer = throttle(100_000.0, clock)
    inner = Throttle(40_000.0, within=outer, clock=clock, sleep=clock.sleep)
    assert inner.limit() == 40_000.0
    assert b"".join(inner.paced([bytes(400_000)])) == bytes(400_000)
    assert clock.now - 1000.0 == pytest.approx(10, abs=0.3)
    began = clock.now
    streams = [inner.paced([bytes(400_000)]), outer.paced([bytes(600_000)])]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
    assert clock.now - began >= 9.8  # 1 MB through the outer one
    assert Throttle(None, within=outer).limit() == 100_000.0
    night, day = [window("18:00", "06:00")], [window("06:00", "18:00")]
    at = datetime(2026, 1, 2, 12)
    for own, others in ((night, day), (day, night)):
        with pytest.raises(Closed) as caught:
            Throttle(None, own, Throttle(None, others, now=lambda: at), now=lambda: at).limit()
        assert caught.value.seconds == 6 * 3600
