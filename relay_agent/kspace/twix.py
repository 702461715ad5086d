"""Siemens raw data (TWIX, ``meas_*.dat``): where its parts lie, and whether the file is complete.

Two families, both little-endian. VB: one measurement from byte 0. VD, VE and XA ("multi-RAID"): a table of up to 64
measurements, each at a multiple of 512. A measurement is a header (named text buffers) and readouts, each led by a
measurement data header (MDH). What the vendor does not publish is as the public readers have it (twixtools,
siemens_to_ismrmrd, Yarra). These readers are no test of completeness: of a file that was cut, they return more readouts
than it ever had.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

_TABLE, _ENTRY, _MOST = 8, 152, 64
_SMALLEST, _LARGEST = 10_000, 5_000_000  # header of VB, bytes
_LARGEST_VD = 2**24
_FARTHEST = 2**62
_XPROTOCOL = b"<XProtocol>"
BLOCK = 512
_CHUNK = 2**18  # stays in the cache of the core, so hashing does not wait for memory
_CARRY = 64  # more than the part of an MDH that is read
_LENGTH = 0x01FFFFFF
_ACQEND, _SYNC = 1, 1 << 5
_TICK = 0.0025  # seconds of an MDH's time stamp, since midnight
_MDH = {False: (struct.Struct("<Ii4xI4xQHH"), 0, 128), True: (struct.Struct("<Ii4xI24xQHH"), 192, 32)}


class Verdict(StrEnum):
    """What a file is worth."""

    COMPLETE = "complete"
    ABORTED = "aborted"  # finished by its writer, without the mark that ends an acquisition: the scan was stopped
    INCOMPLETE = "incomplete"  # cut, still written, or never finished: to be fetched again
    NOT_TWIX = "not TWIX"


class NotTwix(ValueError):
    """The file is no Siemens raw data; the message says by which sign."""


class _Incomplete(Exception):
    """The header ends before it should."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A named text of a measurement's header: bytes ``start`` to ``end`` of the file."""

    name: str
    start: int
    end: int


@dataclass(slots=True)
class Measurement:
    """One measurement: where it lies (bytes of the file), and what its readouts told."""

    uid: int | None  # measId_ of the table; VB: that of the first readout
    start: int
    end: int  # as declared; VB, or never declared: the end of the file
    data: int = 0  # where the readouts begin
    buffers: tuple[Buffer, ...] = ()
    declared: bool = True
    readouts: int = 0  # with samples
    syncs: int = 0  # SYNCDATA: physiology and the like
    first: float | None = None  # time of the first readout, seconds since midnight of the scanner's clock
    last: float | None = None
    acqend: int = 0  # where the readouts end; 0 without the mark
    problem: str = ""


@dataclass(slots=True)
class Layout:
    """Where everything lies in a file."""

    multi: bool  # VD, VE, XA
    size: int
    measurements: list[Measurement]
    problem: str = ""  # why it cannot be complete


@dataclass(slots=True)
class Check:
    """The result of :func:`check`; ``sha256`` is that of the bytes that were read."""

    verdict: Verdict
    reason: str
    size: int
    sha256: str
    multi: bool = False
    measurements: list[Measurement] = field(default_factory=list)


class Follower(Protocol):
    """Is told of a file while :func:`check` reads it, in the order of the file."""

    def sync(self, start: int, end: int) -> None:
        """These bytes of the file, to be read soon, are a block of SYNCDATA."""

    def rest(self, start: int, end: int) -> None:
        """These bytes, to be read soon, lie between the end of an acquisition and that of its measurement."""

    def take(self, position: int, memory: memoryview) -> None:
        """The next bytes of the file, hashed already, in memory that may be changed and is used again."""


def layout(file: int, size: int) -> Layout:
    """Where the parts lie, from some small reads of an open file of ``size`` bytes. Raises :class:`NotTwix`."""
    head = os.pread(file, _TABLE, 0)
    if len(head) < _TABLE:
        raise NotTwix("shorter than any header")
    first, count = struct.unpack("<II", head)
    if first == 0 and 1 <= count <= _MOST:
        return _multi(file, size, count)
    if not _SMALLEST <= first <= _LARGEST:
        raise NotTwix("neither a table of measurements nor the length of a header at its beginning")
    found = Layout(False, size, [Measurement(None, 0, size, declared=False)])
    try:
        _header(file, found.measurements[0], size)
    except _Incomplete as error:
        found.problem = str(error)
    return found


