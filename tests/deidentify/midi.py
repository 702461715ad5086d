"""The ten kinds of actions that the MIDI-B benchmark asks for (arXiv 2507.23608), as checks on original and result.

A place is a tag, or tags and indices of items in turn: ``(0x00400275, 0, 0x00400007)``. Half of the kinds are about
keeping: a result that lost everything identifies nobody and is of no use.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from relay_agent.dataset import PIXELS, Dataset, Element
from relay_agent.instance import File

Place = int | tuple[int, ...]
Pairs = Iterable[tuple[File, File]]  # originals and their results
Rectangle = tuple[int, int, int, int]  # left, top, width, height in pixels of a native image of one frame


def tag_retained(original: File, result: File, place: Place) -> bool:
    """The element is still there."""
    return _find(original, place) is not None and _find(result, place) is not None


def text_notnull(original: File, result: File, place: Place) -> bool:
    """The element is still there and holds something."""
    return bool(_text(original, place)) and bool(_text(result, place))


def text_retained(original: File, result: File, place: Place, text: str) -> bool:
    """A text that identifies nobody is still in the value."""
    return text in _text(original, place) and text in _text(result, place)


def text_removed(original: File, result: File, place: Place, text: str) -> bool:
    """A text that identifies is no longer in the value, whether the element is there or not."""
    assert text.casefold() in _text(original, place).casefold(), "the original does not hold it"
    return text.casefold() not in _text(result, place).casefold()


def date_shifted(original: File, result: File, place: Place, days: int | None = None) -> bool:
    """A date (DA or DT) moved, by so many days if they are given; the rest of a DT is the same."""
    old, new = _text(original, place), _text(result, place)
    if not new or old[8:] != new[8:]:
        return False
    moved = (_day(new) - _day(old)).days
    return moved == days if days is not None else moved != 0


def uid_changed(original: File, result: File, place: Place) -> bool:
    """A UID was replaced by another one."""
    new = _text(result, place)
    return bool(new) and new != _text(original, place) and len(new) <= 64 and set(new) <= set("0123456789.")


def uid_consistent(pairs: Pairs, *places: Place) -> bool:
    """The same UID got the same new one everywhere, and different ones different ones."""
    return _one_to_one((_text(original, place), _text(result, place)) for original, result in pairs for place in places)


def patid_consistent(pairs: Pairs) -> bool:
    """One patient has one new Patient ID."""
    pairs = [(_text(original, 0x00100020), _text(result, 0x00100020)) for original, result in pairs]
    return all(new and new != old for old, new in pairs) and _one_to_one(pairs)


def pixels_hidden(original: File, result: File, rectangle: Rectangle) -> bool:
    """All pixels of a rectangle have one value, and not those that they had."""
    before, after = _inside(original, rectangle), _inside(result, rectangle)
    return before != after and len(set(after)) == 1


def pixels_retained(original: File, result: File, rectangle: Rectangle | None = None) -> bool:
    """Pixel data is the same; outside a rectangle, if one is given."""
    if rectangle is None:
        return _pixels(original) == _pixels(result)
    return _outside(original, rectangle) == _outside(result, rectangle)


def _find(file: File, place: Place) -> tuple[Dataset, Element] | None:
    path = (place,) if isinstance(place, int) else place
    data = file.dataset
    for sequence, index in zip(path[:-1:2], path[1::2], strict=True):
        items = data.items(sequence)
        if index >= len(items):
            return None
        data = items[index]
    element = data.get(path[-1])
    return (data, element) if element is not None else None


def _text(file: File, place: Place) -> str:
    found = _find(file, place)
    return (found[0].text(found[1].tag) or "") if found else ""


def _day(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:8]))


def _one_to_one(pairs: Iterable[tuple[str, str]]) -> bool:
    known = set(pairs)
    return len({old for old, _ in known}) == len(known) == len({new for _, new in known})


def _pixels(file: File) -> bytes:
    return file.dataset.get(PIXELS).value


def _rows(file: File) -> list[list[bytes]]:
    data = file.dataset
    rows, columns, bits = (int(data.numbers(tag)[0]) for tag in (0x00280010, 0x00280011, 0x00280100))
    width, pixels = bits // 8, _pixels(file)
    return [[pixels[(row * columns + column) * width:][:width] for column in range(columns)] for row in range(rows)]


def _inside(file: File, rectangle: Rectangle) -> list[bytes]:
    left, top, width, height = rectangle
    return [pixel for row in _rows(file)[top:top + height] for pixel in row[left:left + width]]


def _outside(file: File, rectangle: Rectangle) -> list[bytes]:
    left, top, width, height = rectangle
    return [pixel for y, row in enumerate(_rows(file)) for x, pixel in enumerate(row)
            if not (left <= x < left + width and top <= y < top + height)]
