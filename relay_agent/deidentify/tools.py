"""For authors of scripts: what a script changed, what it leaves to change, and what would survive on real data.

Everything returned is plain data; ``dataclasses.asdict`` makes it ready for JSON. Values of patients are in
:class:`Change` only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.datadict import keyword_for_tag

from relay_agent import charset
from relay_agent.dataset import EXPLICIT, TEXT, Broken, Dataset, Element
from relay_agent.deidentify import residue
from relay_agent.deidentify.forms import fold
from relay_agent.deidentify.profile.table import CURVES, OVERLAY_COMMENTS, OVERLAYS, attributes, row_tag
from relay_agent.deidentify.script import Context, Failed, Rejected, Script
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File

_LONGEST = 256  # characters of a value that are shown
_NUMBERS = 16
_NOT_STORED = 0x0004  # up to this group: commands, File Meta (which is written anew), directories
_REPEATING = {CURVES: "curves (50xx)", OVERLAYS: "overlays (60xx)", OVERLAY_COMMENTS: "OverlayComments (60xx,4000)"}


@dataclass(frozen=True, slots=True)
class Change:
    """One element that differs; None stands for absent. Text is decoded, binary values are size and digest."""

    path: str
    tag: int
    keyword: str
    before: str | None
    after: str | None
    private: bool


@dataclass(frozen=True, slots=True)
class Survival:
    """One identifying attribute of PS3.15, over all files: in how many it was, in how many its value is left."""

    tag: int
    keyword: str
    action: str  # of the Basic Profile
    present: int
    survived: int


@dataclass(frozen=True, slots=True)
class Leak:
    """A place where an identifier survived; the tag of the original that held it (0: text that cannot be decoded)."""

    path: str
    source: int
    files: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What scripts do to real data."""

    files: int
    done: int
    rejected: int
    failures: list[tuple[str, str]]  # file, reason
    attributes: list[Survival]
    leaks: list[Leak]
    private: Survival
    planted: list[int] = field(default_factory=list)  # for each planted text, in how many results it is


def difference(before: Dataset, after: Dataset) -> list[Change]:
    """What differs between two data sets at any level, in tag order; a sequence is shown besides what is in it."""
    return list(_difference(before, after, ""))


def _difference(before: Dataset | None, after: Dataset | None, at: str) -> Iterator[Change]:
    tags = {element.tag for data in (before, after) if data is not None for element in data}
    for tag in sorted(tags):
        old = before.get(tag) if before is not None else None
        new = after.get(tag) if after is not None else None
        old_items = before.items(tag) if before is not None else ()
        new_items = after.items(tag) if after is not None else ()
        path = residue.path_text((), tag)
        if old_items or new_items:
            if len(old_items) != len(new_items) or old is None or new is None:
                yield _change(at + path, tag, _items(old, old_items), _items(new, new_items))
            for index in range(max(len(old_items), len(new_items))):
                yield from _difference(old_items[index] if index < len(old_items) else None,
                                       new_items[index] if index < len(new_items) else None, f"{at}{path}[{index}]/")
        elif old is None or new is None or old.view != new.view:
            yield _change(at + path, tag, _shown(before, old), _shown(after, new))


def _change(path: str, tag: int, before: str | None, after: str | None) -> Change:
    return Change(path, tag, keyword_for_tag(tag), before, after, bool(tag >> 16 & 1))


def _items(element: Element | None, items: Sequence[Dataset]) -> str | None:
    return None if element is None else f"{len(items)} item{'s' if len(items) != 1 else ''}"


def _shown(data: Dataset | None, element: Element | None) -> str | None:
    if data is None or element is None:
        return None
    if element.vr in TEXT or element.vr == "UN":
        try:
            text = data.text(element.tag) or ""
        except charset.Undecodable:
            text = "\0"
        if "\0" not in text and (element.vr in TEXT or text.isprintable()):
            return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    elif 0 < len(numbers := data.numbers(element.tag)) <= _NUMBERS:
        return "\\".join(f"{number:g}" for number in numbers)
    return f"{element.size} bytes, SHA-256 {hashlib.sha256(element.view).hexdigest()[:16]}"


