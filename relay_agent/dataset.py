"""Data sets as they are encoded (PS3.5 section 7): read without decoding, changed element by element, written again.

What nobody changed keeps its bytes and is copied in one piece with its neighbours; pixel data is neither decoded nor
copied on the way. pydicom decodes and builds objects for each value, which costs several times the rest of the work.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from pydicom.datadict import dictionary_VR

from relay_agent import charset

Buffer = bytes | bytearray | memoryview | mmap.mmap
Where = tuple[tuple[int, int], ...]  # tags of sequences and indices of items, from the outside in

PIXELS = 0x7FE00010
CHARSET = 0x00080005
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_DEEPEST = 64
_LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_SHORT = frozenset({"AE", "AS", "AT", "CS", "DA", "DS", "DT", "FL", "FD", "IS", "LO", "LT", "PN", "SH", "SL", "SS",
                    "ST", "TM", "UI", "UL", "US"})
_CODES = {vr.encode(): (vr, vr in _LONG) for vr in _LONG | _SHORT}
TEXT = frozenset({"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"})
_ONE_TEXT = frozenset({"LT", "ST", "UT", "UR"})  # a backslash in these separates nothing
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q", "AT": "H"}
_WIDTH = {"AT": 2, "US": 2, "SS": 2, "OW": 2, "UL": 4, "SL": 4, "FL": 4, "OF": 4, "OL": 4, "FD": 8, "OD": 8, "OV": 8,
          "SV": 8, "UV": 8}
_ARRAYS = {2: "H", 4: "I", 8: "Q"}


class Broken(ValueError):
    """The data set cannot be read; the message names the place, never a value."""


class Encoding(NamedTuple):
    """How elements are written."""

    explicit: bool
    little: bool


IMPLICIT, EXPLICIT, BIG = Encoding(False, True), Encoding(True, True), Encoding(True, False)
_ENCODINGS = {"1.2.840.10008.1.2": IMPLICIT, "1.2.840.113619.5.2": IMPLICIT, "1.2.840.10008.1.2.2": BIG}


def encoding_of(transfer_syntax: str) -> Encoding:
    """How a transfer syntax writes elements (PS3.5 section 10 and annex A)."""
    return _ENCODINGS.get(transfer_syntax, EXPLICIT)


def show(tag: int) -> str:
    """``(gggg,eeee)``."""
    return f"({tag >> 16:04x},{tag & 0xFFFF:04x})"


@lru_cache(65536)
def vr_of(tag: int) -> str:
    """The VR of a tag by the dictionary; private creators LO, other private or unknown elements UN."""
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    if not tag & 0xFFFF:
        return "UL"
    try:
        vr = str(dictionary_VR(tag))
    except KeyError:
        return "UN"
    return vr if len(vr) == 2 else "OW" if "OW" in vr else vr[:2]


class _Source(NamedTuple):
    buffer: Buffer
    encoding: Encoding


class Element:
    """One element: its tag, VR, and a value as stored or the items of a sequence. Replaced, never changed."""

    __slots__ = ("_end", "_head", "_items", "_source", "_start", "_value", "fragments", "tag", "vr")

    def __init__(self, tag: int, vr: str, value: Buffer | None = None, items: tuple[Dataset, ...] | None = None,
                 source: _Source | None = None, span: tuple[int, int, int] = (0, 0, 0), *,
                 fragments: bool = False) -> None:
        self.tag = tag
        self.vr = vr
        self.fragments = fragments  # encapsulated pixel data: the value is its items, delimiter included (PS3.5 A.4)
        self._value = value
        self._items = items
        self._source = source
        self._head, self._start, self._end = span

    @property
    def value(self) -> bytes:
        """The bytes of the value with its padding; those of a sequence read from a file are its encoded items."""
        if self._value is not None:
            return bytes(self._value)
        return bytes(self._source.buffer[self._start:self._end]) if self._source is not None else b""

    @property
    def size(self) -> int:
        """Bytes of the value, without reading it."""
        return len(self._value) if self._value is not None else self._end - self._start

    @property
    def view(self) -> memoryview:
        """The value without a copy."""
        if self._value is not None or self._source is None:
            return memoryview(self._value or b"")
        return memoryview(self._source.buffer)[self._start:self._end]

    @property
    def items_changed(self) -> bool:
        """Whether anything in an item is not as it was read."""
        return bool(self._items) and any(item.changed for item in self._items or ())

    def __repr__(self) -> str:
        """Never the value: this may end in a log."""
        return f"<{show(self.tag)} {self.vr} {self.size} bytes>"


class Dataset:
    """A data set, or an item of a sequence: elements by tag (gggg * 65536 + eeee), always read in tag order."""

    __slots__ = ("_changed", "_elements", "_source", "parent", "watch")

    def __init__(self, encoding: Encoding = EXPLICIT, parent: Dataset | None = None, buffer: Buffer = b"") -> None:
        self._elements: dict[int, Element] = {}
        self._source = _Source(buffer, encoding)
        self._changed = False
        self.parent = parent
        self.watch: Callable[[Dataset, int], None] | None = None  # of the outermost: told of each change at any level

    @property
    def encoding(self) -> Encoding:
        """How the values in it are written."""
        return self._source.encoding

    def __iter__(self) -> Iterator[Element]:
        """The elements as they are now, in tag order; deleting meanwhile is safe."""
        return iter([self._elements[tag] for tag in sorted(self._elements)])

    def __len__(self) -> int:
        """How many elements there are."""
        return len(self._elements)

    def __contains__(self, tag: int) -> bool:
        """Whether there is such an element."""
        return tag in self._elements

    def get(self, tag: int) -> Element | None:
        """The element, or None."""
        return self._elements.get(tag)

    def items(self, tag: int) -> tuple[Dataset, ...]:
        """The items of a sequence; none for what is absent or no sequence."""
        element = self._elements.get(tag)
        return self.items_of(element) if element is not None else ()

    def items_of(self, element: Element) -> tuple[Dataset, ...]:
        """The items of an element that was got from here, also when it was replaced since."""
        if element._items is None:
            if element.vr != "SQ" or element._source is None:
                return ()
            items, position = _read_items(self, element._start, element._end, _depth(self), element._source.encoding)
            if position != element._end:  # nobody would see it, and it would be copied
                raise Broken(f"{show(element.tag)} goes on behind the end of its items")
            element._items = items
        return element._items

    def values(self, tag: int) -> list[str]:
        """The decoded values of a text element without padding; none for what is absent or empty."""
        text = self.text(tag)
        if not text:
            return []
        if self._elements[tag].vr in _ONE_TEXT:
            return [text]
        return [part.strip(" ") for part in text.split("\\")]

    def text(self, tag: int) -> str | None:
        """The decoded value as one string, padding at its end removed; None when absent.

        Raises :class:`relay_agent.charset.Undecodable`. Meant for text VRs and UN; of others the bytes are read so.
        """
        element = self._elements.get(tag)
        if element is None:
            return None
        return charset.decode(element.value.rstrip(b" \0"), element.vr, self.charset)

    def numbers(self, tag: int) -> tuple[float, ...]:
        """The numbers of a binary VR (AT: groups and elements in turn); none for what is absent or no number."""
        element = self._elements.get(tag)
        return self.numbers_of(element) if element is not None else ()

    def numbers_of(self, element: Element) -> tuple[float, ...]:
        """The numbers of an element that was got from here, also when it was replaced since."""
        code = _NUMBERS.get(element.vr)
        if code is None:
            return ()
        little = element._source.encoding.little if element._source is not None else self.encoding.little
        value = element.value
        size = struct.calcsize(code)
        return struct.unpack(f"{'<' if little else '>'}{len(value) // size}{code}", value[:len(value) // size * size])

    @property
    def charset(self) -> bytes:
        """The value of Specific Character Set that rules here; items inherit it (PS3.3 section C.12.1.1.2)."""
        data: Dataset | None = self
        while data is not None:
            element = data._elements.get(CHARSET)
            if element is not None:
                return element.value
            data = data.parent
        return b""

    def put(self, tag: int, vr: str, value: Buffer, fragments: bool = False) -> None:
        """Set an element; the value is padded to even length (PS3.5 section 6.2). ``fragments``: see Element.

        A value of even length is not copied, whatever holds it.
        """
        if len(value) % 2:
            value = bytes(value) + (b" " if vr in TEXT and vr != "UI" else b"\0")
        self._elements[tag] = Element(tag, vr, value, fragments=fragments)
        self._touched(tag)

    def put_text(self, tag: int, text: str, vr: str | None = None) -> None:
        """Set an element to a text in the character set that rules here; its VR stays, or is the dictionary's.

        Raises :class:`relay_agent.charset.Undecodable` when the character set lacks a character.
        """
        if vr is None:
            old = self._elements.get(tag)
            vr = old.vr if old is not None else vr_of(tag)
        self.put(tag, vr, charset.encode(text, vr, self.charset))

    def put_numbers(self, tag: int, vr: str, *numbers: float) -> None:
        """Set an element of a binary VR. Raises ``struct.error`` when a number does not fit."""
        self.put(tag, vr, struct.pack(f"{'<' if self.encoding.little else '>'}{len(numbers)}{_NUMBERS[vr]}", *numbers))

    def put_items(self, tag: int, items: Sequence[Dataset], vr: str = "SQ") -> None:
        """Set a sequence; make its new items with :meth:`new_item`."""
        self._elements[tag] = Element(tag, vr, items=tuple(items))
        self._touched(tag)

    def new_item(self) -> Dataset:
        """An empty item for a sequence of this data set."""
        return Dataset(self.encoding, self)

    def remove(self, tag: int) -> bool:
        """Delete an element; whether it was there."""
        if self._elements.pop(tag, None) is None:
            return False
        self._touched(tag)
        return True

    def _touched(self, tag: int) -> None:
        self._changed = True
        outermost = self
        while outermost.parent is not None:
            outermost = outermost.parent
        if outermost.watch is not None:
            outermost.watch(self, tag)

    def block(self, group: int, creator: str) -> int | None:
        """The block number (0x10 to 0xFF) that a private creator has reserved in a group (PS3.5 section 7.8.1)."""
        for number in range(0x10, 0x100):
            element = self._elements.get(group << 16 | number)
            if element is not None and element.value.strip(b" \0") == creator.encode("latin-1", "replace"):
                return number
        return None

    def walk(self, path: Where = ()) -> Iterator[tuple[Where, Dataset, Element]]:
        """Every element of every level: where its data set is, the data set, the element."""
        for element in self:
            yield path, self, element
            for index, item in enumerate(self.items(element.tag)):
                yield from item.walk((*path, (element.tag, index)))

    @property
    def changed(self) -> bool:
        """Whether anything at any level is not as it was read."""
        return self._changed or any(element.items_changed for element in self._elements.values())

    def encode(self, encoding: Encoding) -> list[Buffer]:
        """The data set's bytes in pieces; what was read in the same encoding and not changed is not copied."""
        out: list[Buffer] = []
        source, head, end = None, 0, 0
        for tag in sorted(self._elements):
            element = self._elements[tag]
            if element._source is not None and element._source.encoding == encoding and not element.items_changed:
                if source is not element._source or end != element._head:
                    if source is not None:
                        out.append(memoryview(source.buffer)[head:end])
                    source, head = element._source, element._head
                end = element._end
                continue
            if source is not None:
                out.append(memoryview(source.buffer)[head:end])
                source = None
            out += _encode(self, element, encoding)
        if source is not None:
            out.append(memoryview(source.buffer)[head:end])
        return out


