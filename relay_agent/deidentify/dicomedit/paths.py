"""Tag paths of DicomEdit 6: which elements they match, and the one element that they read or assign.

A path is steps from the outside in. A step is a tag, perhaps with digits left open (X any, @ even, # odd), with an
item of a sequence ([1], [%] any), or a wildcard for levels: ``*`` any number, ``+`` one or more, ``.`` exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from relay_agent.dataset import Dataset, Element
from relay_agent.deidentify.dicomedit.errors import Cannot

ANY = 10**9  # any item
_OPEN = {"x": (0, 0), "@": (1, 0), "#": (1, 1)}


@dataclass(frozen=True)
class Step:
    """One tag: group and element as written (two digits of it with a creator), and the item: None, ANY or a number.

    ``mask`` and ``bits`` say which tags match: those with ``tag & mask == bits``.
    """

    group: str
    element: str
    creator: str | None = None
    item: int | None = None

    @cached_property
    def mask(self) -> int:
        """The bits of a tag that count; of a private tag, the block does not."""
        return self._bits[0]

    @cached_property
    def bits(self) -> int:
        """What they must be."""
        return self._bits[1]

    @cached_property
    def _bits(self) -> tuple[int, int]:
        mask = bits = 0
        for digit in (self.group + ("xx" if self.creator is not None else "") + self.element).lower():
            bit, value = _OPEN.get(digit) or (15, int(digit, 16))
            mask, bits = mask << 4 | bit, bits << 4 | value
        return mask, bits

    @property
    def open(self) -> bool:
        """Whether digits are left open."""
        return any(digit in "xX@#" for digit in self.group + self.element)

    @cached_property
    def tag(self) -> int:
        """The tag; a private one as if its block were the first (0x10)."""
        return self.bits | (0x1000 if self.creator is not None else 0)

    def block(self, data: Dataset) -> int | None:
        """The tag of this private step in a data set, None when its creator has no block there."""
        number = data.block(self.bits >> 16, self.creator or "")
        return None if number is None else self.bits | number << 8

    def candidates(self, data: Dataset) -> Iterator[Element]:
        """The elements of a data set that this step matches; never the creator of a private block."""
        if self.creator is None:
            if not self.open:
                element = data.get(self.tag)
                if element is not None:
                    yield element
                return
            for element in data:
                if element.tag & self.mask == self.bits:
                    yield element
            return
        wanted = self.creator.encode()
        for element in data:
            tag = element.tag
            if tag & self.mask == self.bits and tag & 0xFF00:
                creator = data.get(tag & 0xFFFF0000 | tag >> 8 & 0xFF)
                if creator is not None and creator.value.strip(b" \0") == wanted:
                    yield element

    def __str__(self) -> str:
        """As DicomEdit writes it, where a script uses a path as text."""
        text = self.group + (self.element if self.creator is None else f'"{self.creator}"10{self.element}')
        return text if self.item is None else f"{text}[{'%' if self.item == ANY else self.item}]"


Match = tuple[Dataset, Element, int | None]  # in which data set, the element, and the item when only that is meant


@dataclass(frozen=True)
class Path:
    """A tag path."""

    steps: tuple[Step | str, ...]

    def __str__(self) -> str:
        """As DicomEdit writes it."""
        return "/".join(map(str, self.steps))

    @cached_property
    def singular(self) -> bool:
        """Whether it can mean one element only."""
        return all(isinstance(step, Step) and not step.open and step.item != ANY for step in self.steps)

    @property
    def single(self) -> bool:
        """Whether it can be read and assigned: singular, and not an item."""
        last = self.steps[-1]
        return self.singular and isinstance(last, Step) and last.item is None

    @cached_property
    def simple(self) -> int | None:
        """The tag, where the path is one public tag with all its digits."""
        step = self.steps[0]
        if len(self.steps) == 1 and isinstance(step, Step) and step.creator is None and step.item is None:
            return None if step.open else step.tag
        return None

    @property
    def below(self) -> Path:
        """The path to what this one means and to all that is in it."""
        return Path((*self.steps, "*"))

    @classmethod
    def direct(cls, where: list[tuple[int, int | None]]) -> Path:
        """The path of plain tags, private ones too, with item numbers."""
        return cls(tuple(Step(f"{tag >> 16:04X}", f"{tag & 0xFFFF:04X}", None, item) for tag, item in where))

    @property
    def private(self) -> bool:
        """Whether a private tag is in it."""
        return any(isinstance(step, Step) and step.creator is not None for step in self.steps)

    @cached_property
    def _normal(self) -> tuple[tuple[Step | str, ...], bool]:
        """Steps without doubled ``*``, and whether a ``*`` at the end was left off."""
        steps: list[Step | str] = []
        for step in self.steps:
            if steps and isinstance(step, str) and isinstance(steps[-1], str) and "+" in (step, steps[-1]):
                raise Cannot('"+" and another wildcard cannot stand together in a path')
            if not (step == "*" and steps and steps[-1] == "*"):
                steps.append(step)
        if steps[-1] == "+":
            raise Cannot('a path cannot end with "+"')
        deep = len(steps) > 1 and steps[-1] == "*"
        return tuple(steps[:-1] if deep else steps), deep

    def check(self) -> None:
        """Raises :class:`Cannot` for wildcards that cannot stand together."""
        _ = self._normal

    def leaves(self, data: Dataset) -> Iterator[tuple[Dataset, Element]]:
        """Matching elements that hold no items: what ``?=`` and the functions for lists of paths work on."""
        steps, deep = self._normal
        if steps[-1] == "." and not deep:
            return
        for where, element, item in _find(data, steps, True):
            items = where.items(element.tag)
            if item is not None:
                if deep and item < len(items):
                    yield from _all_leaves(items[item])
            elif not items:
                yield where, element
            elif deep or steps == ("*",):
                for below in items:
                    yield from _all_leaves(below)

    def matches(self, data: Dataset) -> list[Match]:
        """All that a deletion means: elements with all that is in them, or single items."""
        steps, _ = self._normal
        return list(_find(data, steps, True))


def _all_leaves(data: Dataset) -> Iterator[tuple[Dataset, Element]]:
    for _, where, element in data.walk():
        if not where.items(element.tag) and not is_creator(element.tag):
            yield where, element


def is_creator(tag: int) -> bool:
    """Whether a tag reserves a private block (PS3.5 section 7.8.1)."""
    return bool(tag >> 16 & 1) and not tag & 0xFF00


def _items(data: Dataset) -> Iterator[tuple[Element, int, Dataset]]:
    for element in data:
        for index, item in enumerate(data.items(element.tag)):
            yield element, index, item


def _find(data: Dataset, steps: tuple[Step | str, ...], top: bool) -> Iterator[Match]:
    step, rest = steps[0], steps[1:]
    if isinstance(step, str):
        if not rest:  # "*" or "." alone: everything here, or everything one level down
            for here in [data] if step == "*" else [item for _, _, item in _items(data)]:
                yield from ((here, element, None) for element in here if not is_creator(element.tag))
            return
        after = rest[0]
        if step == "*" or (step == "+" and not top):
            yield from _find(data, rest, False)
        for element, index, item in _items(data):
            if step == "+" and top and isinstance(after, Step) and after.item in (None, ANY, index) and any(
                    found is element for found in after.candidates(data)):
                continue  # DicomEdit: what "+" skips must not begin with the tag after it
            yield from _find(item, rest if step == "." else ("*", *rest), False)
        return
    for element in step.candidates(data):
        if rest:
            items = data.items(element.tag)
            for index, item in enumerate(items):
                if step.item in (None, ANY, index):
                    yield from _find(item, rest, False)
        elif step.item in (None, ANY):
            yield data, element, None
        elif step.item is not None and 0 <= step.item < len(data.items(element.tag)):
            yield data, element, step.item


def delete(data: Dataset, path: Path) -> None:
    """What ``- path`` deletes; creators of private blocks stay, and so does an item whose content is deleted."""
    if path.simple is not None:
        data.remove(path.simple)
        return
    for where, element, item in path.matches(data):
        inside = where.items(element.tag)[item] if item is not None and element.tag in where else None
        if item is None:
            where.remove(element.tag)
        elif inside is not None:
            for content in inside:
                if not is_creator(content.tag):
                    inside.remove(content.tag)


def _only(path: Path) -> tuple[list[Step], Step]:
    """The steps through sequences and the last one of a path to one element."""
    steps = [step for step in path.steps if isinstance(step, Step)]
    if not path.single or any(step.item is None for step in steps[:-1]):
        raise Cannot(f"the path {path} can mean several attributes, or an item")
    if any((step.item or 0) < 0 for step in steps):
        raise Cannot(f"the path {path} has no valid item number")
    return steps[:-1], steps[-1]


def locate(data: Dataset, path: Path) -> tuple[Dataset, Element] | None:
    """The one element of a path, None when it is absent; nothing is changed. Raises :class:`Cannot`."""
    through, last = _only(path)
    for step in through:
        tag = step.tag if step.creator is None else step.block(data)
        element = None if tag is None else data.get(tag)
        if element is None:
            return None
        items = data.items(element.tag)
        if not items and element.vr != "SQ":
            raise Cannot(f"in the path {path}, {step} is no sequence")
        if (step.item or 0) >= len(items):
            return None
        data = items[step.item or 0]
    tag = last.tag if last.creator is None else last.block(data)
    element = None if tag is None else data.get(tag)
    return None if element is None else (data, element)


def make(data: Dataset, path: Path) -> tuple[Dataset, int]:
    """Where the one element of a path goes: absent sequences, items and private blocks are made."""
    through, last = _only(path)
    for step in through:
        tag = _reserve(data, step)
        element = data.get(tag)
        items = data.items(tag)
        if element is not None and not items and element.vr != "SQ":
            raise Cannot(f"in the path {path}, {step} is no sequence")
        number = step.item or 0
        if number >= len(items):
            if number > 9999:
                raise Cannot(f"the path {path} would make more than 10000 items")
            new = [data.new_item() for _ in range(number + 1 - len(items))]
            data.put_items(tag, [*items, *new], element.vr if element is not None else "SQ")
        data = data.items(tag)[number]
    return data, _reserve(data, last)


def _reserve(data: Dataset, step: Step) -> int:
    """The tag of a step; a private creator that is not there gets the first block that is free and unused."""
    if step.creator is None:
        return step.tag
    tag = step.block(data)
    if tag is not None:
        return tag
    group = step.bits >> 16
    used = {element.tag >> 8 & 0xFF or element.tag & 0xFF for element in data if element.tag >> 16 == group}
    for number in range(0x10, 0x100):
        if number not in used:
            data.put_text(group << 16 | number, step.creator, "LO")
            return step.bits | number << 8
    raise Cannot(f"group {group:04x} has no free private block")
