"""De-identify raw data without moving a byte: what identifies is overwritten in the headers, k-space stays as it is.

A :class:`Plan` is made from the headers alone: it holds what is written over the file, at which places. Applied while
the file is copied or sent, it needs no second copy of the data. Value-driven: what the labelled fields held is looked
for in all texts of all measurements and in the table. UIDs are those of :mod:`relay_agent.deidentify.uids`, which the
DICOM side of the project gets, too. They are shorter than those of the vendor: the closing quote moves to the left and
spaces follow it, so that the value is exactly the same on both sides. A UID that is shorter than a new one (44
characters) becomes 2.25, the root alone.

Overwritten with zeros is all that is neither header text nor readout: the rest of the table, the end of a header (real
files hold scraps of the imager's memory there), the gaps. What the readouts themselves say stays: physiology, the time
of day of each readout, and the head, which can be reconstructed to a face. Scrubbed raw data is not anonymous.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from relay_agent.deidentify.uids import UIDs
from relay_agent.kspace import identity, protocol
from relay_agent.kspace.identity import IN_PLACE, KEEPABLE, SHORTEST_UID, UID, Needles
from relay_agent.kspace.twix import BLOCK, Check, Layout, Verdict, check, layout

# What the public tools anonymise. Only VE11 was tried here with files of real scanners.
VERSIONS = frozenset({"VB17", "VB19", "VB20", "VD11", "VD13", "VE11", "VE12", "XA10", "XA11", "XA20", "XA30", "XA31",
                      "XA50", "XA51"})
_ROOT = b"2.25"
_LARGEST_TABLE = 2**20  # bytes before the first measurement; 10,240 in all files that were seen
_PATIENT, _PROTOCOL = slice(24, 88), slice(88, 152)  # of an entry of the table
_UNKNOWN = re.compile(rb"(?i)(?:patients?_?name|patient_?id|birth_?da(?:y|te)|registrationdata)[\"'\]]*\s*[=:>]"
                      rb"(?!\s*(?:\{|\n|\r|\"|[-+\d]))")


class Held(Exception):
    """The file must not leave; the message names places and kinds of fields, never a value."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is written over a file: ``patches`` by place in the file, in order; and the report of it."""

    stamp: tuple[int, int, int]  # the file that was looked at: inode, size, time of its last change
    patches: tuple[tuple[int, bytes], ...]
    report: tuple[tuple[str, str, int], ...]  # where, kind of field, how many
    versions: tuple[str, ...]
    needles: Needles = field(repr=False)  # what identified

    def apply(self, position: int, memory: memoryview) -> None:
        """Write what belongs into these bytes of the file."""
        end = position + len(memory)
        at = max(bisect_left(self.patches, (position, b"")) - 1, 0)
        while at < len(self.patches) and self.patches[at][0] < end:
            place, new = self.patches[at]
            begin, stop = max(place, position), min(place + len(new), end)
            if begin < stop:
                memory[begin - position:stop - position] = new[begin - place:stop - place]
            at += 1


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What :func:`scrub` wrote: the check of the original, and the digest of the result."""

    check: Check
    sha256: str
    md5: str = ""


def plan(path: Path, uids: UIDs, keep: Collection[str] = (), versions: Collection[str] = VERSIONS,
         known: Iterable[str] = ()) -> Plan:
    """What must be written over a file.

    ``keep`` names kinds of fields that the project needs (:data:`identity.KEEPABLE`), ``known`` are values that DICOM
    says of the patient and that must not occur either. Raises :class:`Held`, :class:`NotTwix`, ``OSError``.
    """
    if not KEEPABLE.issuperset(keep):
        raise ValueError(f"only these can be kept: {', '.join(sorted(KEEPABLE))}")
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = layout(file, os.fstat(file).st_size)
        if found.problem:
            raise Held(f"it is not complete: {found.problem}")
        return _Planner(file, found, uids, frozenset(keep), known).plan(versions)
    except protocol.Unreadable as error:
        raise Held(str(error)) from None
    finally:
        os.close(file)


class _Planner:
    def __init__(self, file: int, found: Layout, uids: UIDs, keep: frozenset[str], known: Iterable[str]) -> None:
        self._file, self._found, self._uids, self._keep = file, found, uids, keep
        self._patches: list[tuple[int, bytes]] = []
        self._report: Counter[tuple[str, str]] = Counter()
        self._old: set[bytes] = set()  # UIDs
        self._values = {form for value in known for encoding in ("utf-8", "latin-1")
                        for form in identity.forms("name", value.encode(encoding, "replace"))}

    def plan(self, versions: Collection[str]) -> Plan:
        seen = [self._collect(number) for number in range(len(self._found.measurements))]
        for number, version in enumerate(seen, 1):
            if version not in versions:
                raise Held(f"measurement {number}: the software version {version or 'is not told and'} is not known")
        first = self._found.measurements[0].start
        if first > _LARGEST_TABLE:  # would be read into memory, and only as far as one read goes
            raise Held("bytes lie between its table and its measurements that nobody knows")
        table = os.pread(self._file, first, 0)
        self._add(self._table(table, collect=True), 0)
        needles = Needles(self._values)
        self._patches.clear()
        self._add(self._table(table, needles=needles), 0)
        for number, one in enumerate(self._found.measurements, 1):
            for name, start, text in protocol.texts(self._file, one):
                where = f"measurement {number}, {name}"
                new = self._clean(text, where, needles.present(text))
                self._proved(new, where, needles.present(new))
                self._add(_differences(text, new), start)
        self._fill()
        self._patches.sort()
        return Plan(_stamp(self._file), tuple(self._patches), tuple(
            (where, kind, count) for (where, kind), count in sorted(self._report.items()) if count), tuple(seen),
            needles)

    def _add(self, patches: Iterable[tuple[int, bytes]], start: int) -> None:
        self._patches.extend((start + place, new) for place, new in patches)

    def _collect(self, number: int) -> str:
        """Gather what identifies in a header; the software version."""
        by_name = {}
        for name, _, text in protocol.texts(self._file, self._found.measurements[number]):
            by_name[name] = text
            for value in protocol.values(text, identity.kind):
                kind = identity.kind(value.label)
                if kind not in IN_PLACE and kind not in self._keep:
                    self._values |= identity.forms(kind, text[value.start:value.end])
            for match in UID.finditer(text):
                if len(match[0]) >= SHORTEST_UID:
                    self._old.add(match[0])
                    self._values |= identity.dates(match[0])
        return protocol.version(by_name)

    def _table(self, table: bytes, needles: Needles | None = None, collect: bool = False) -> list[tuple[int, bytes]]:
        """The names in the table of measurements, and what lies behind it."""
        if not self._found.multi:
            return []
        patches = []
        for number in range(len(self._found.measurements)):
            at = 8 + 152 * number
            entry = table[at:at + 152]
            patient, name = entry[_PATIENT].partition(b"\0")[0], entry[_PROTOCOL].partition(b"\0")[0]
            if collect:
                self._values |= identity.forms("name", patient)
            if needles is not None:
                patches.append((at + _PATIENT.start, identity.blank(patient).ljust(64, b"\0")))
                new, count = needles.quoted.subn(_blanked, name)
                patches.append((at + _PROTOCOL.start, new.ljust(64, b"\0")))
                self._report[f"table, measurement {number + 1}", "name"] += 1 + count
        end = 8 + 152 * len(self._found.measurements)
        return [*patches, (end, bytes(len(table) - end))]

    def _clean(self, text: bytes, where: str, needles: Needles) -> bytes:
        """The text, as long as before, without what identifies."""
        if text.count(b'"') % 2:
            raise Held(f"{where}: a quote does not close")
        new = bytearray(text)
        for value in protocol.values(text, identity.kind):
            kind = identity.kind(value.label)
            old = text[value.start:value.end]
            if kind in self._keep or identity.is_blank(old) or _is_uid(old):
                continue
            new[value.start:value.end] = identity.blank(old)
            self._report[where, kind] += 1
        pieces, at = [], 0
        cleaned = bytes(new)
        for token in protocol.TOKEN.finditer(cleaned):
            pieces.append(self._bare(cleaned[at:token.start()], where, needles))
            pieces.append(token[0] if token.lastgroup == "label" else self._quoted(token, where, needles))
            at = token.end()
        pieces.append(self._bare(cleaned[at:], where, needles))
        return b"".join(pieces)

    def _quoted(self, token: re.Match[bytes], where: str, needles: Needles) -> bytes:
        group = token.lastgroup or "text"
        inner = token[group]
        if b"<Param" in inner and b'."' in token[0]:
            raise Held(f"{where}: a quote does not close")
        new, count = UID.subn(self._uid, inner)
        self._report[where, "uid"] += count
        new, count = needles.quoted.subn(_blanked, new)
        self._report[where, "value"] += count
        if new == inner:
            return token[0]
        quote = b'""' if group == "doubled" else b'"'
        return quote + new + quote + b" " * (len(inner) - len(new))

    def _bare(self, text: bytes, where: str, needles: Needles) -> bytes:
        new, count = UID.subn(lambda match: self._uid(match).ljust(len(match[0])), text)
        self._report[where, "uid"] += count
        new, count = needles.bare.subn(_blanked, new)
        self._report[where, "value"] += count
        return new

    def _uid(self, match: re.Match[bytes]) -> bytes:
        old = match[0]
        if len(old) < SHORTEST_UID:
            return old
        new = self._uids.new(old.decode()).encode()
        return new if len(new) <= len(old) else _ROOT

    def _proved(self, text: bytes, where: str, needles: Needles) -> None:
        """Search the result once more: nothing of the original may be left."""
        lower = protocol.contents(text).lower()
        if any(len(needle) >= 8 and needle.lower() in lower for needle in needles.values) or self._holds(text, needles):
            raise Held(f"{where}: an identifying value of the original is left")
        if any(old in text for old in self._old):
            raise Held(f"{where}: a UID of the original is left")
        for value in protocol.values(text, identity.kind):
            kind, left = identity.kind(value.label), text[value.start:value.end]
            if kind not in self._keep and not identity.is_blank(left) and not left.startswith(_ROOT):
                raise Held(f"{where}: the field {value.label} is not blank")
        if _UNKNOWN.search(text):
            raise Held(f"{where}: a name, an ID or a date of birth is written in a way that is not known")

    @staticmethod
    def _holds(text: bytes, needles: Needles) -> bool:
        at = 0
        for token in protocol.TOKEN.finditer(text):
            group = token.lastgroup or "text"
            if needles.bare.search(text, at, token.start()) or (
                    group != "label" and needles.quoted.search(token[group])):
                return True
            at = token.end()
        return needles.bare.search(text, at) is not None

    def _fill(self) -> None:
        """Zeros for what is neither text nor readout, as far as the headers tell."""
        for one in self._found.measurements:
            if one.buffers:
                self._patches.append((one.buffers[-1].end, bytes(one.data - one.buffers[-1].end)))
        if not self._found.multi:
            return
        ends = [one.start for one in self._found.measurements[1:]] + [self._found.size]
        for one, end in zip(self._found.measurements, ends, strict=True):
            if end - one.end >= BLOCK:
                raise Held("bytes lie between its measurements that nobody knows")
            self._patches.append((one.end, bytes(end - one.end)))


def _is_uid(value: bytes) -> bool:
    return len(value) >= SHORTEST_UID and UID.fullmatch(value) is not None


def _blanked(match: re.Match[bytes]) -> bytes:
    return identity.blank(match[0])


def _differences(old: bytes, new: bytes, near: int = 64) -> list[tuple[int, bytes]]:
    """Where the texts differ, runs that are near each other in one."""
    if len(old) != len(new):
        raise AssertionError("a text changed its length")
    found: list[tuple[int, int]] = []
    for at in range(0, len(old), near):
        if old[at:at + near] != new[at:at + near]:
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], at + near
            else:
                found.append((at, at + near))
    return [(start, new[start:end]) for start, end in found]


def _stamp(file: int | Path) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Copy:
    """Follows the reading of a file and takes digests of what the plan makes of it."""

    def __init__(self, path: Path, made: Plan, md5: bool) -> None:
        self._made = made
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.stamp = _stamp(self._file)
        self.rests: list[tuple[int, int]] = []
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if md5 else None

    def sync(self, start: int, end: int) -> None:
        """Physiology is binary; a name in it would be news."""
        if self._made.needles.plain(os.pread(self._file, end - start, start)):
            raise Held("an identifying value stands among its readouts")

    def rest(self, start: int, end: int) -> None:
        """Padding; it may hold scraps of memory."""
        if end - start >= BLOCK:
            raise Held("bytes lie behind the end of an acquisition that nobody knows")
        self.rests.append((start, end))

    def take(self, position: int, memory: memoryview) -> None:
        """Change the bytes as the plan says."""
        self._made.apply(position, memory)
        for start, end in self.rests:
            begin, stop = max(start - position, 0), min(end - position, len(memory))
            if begin < stop:
                memory[begin:stop] = bytes(stop - begin)
        self.sha256.update(memory)
        if self.md5 is not None:
            self.md5.update(memory)

    def close(self) -> None:
        """Close what it opened."""
        os.close(self._file)


def scrub(path: Path, made: Plan, target: Path | None, md5: bool = False) -> Scrubbed:
    """Check and copy a file in one pass, de-identified; ``target`` must not exist yet, None only takes digests.

    The copy shares the blocks that do not change with the original where the file system can (ZFS, XFS, Btrfs).

    Raises :class:`Held` when the file is not as the plan found it, or holds what may be identifying text among its
    readouts; ``OSError``. Nothing is left at ``target`` then.
    """
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640) if target is not None else None
    done = False
    try:
        with closing(_Copy(path, made, md5)) as copy:
            if out is not None:
                _clone(path, out)
            found = check(path, copy)
            same = copy.stamp == made.stamp == _stamp(path)
        if found.verdict not in (Verdict.COMPLETE, Verdict.ABORTED):
            raise Held(f"it is {found.verdict}: {found.reason}")
        if not same:
            raise Held("it has changed since it was looked at")
        if out is not None:
            for place, new in (*made.patches, *((start, bytes(end - start)) for start, end in copy.rests)):
                os.pwrite(out, new, place)
        done = True
    finally:
        if out is not None and target is not None:
            os.close(out)
            if not done:
                target.unlink()
    return Scrubbed(found, copy.sha256.hexdigest(), copy.md5.hexdigest() if copy.md5 is not None else "")


def _clone(path: Path, out: int) -> None:
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while os.copy_file_range(source, out, 2**30):
            pass
    finally:
        os.close(source)
