"""Lossless packing of raw data: a shuffle of 4 bytes, then zstd.

Samples are float32 that come from scaled integers of a converter: the bits that vary and those that do not lie side by
side once all first bytes, all second bytes and so on stand together. :mod:`relay_agent.kspace.join` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import zstandard

BLOCK = 2**20  # bytes that are shuffled at a time; a multiple of 4, and known to who unpacks
ENCODING = "shuffle4-1MiB+zstd"
_LEVEL = 1  # others cost much and gain little on these data


def shuffle(block: bytes) -> bytes:
    """All first bytes of the 4-byte words, all second ones, and so on; what is left over stays at the end."""
    whole = len(block) // 4 * 4
    return b"".join((block[0:whole:4], block[1:whole:4], block[2:whole:4], block[3:whole:4], block[whole:]))


def pack(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """One zstd frame; ``blocks`` are of :data:`BLOCK` bytes but for the last. The same bytes give the same frame."""
    packer = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    for block in blocks:
        if packed := packer.compress(shuffle(block)):
            yield packed
    yield packer.flush()
