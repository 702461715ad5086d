"""What a server costs: CPU time and peak memory of a process with everything that it forked, from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_EVERY = 0.1  # seconds between looks: processes' own peaks are kept by the kernel, children may end meanwhile
_SHARED_EVERY = 5  # looks between those at shared memory, which cost more


@dataclass
class Cost:
    """Filled when the measurement is over."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds
    peaks: dict[int, int] = field(default_factory=dict)  # resident bytes by process
    together: int = 0  # peak of the resident bytes of all processes, pages that they share counted once

    @property
    def largest(self) -> int:
        """Peak resident memory of the largest process."""
        return max(self.peaks.values(), default=0)


def tree(roots: Sequence[int]) -> list[int]:
    """Processes with all their descendants."""
    found = list(roots)
    for pid in found:  # it grows
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text(encoding="ascii").split()]
    return found


def cpu(roots: Sequence[int]) -> float:
    """CPU seconds that processes, their descendants and their ended children have used."""
    ticks = 0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            ticks += sum(int(value) for value in text.rpartition(")")[2].split()[11:15])
    return ticks / _TICK


def _together(root: int) -> int:
    """Resident memory of a process and what it forked: each page once, files' pages as of the process with most."""
    found = [_kilobytes(f"/proc/{pid}/smaps_rollup") for pid in tree([root])]
    files = max((one.get("Rss", 0) - one.get("Anonymous", 0) for one in found), default=0)
    return files + sum(one.get("Pss_Anon", 0) for one in found)


def _kilobytes(file: str) -> dict[str, int]:
    """The lines of a file in /proc that tell kB, in bytes; empty when the process is gone."""
    with contextlib.suppress(OSError):
        rows = (row.split() for row in Path(file).read_text(encoding="utf-8", errors="replace").splitlines())
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
    return {}


@contextmanager
def measured(roots: Sequence[int]) -> Iterator[Cost]:
    """Measure what happens inside; wall time too."""
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    cost, over = Cost(), threading.Event()

    def look(shared: bool) -> None:
        for pid in tree(roots):
            cost.peaks[pid] = max(cost.peaks.get(pid, 0), _kilobytes(f"/proc/{pid}/status").get("VmHWM", 0))
        if shared:
            cost.together = max(cost.together, sum(_together(root) for root in roots))

    def watch() -> None:
        looks = 0
        while not over.wait(_EVERY):
            look(looks % _SHARED_EVERY == 0)
            looks += 1

    watcher = threading.Thread(target=watch, daemon=True)
    before, start = cpu(roots), time.monotonic()
    watcher.start()
    try:
        yield cost
    finally:
        cost.seconds = cost.seconds or time.monotonic() - start
        over.set()
        watcher.join()
        look(True)
        cost.cpu = cpu(roots) - before