def _multi(file: int, size: int, count: int) -> Layout:
    table = os.pread(file, _ENTRY * count, _TABLE)
    found = Layout(True, size, [])
    if len(table) < _ENTRY * count:
        found.problem = "it ends within the table of measurements"
    least = _TABLE + _ENTRY * count
    for number, at in enumerate(range(0, len(table) - 23, _ENTRY), 1):
        uid, _, offset, length = struct.unpack_from("<iIQQ", table, at)
        if number > 1 and not offset and not length:
            found.problem = found.problem or f"its writer never began measurement {number}"
            break
        if offset < least or offset % BLOCK or offset + length > _FARTHEST:
            raise NotTwix("its table of measurements points to nowhere")
        one = Measurement(uid, offset, offset + length, declared=bool(length))
        if not length:  # a fact that its writer puts there at the end
            one.end = max(size, offset)
            found.problem = found.problem or f"its writer never finished measurement {number}"
        if one.end > size or offset >= size:
            found.problem = found.problem or f"it ends before measurement {number} does"
        least = one.end if length else offset + BLOCK
        found.measurements.append(one)
        try:
            _header(file, one, size)
        except _Incomplete as error:
            found.problem = found.problem or f"measurement {number}: {error}"
    if not found.problem and size - found.measurements[-1].end >= BLOCK:
        found.problem = "more follows than its table knows of"
    for one, after in zip(found.measurements, found.measurements[1:], strict=False):
        if not one.declared:
            one.end = min(one.end, after.start)
    return found


def _header(file: int, one: Measurement, size: int) -> None:
    """Find the buffers of a header."""
    start = os.pread(file, 64, one.start)
    if not any(start) and one.start + len(start) <= size:  # space was set aside and nothing written yet
        raise _Incomplete("its header is missing")
    name, _, rest = start[8:].partition(b"\0")
    if len(start) >= 19 + len(_XPROTOCOL) and not (name.isalpha() and rest[4:].startswith(_XPROTOCOL)):
        raise NotTwix("its header does not begin with an XProtocol")
    if len(start) < 19 + len(_XPROTOCOL):
        if not one.start:
            raise NotTwix("shorter than any header")
        raise _Incomplete("it ends within the header")
    length, count = struct.unpack_from("<II", start)
    one.data = one.start + length
    beyond = one.declared and one.start < one.end <= size and one.data > one.end
    if length > _LARGEST_VD or not count or beyond:
        one.data = 0
        raise NotTwix("its header is larger than its measurement")
    if one.data > size:
        one.data = 0
        raise _Incomplete("it ends within the header")
    text, at, buffers = os.pread(file, length, one.start), 8, []
    for _ in range(count):
        end = text.find(b"\0", at, at + 64)
        if end < 0 or end + 5 > length:
            raise _Incomplete("its header is damaged")
        begin = end + 5
        stop = begin + int.from_bytes(text[end + 1:begin], "little")
        if stop > length:
            raise _Incomplete("its header is damaged")
        buffers.append(Buffer(text[at:end].decode("latin-1"), one.start + begin, one.start + stop))
        at = stop
    one.buffers = tuple(buffers)