def _depth(data: Dataset) -> int:
    depth = 0
    parent = data.parent
    while parent is not None:
        depth, parent = depth + 1, parent.parent
    return depth


def _encode(data: Dataset, element: Element, encoding: Encoding) -> list[Buffer]:
    items = data.items(element.tag)
    if items or element.vr == "SQ":
        return _encode_items(element, items, encoding)
    value: Buffer = element.view
    width = _WIDTH.get(element.vr)
    little = element._source.encoding.little if element._source is not None else data.encoding.little
    if width and little != encoding.little and not element.fragments:
        swapped = array(_ARRAYS[width], bytes(value[:len(value) // width * width]))
        swapped.byteswap()
        value = swapped.tobytes()
    return [element_head(element.tag, element.vr, _UNDEFINED if element.fragments else len(value), encoding), value]


def _encode_items(element: Element, items: tuple[Dataset, ...], encoding: Encoding) -> list[Buffer]:
    order = "<" if encoding.little else ">"
    if element.vr == "UN":  # a sequence by its undefined length alone, its items in implicit VR (PS3.5 section 6.2.2)
        inner: list[Buffer] = []
        for item in items:
            inner += [struct.pack("<HHI", 0xFFFE, 0xE000, _UNDEFINED), *item.encode(IMPLICIT),
                      struct.pack("<HHI", 0xFFFE, 0xE00D, 0)]
        return [element_head(element.tag, "UN", _UNDEFINED, encoding), *inner, struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)]
    out: list[Buffer] = []
    for item in items:
        pieces = item.encode(encoding)
        out += [struct.pack(f"{order}HHI", 0xFFFE, 0xE000, sum(map(len, pieces))), *pieces]
    return [element_head(element.tag, "SQ", sum(map(len, out)), encoding), *out]


def element_head(tag: int, vr: str, length: int, encoding: Encoding) -> bytes:
    """What stands before a value: tag, VR, length (PS3.5 section 7.1)."""
    order = "<" if encoding.little else ">"
    if not encoding.explicit:
        return struct.pack(f"{order}HHI", tag >> 16, tag & 0xFFFF, length)
    if vr not in _LONG and length > 0xFFFF:
        vr = "UN"  # PS3.5 section 6.2.2 note 1: too long for the two bytes of its VR
    if vr in _LONG:
        return struct.pack(f"{order}HH2sHI", tag >> 16, tag & 0xFFFF, vr.encode(), 0, length)
    return struct.pack(f"{order}HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), length)


_HEADS = {order: (struct.Struct(f"{order}HH2sH").unpack_from, struct.Struct(f"{order}HHI").unpack_from,
                  struct.Struct(f"{order}I").unpack_from) for order in "<>"}


def scan(data: Dataset, position: int, end: int, depth: int = 0, stop: int | None = None,  # noqa: PLR0912, PLR0915 -
         delimited: bool = False) -> int:                                                  # one loop, for every element
    """Read elements up to ``end``, an item's delimiter, or the tag ``stop``; the position after them.

    Raises :class:`Broken`; what was read until then stays.
    """
    source = data._source
    buffer, (explicit, little) = source
    short, implicit, four = _HEADS["<" if little else ">"]
    elements = data._elements
    limit = min(end, len(buffer))
    while position + 8 <= limit:
        if explicit:
            group, number, code, length = short(buffer, position)
            start = position + 8
            tag = group << 16 | number
            if stop is not None and tag >= stop:
                return position
            known = _CODES.get(code)
            if known is None:
                if delimited and group == 0xFFFE and number == 0xE00D:
                    return start
                raise Broken(f"at byte {position}, ({group:04x},{number:04x}) has no valid VR")
            vr, long = known
            if long:
                if start + 4 > limit:
                    break
                length = four(buffer, start)[0]
                start += 4
        else:
            group, number, length = implicit(buffer, position)
            start = position + 8
            tag = group << 16 | number
            if stop is not None and tag >= stop:
                return position
            if delimited and tag == _ITEM_END:
                return start
            vr = vr_of(tag)
            if tag in (_ITEM, _ITEM_END, _SEQUENCE_END):
                raise Broken(f"at byte {position} there is a delimiter that delimits nothing")
        if tag in elements:  # the last one counts, and where all is copied in one piece the first would go along
            data._changed = True
        if length != _UNDEFINED:
            finish = start + length
            if finish > limit:
                raise Broken(f"{show(tag)} at byte {position} goes beyond the end of what holds it")
            elements[tag] = Element(tag, vr, source=source, span=(position, start, finish))
        elif tag == PIXELS or (explicit and vr in ("OB", "OW")):
            finish = _skip_fragments(buffer, start, limit)
            elements[tag] = Element(tag, vr, source=source, span=(position, start, finish), fragments=True)
        else:
            inner = IMPLICIT if vr == "UN" and explicit else source.encoding
            items, finish = _read_items(data, start, limit, depth, inner)
            elements[tag] = Element(tag, vr if vr == "UN" and explicit else "SQ", items=items, source=source,
                                    span=(position, start, finish))
        position = finish
    if delimited:
        raise Broken(f"an item that ends at byte {position} has no delimiter")
    if position < limit:
        raise Broken(f"{limit - position} bytes are left over at byte {position}")
    if limit < end:
        raise Broken("the file ends too early")
    return position


def _skip_fragments(buffer: Buffer, position: int, end: int) -> int:
    """The end of encapsulated pixel data (PS3.5 section A.4), delimiter included; always little endian."""
    unpack = _HEADS["<"][1]
    while position + 8 <= end:
        group, number, length = unpack(buffer, position)
        position += 8
        if (group, number) == (0xFFFE, 0xE0DD):
            return position
        if (group, number) != (0xFFFE, 0xE000) or length == _UNDEFINED:
            raise Broken(f"at byte {position - 8} encapsulated pixel data holds no fragment")
        position += length
    raise Broken("encapsulated pixel data has no end")


def _read_items(data: Dataset, position: int, end: int, depth: int, encoding: Encoding
                ) -> tuple[tuple[Dataset, ...], int]:
    """The items from ``position`` to ``end`` or to the sequence's delimiter (PS3.5 section 7.5)."""
    if depth >= _DEEPEST:
        raise Broken(f"sequences are nested deeper than {_DEEPEST} levels")
    buffer = data._source.buffer
    unpack = _HEADS["<" if encoding.little else ">"][1]
    items: list[Dataset] = []
    while position + 8 <= end:
        group, number, length = unpack(buffer, position)
        position += 8
        if (group, number) == (0xFFFE, 0xE0DD):
            return tuple(items), position
        if (group, number) != (0xFFFE, 0xE000):
            raise Broken(f"at byte {position - 8} a sequence holds something that is no item")
        item = Dataset(encoding, data, buffer)
        if length == _UNDEFINED:
            position = scan(item, position, end, depth + 1, delimited=True)
        else:
            if position + length > end:
                raise Broken(f"an item at byte {position - 8} goes beyond the end of its sequence")
            scan(item, position, position + length, depth + 1)
            position += length
        items.append(item)
    if position != end:
        raise Broken(f"{end - position} bytes are left over in a sequence")
    return tuple(items), position
