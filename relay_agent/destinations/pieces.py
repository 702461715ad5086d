"""A large file in pieces: which there are, which lack, how large the next is to be, and how they are joined.

A piece is named by the bytes that it holds, ``<from>-<to>`` in 14 digits, so a list of names tells what is there, in
the order in which ``cat`` joins. Nothing about them is kept here: after a crash the server's list says it all.
"""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from relay_agent.kspace.packing import ENCODING
from relay_agent.package import Item

FOLDER = ".parts"  # behind the name of the file
MANIFEST = "manifest.json"  # in that folder, sent when all pieces are there
_NAME = re.compile(r"(\d{14})-(\d{14})(\.zst)?")
_ALIGN = 2**20  # the block of the packing, and so of its words
_FLOOR = 2**20
_FIRST = 8 * 2**20
_PACKED = ".zst"


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Bytes ``start`` to ``end`` of a file, packed or as they are."""

    start: int
    end: int
    packed: bool = False

    @property
    def name(self) -> str:
        """Its file name."""
        return f"{self.start:014d}-{self.end:014d}{_PACKED if self.packed else ''}"

    @classmethod
    def parse(cls, name: str) -> Piece | None:
        """The piece of that name; None for another file."""
        found = _NAME.fullmatch(name)
        return cls(int(found[1]), int(found[2]), bool(found[3])) if found and int(found[1]) < int(found[2]) else None


def cover(pieces: Iterable[Piece], size: int) -> tuple[list[Piece], list[tuple[int, int]]]:
    """The fewest pieces that follow each other, and the gaps between them. Pieces may overlap (late answers)."""
    longest: dict[int, Piece] = {}
    for piece in sorted(piece for piece in pieces if piece.end <= size):
        longest[piece.start] = piece  # of the same start, the one that ends last comes last
    starts = [*longest, size]
    chosen: list[Piece] = []
    gaps: list[tuple[int, int]] = []
    at = 0
    while at < size:
        if at in longest:
            chosen.append(longest[at])
            at = chosen[-1].end
        else:
            end = starts[bisect_right(starts, at)]
            gaps.append((at, end))
            at = end
    return chosen, gaps


def manifest(item: Item, pieces: Sequence[Piece], digests: Sequence[tuple[int, str]]) -> bytes:
    """What tells how to join: ``digests`` are size and MD5 of each piece as it was sent, ``item`` has a file name as
    SOP Instance UID."""
    name = item.sop_instance
    return json.dumps({
        "format": "relay-agent pieces, version 1",
        "file": {"name": name, "size": item.size, "md5": item.md5, "sha256": item.sha256},
        "pieces": [{"name": piece.name, "from": piece.start, "to": piece.end, "size": size, "md5": md5,
                    "encoding": ENCODING if piece.packed else "none"}
                   for piece, (size, md5) in zip(pieces, digests, strict=True)],
        "join": "relay-agent kspace join FOLDER, or python3 join.py FOLDER; without packed pieces also: "
                f"cat {name}{FOLDER}/[0-9]* > {name}, then compare the SHA-256",
    }, indent=1).encode()


class Step:
    """How large the next request is: what the line moves in a set time, but below what was ever cut. Thread-safe.

    A request that is cut halves the ceiling, one that gets through raises it a little, so that a proxy's limit is
    found whatever it counts, and found anew when it changes.
    """

    def __init__(self, seconds: float, largest: int) -> None:
        self._seconds, self._largest = seconds, largest
        self._ceiling = float(largest)
        self._speed = 0.0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the next piece."""
        with self._lock:
            size = min(self._ceiling, self._speed * self._seconds if self._speed else _FIRST)
        return max(int(size) // _ALIGN * _ALIGN, _FLOOR)

    def passed(self, size: int, seconds: float) -> None:
        """A request of this size took so long."""
        with self._lock:
            speed = size / max(seconds, 1e-3)
            # A small piece tells little of a fast line; the next is at most twice as large.
            self._speed = min(speed, 2 * max(size, _FIRST) / self._seconds)
            self._ceiling = min(self._ceiling * 1.05, self._largest)

    def cut(self, size: int) -> None:
        """A request of this size did not get through."""
        with self._lock:
            self._ceiling = max(min(self._ceiling, size / 2), _FLOOR)