def untouched(scripts: Iterable[Script]) -> list[int]:
    """Tags that the Basic Profile of PS3.15 would change in a stored object and that no script touches."""
    touched = {row_tag(tag) for script in scripts for tag in script.touches()}
    return sorted(tag for tag in attributes() if tag >> 16 > _NOT_STORED and tag not in touched)


def coverage(scripts: Sequence[Script], files: Iterable[Path], planted: Collection[str] = (),
             context: Callable[[], Context] | None = None) -> Coverage:
    """Run scripts over files and count what survives. Nothing is written.

    Besides the attributes of PS3.15 the identifiers of each original are searched in its result, and the ``planted``
    texts, which are known to be in the data. What is no DICOM file counts as a failure. Raises ``OSError``.
    """
    make = context or (lambda: Context(UIDs(b"coverage", "")))
    counts = Counter[str]()
    present, survived, leaks = Counter[int](), Counter[int](), Counter[tuple[str, int]]()
    places: Counter[int] = Counter()
    failures = []
    for path in files:
        counts["files"] += 1
        try:
            before, after = File.read(path), File.read(path)
            one = make()
            for script in scripts:
                script.apply(after, one)
            result = File.parse(b"".join(after.encode()))
            _count(before.dataset, result.dataset, present, survived)
            labels = [label for label in (one.project, one.subject, one.session) if label]
            found = residue.search(result.dataset, residue.identifiers(before.dataset, (), labels))
            leaks.update({(_any_item(leak.path), leak.source) for leak in found})
            places.update(index for index, text in enumerate(planted) if _holds(result.dataset, text))
        except Rejected:
            counts["rejected"] += 1
        except (Failed, Broken) as error:
            failures.append((str(path), str(error)))
        except (MemoryError, RecursionError):
            failures.append((str(path), "too large, or nested too deeply"))
        else:
            counts["done"] += 1
    table = attributes()
    return Coverage(
        counts["files"], counts["done"], counts["rejected"], failures,
        [Survival(tag, keyword(tag), table[tag].basic, present[tag], survived[tag]) for tag in sorted(present) if tag],
        [Leak(path, source, number) for (path, source), number in sorted(leaks.items())],
        Survival(0, "private attributes", "X", present[0], survived[0]),
        [places[index] for index in range(len(planted))])


def _count(before: Dataset, after: Dataset, present: Counter[int], survived: Counter[int]) -> None:
    """Attributes by row of the table (0: private) that hold a value, and those of which a value is left."""
    table = attributes()
    values: list[set[tuple[int, int, bytes]]] = []
    for data in (before, after):
        values.append({(0 if tag >> 16 & 1 else row_tag(tag), tag, content) for _, item, element in data.walk()
                       if ((tag := element.tag) >> 16 & 1 or row_tag(tag) in table)
                       and (content := _content(item, element))})
    present.update({row for row, _, _ in values[0]})
    survived.update({row for row, _, _ in values[0] & values[1]})


def _content(data: Dataset, element: Element) -> bytes:
    items = data.items(element.tag)
    if items:
        pieces = [bytes(piece) for item in items for piece in item.encode(EXPLICIT)]
        return hashlib.sha256(b"".join(pieces)).digest()
    return hashlib.sha256(element.view).digest() if element.size > 1024 else element.value.rstrip(b" \0")


def _holds(data: Dataset, text: str) -> bool:
    wanted, stored = fold(text), text.encode()
    for _, item, element in data.walk():
        if not residue.searched(element):
            continue
        if stored in element.value:
            return True
        if element.vr in TEXT or element.vr == "UN":
            try:
                if wanted in fold(item.text(element.tag) or ""):
                    return True
            except charset.Undecodable:
                continue
    return False


def _any_item(path: str) -> str:
    """The place without numbers of items, so that the same place in other items counts as one."""
    return "/".join(part.partition("[")[0] for part in path.split("/"))


def keyword(tag: int) -> str:
    """The keyword of a row of the table, or its tag as text."""
    return _REPEATING.get(tag) or keyword_for_tag(tag) or residue.path_text((), tag)
