"""Quantities as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_agent import units

SECONDS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}


@pytest.mark.parametrize(("text", "seconds"), [
    ("90 s", 90), ("5 min", 300), ("12 h", 43200), ("7 d", 604800), ("250 ms", 0.25), ("1.5 h", 5400), (" 5min ", 300),
    ("0 s", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert units.duration(text) == seconds


@pytest.mark.parametrize(("text", "count"), [
    ("64 MiB", 67108864), ("2 GB", 2 * 10**9), ("1 B", 1), ("0.5 KiB", 512), ("5 TiB", 5 * 2**40), ("3 kB", 3000)])
def test_sizes(text: str, count: int) -> None:
    assert units.size(text) == count and isinstance(units.size(text), int)


@pytest.mark.parametrize(("text", "bytes_per_second"), [
    ("24 Mbit/s", 3_000_000), ("3 MB/s", 3_000_000), ("1 Gbit/s", 125_000_000), ("8 kbit/s", 1000), ("9 B/s", 9)])
def test_rates(text: str, bytes_per_second: float) -> None:
    assert units.rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["5", "min", "5 minutes", "5 MIN", "-5 min", "5 min 3 s", "1e3 s", "5,5 s", "", 5,
                                  None, True, ["5 s"], "٥ s", "5 MB"])
def test_anything_else_is_refused_with_the_units_and_an_example(text: object) -> None:
    with pytest.raises(ValueError, match=re.escape("ms, s, min, h, d, for example \"5 min\"")):
        units.duration(text)


@pytest.mark.parametrize(("read", "text"), [(units.size, "5 Gb"), (units.size, "24 Mbit/s"), (units.rate, "24 Mb/s"),
                                            (units.rate, "3 MB")])
def test_bits_and_bytes_are_not_mixed_up(read: object, text: str) -> None:
    with pytest.raises(ValueError, match="for example"):
        read(text)  # type: ignore[operator]


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (10**6, "1 MB"), (2_500_000, "2.5 MB"),
    (123_456_789, "123 MB"), (5 * 2**30, "5.37 GB"), (7 * 10**15, "7000 TB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert units.show_size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (0.4, "0 s"), (-3, "0 s"), (59.9, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3600, "1 h"),
    (90061, "1 d 1 h"), (86401, "1 d 1 s")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert units.show_duration(seconds) == text


@given(st.integers(0, 10**15))
def test_a_size_that_is_shown_is_within_a_half_percent(count: int) -> None:
    shown = units.show_size(count)
    assert re.fullmatch(r"\d+(\.\d+)? (B|kB|MB|GB|TB)", shown)
    assert abs(units.size(shown) - count) <= max(count * 0.005, 0.5)


@given(st.integers(0, 10**8))
def test_a_duration_that_is_shown_is_never_longer_nor_much_shorter(seconds: int) -> None:
    back = sum(float(number) * SECONDS[unit] for number, unit in
               re.findall(r"(\d+) (\w+)", units.show_duration(seconds)))
    assert back <= seconds < back + max(60, back / 24)


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)))
def test_every_written_duration_reads_as_number_times_unit(number: int, unit: str) -> None:
    assert units.duration(f"{number} {unit}") == pytest.approx(number * SECONDS[unit])