class _Walk:
    """Follows the readouts of all measurements through the chunks of a file."""

    def __init__(self, found: Layout, follower: Follower | None) -> None:
        self._follower = follower
        self._mdh, self._once, self._channel = _MDH[found.multi]
        self._parts = [one for one in found.measurements if one.data]
        self._at = self._parts[0].data if self._parts else found.size

    def feed(self, memory: bytearray, base: int, end: int) -> None:
        """``memory`` holds the bytes from ``base`` to ``end`` of the file."""
        while self._parts:
            one = self._parts[0]
            if not self._follow(one, memory, base, min(one.end, end)) and end < one.end:
                return  # the next readout lies further on
            if not (one.declared or one.problem or one.acqend) and (self._at != one.end or not one.readouts):
                one.problem = "ends within a readout"
            self._parts.pop(0)
            if self._parts:
                self._at = self._parts[0].data

    def _follow(self, one: Measurement, memory: bytearray, base: int, end: int) -> bool:
        """Walk as far as the memory reaches; True when the measurement is done with."""
        unpack, need = self._mdh.unpack_from, self._mdh.size
        once, channel, at, uid = self._once, self._channel, self._at, one.uid
        readouts, first, ticks = 0, one.first is None, 0
        problem = ""
        while at + need <= end:
            word, owner, now, mask, samples, channels = unpack(memory, at - base)
            if uid is None:
                uid = one.uid = owner
            if owner != uid:
                problem = "holds a readout of another measurement"
                break
            if mask & (_ACQEND | _SYNC):
                step = word & _LENGTH
                problem = self._special(one, at, step, mask)
                if problem or one.acqend:
                    break
            else:
                if not channels:
                    problem = "holds a readout without channels"
                    break
                step = once + channels * (channel + 8 * samples)
                readouts += 1
                ticks = now
                if first:
                    one.first, first = now * _TICK, False
            at += step
        self._at, one.readouts, one.problem = at, one.readouts + readouts, problem
        if readouts:
            one.last = ticks * _TICK
        return bool(problem or one.acqend)

    def _special(self, one: Measurement, at: int, step: int, mask: int) -> str:
        """SYNCDATA, or the end of the acquisition; what is wrong with it."""
        if step < (self._once or self._channel):
            return "holds a block without length"
        if not mask & _ACQEND:
            one.syncs += 1
            if self._follower is not None:
                self._follower.sync(at, at + step)
        elif at + step > one.end:
            return "ends within its last block"
        else:
            one.acqend = at + step
            if self._follower is not None:
                self._follower.rest(one.acqend, one.end)
        return ""


def check(path: Path, follower: Follower | None = None) -> Check:
    """Read a file once, from end to end in constant memory, and say what it is worth; ``OSError``."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.fstat(file)
        try:
            found = layout(file, before.st_size)
        except NotTwix as error:
            return Check(Verdict.NOT_TWIX, str(error), before.st_size, _read(file, before.st_size, None, follower))
        sha256 = _read(file, before.st_size, _Walk(found, follower), follower)
        after = os.fstat(file)
    finally:
        os.close(file)
    verdict, reason = _judge(found)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        verdict, reason = Verdict.INCOMPLETE, "it changed while it was read"
    return Check(verdict, reason, found.size, sha256, found.multi, found.measurements)


def _read(file: int, size: int, walk: _Walk | None, follower: Follower | None) -> str:
    sha256 = hashlib.sha256()
    memory = bytearray(_CARRY + min(_CHUNK, size))
    view = memoryview(memory)
    position = 0
    while position < size:
        count = os.preadv(file, [view[_CARRY:]], position)
        if not count:
            break  # cut since: its size has changed
        chunk = view[_CARRY:_CARRY + count]
        sha256.update(chunk)
        if walk is not None:
            walk.feed(memory, position - _CARRY, position + count)
        tail = bytes(view[count:count + _CARRY])
        if follower is not None:
            follower.take(position, chunk)
        memory[:_CARRY] = tail  # an MDH may lie across the border
        position += count
    return sha256.hexdigest()


def _judge(found: Layout) -> tuple[Verdict, str]:
    many = len(found.measurements) > 1
    for number, one in enumerate(found.measurements, 1):
        if one.problem and not found.problem:
            found.problem = f"measurement {number} {one.problem}" if many else f"it {one.problem}"
    if found.problem:
        return Verdict.INCOMPLETE, found.problem
    for number, one in enumerate(found.measurements, 1):
        if not one.acqend:
            return Verdict.ABORTED, f"measurement {number} has no end of acquisition (ACQEND)" + (
                "" if found.multi else "; a VB file that was cut between two readouts looks the same")
    return Verdict.COMPLETE, ""
