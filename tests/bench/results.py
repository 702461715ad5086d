"""Figures, what the project promised of them, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MB = 1e6


@dataclass
class Run:
    """One measurement: a server under a load."""

    section: str
    load: str
    server: str
    instances: int
    bytes: int
    seconds: float
    cpu: float  # seconds, of the server's processes
    largest: int  # peak resident memory in bytes, of the largest process
    together: int  # peak of all processes, shared pages counted once
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A promise and what was measured."""

    what: str
    value: float
    goal: float
    at_least: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return (f"{'met   ' if self.met else 'MISSED'}  {self.what}: {show(self.value)}{_spaced(self.unit)} "
                f"(target: {sign} {show(self.goal)}{_spaced(self.unit)})")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(row[column]) for row in lines) for column in range(len(self.columns))]
        out = [self.title, "-" * len(self.title)]
        # The first two columns are words, the others figures.
        out += ["  ".join(cell.ljust(width) if number < 2 else cell.rjust(width)
                          for number, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                for row in lines]
        return "\n".join([*out, *(f"* {note}" for note in self.notes)])


@dataclass
class Section:
    """What a part of the benchmark found."""

    name: str
    tables: list[Table]
    targets: list[Target]
    runs: list[Run]

    def json(self) -> dict[str, Any]:
        """All of it as data."""
        return {"section": self.name, "runs": [asdict(run) for run in self.runs],
                "targets": [asdict(target) | {"met": target.met} for target in self.targets],
                "tables": [asdict(table) for table in self.tables]}


class Medians:
    """Medians over the rounds of one load on one server."""

    def __init__(self, runs: Iterable[Run], load: str, server: str) -> None:
        self.runs = [run for run in runs if run.load == load and run.server == server]
        self.instances = self.runs[0].instances
        self.rates = [run.instances / run.seconds for run in self.runs]
        self.rate = statistics.median(self.rates)  # instances a second
        self.seconds = statistics.median(run.seconds for run in self.runs)
        self.speed = statistics.median(run.bytes / run.seconds / MB for run in self.runs)  # MB a second
        self.cpu_instance = statistics.median(run.cpu / run.instances * 1000 for run in self.runs)  # ms
        self.cpu_gb = statistics.median(run.cpu / run.bytes * 1e9 for run in self.runs)  # seconds for a GB
        self.largest = max(run.largest for run in self.runs) / MB
        self.together = max(run.together for run in self.runs) / MB

    @property
    def spread(self) -> str:
        """The slowest and the fastest round."""
        return f"{show(min(self.rates))}-{show(max(self.rates))}"

    def more(self, name: str) -> float:
        """The median of a figure of the section's own."""
        return statistics.median(run.more[name] for run in self.runs)


def show(value: float) -> str:
    """A figure with as many digits as it deserves."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(ours: float, theirs: float) -> str:
    """Ours in multiples of theirs."""
    return f"{show(ours / theirs)} ×" if theirs else "?"


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""
