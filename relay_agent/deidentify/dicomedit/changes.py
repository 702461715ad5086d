"""The functions of DicomEdit 6.6 that change the object; each takes the run and the values of its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from relay_agent.dataset import PIXELS, TEXT, Dataset, encoding_of
from relay_agent.deidentify import pixels
from relay_agent.deidentify.dicomedit import dates, values
from relay_agent.deidentify.dicomedit.arguments import collect, count, leaves, need, quoted_paths, tag_paths, whole
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.paths import Path, is_creator
from relay_agent.deidentify.dicomedit.run import EXPLICIT_LE, VOID, Run, as_text
from relay_agent.deidentify.dicomedit.uid import hash_uid, map_uid

Function = Callable[[Run, list[Any]], Any]
_DIRECT = re.compile(r"\(([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})\)(?:\[([0-9]{1,4})\](?=/)/?)?")
_PAINTED = "Burned in text blacked out"
_OLDEST_DAYS = 32506  # 89 years, as DicomEdit counts them


def _blank_values(run: Run, args: list[Any]) -> object:
    known = {text for text in collect(run, args) if text}
    for _, data, element in run.data.walk():
        if element.vr in TEXT or (element.vr == "UN" and element.size < 2**16 and not data.items(element.tag)):
            try:
                text = values.read(data, element)
            except Cannot:
                continue  # it is no text, so none of the known ones
            if text in known:
                data.put(element.tag, element.vr, b"")
    return VOID


def _set(run: Run, args: list[Any]) -> object:
    count(args, 2)
    if isinstance(args[1], Path):
        raise Cannot("set takes a text; read an attribute with valueAt")
    run.assign(_direct(args[0]), need(as_text(args[1])))
    return VOID


def _delete(run: Run, args: list[Any]) -> object:
    count(args, 1)
    run.delete(_direct(args[0]))
    return VOID


def _direct(arg: Any) -> Path:
    """The path of set and delete: a string of plain tags with item numbers, private ones as they stand."""
    text = arg.replace(" ", "") if isinstance(arg, str) else ""
    path, position = [], 0
    while found := _DIRECT.match(text, position):
        path.append((found[1] + found[2], found[3]))
        position = found.end()
    if not path or position < len(text) or path[-1][1] is not None or any(item is None for _, item in path[:-1]):
        raise Cannot('set and delete take a text with plain tags, such as "(0008,1140)[0]/(0010,0010)"')
    return Path.direct([(int(tag, 16), None if item is None else int(item)) for tag, item in path])


def _remove_tags(run: Run, args: list[Any]) -> object:
    for path in tag_paths(args):
        run.delete(path)
    return VOID


def _retain_private(run: Run, args: list[Any]) -> object:
    """Private elements that no path matches go, creators without elements too; those that stay are not touched."""
    paths = tag_paths(args)
    if not all(path.private for path in paths):
        raise Cannot("retainPrivateTags takes private tags")
    kept = {(id(data), element.tag) for path in paths for data, element in path.below.leaves(run.data)}
    _drop_private(run.data, kept, False)
    return VOID


def _drop_private(data: Dataset, kept: set[tuple[int, int]], within: bool) -> None:
    for element in data:
        private = within or bool(element.tag >> 16 & 1)
        items = data.items(element.tag)
        if items:
            for item in items:
                _drop_private(item, kept, private)
            if private:
                filled = max((number + 1 for number, item in enumerate(items) if len(item)), default=0)
                if not filled:
                    data.remove(element.tag)
                elif filled < len(items):
                    data.put_items(element.tag, items[:filled], element.vr)
        elif private and not is_creator(element.tag) and (id(data), element.tag) not in kept:
            data.remove(element.tag)
    blocks = {element.tag >> 8 for element in data}
    for element in data:
        if is_creator(element.tag) and element.tag >> 16 << 8 | element.tag & 0xFF not in blocks:
            data.remove(element.tag)


def _hash_uid_list(run: Run, args: list[Any]) -> object:
    for data, element in leaves(run, tag_paths(args)):
        values.write(data, element.tag, hash_uid(values.read(data, element)))
    return VOID


def _map_referenced(run: Run, args: list[Any]) -> object:
    if len(args) < 2:
        raise Cannot("mapReferencedUIDs needs a prefix and paths")
    for data, element in leaves(run, quoted_paths(args[1:])):
        values.write(data, element.tag, map_uid(run, args[0], values.read(data, element)))
    return VOID


def _shift_list(run: Run, args: list[Any]) -> object:
    count(args, 3)
    if not isinstance(args[0], list):
        raise Cannot("shiftDateTimeListByIncrement takes a list in { }")
    amount, units = whole(args[1]), need(as_text(args[2]))
    for path in tag_paths(args[0]):
        for data, element in leaves(run, [path]):
            text = values.read(data, element)
            if text:
                values.write(data, element.tag, dates.shift(text, amount, units))
    return VOID


def _shift_sequence(run: Run, args: list[Any]) -> object:
    if len(args) < 2:
        raise Cannot("shiftDateTimeSequenceByIncrement needs seconds and paths")
    amount = whole(args[0])
    for data, element in leaves(run, quoted_paths(args[1:])):
        values.write(data, element.tag, dates.shift(values.read(data, element), amount, "seconds"))
    return VOID


def _scale_age(run: Run, args: list[Any]) -> object:
    """At most 89 years, whatever the arguments say: birth dates by the study date, and ages."""
    birth, study = run.read_tag(0x00100030), run.read_tag(0x00080020)
    if birth:
        born, then = dates.seconds(birth), dates.seconds(study or "")
        if born is None or then is None:
            raise Cannot("the birth date cannot be scaled: it or the study date is absent or no date")
        surplus = (then - born) // 86400 - _OLDEST_DAYS
        if surplus > 0:
            for _, data, element in run.data.walk():
                if element.tag == 0x00100030 and (text := values.read(data, element)):
                    values.write(data, element.tag, dates.shift(text, surplus, "days"))
    age = run.read_tag(0x00101010)
    if age:
        if not re.match("[0-9]{3}[YMWD]", age):
            raise Cannot("Patient's Age is not of the form 000Y")
        if age[3] == "Y" and int(age[:3]) > 89:
            for _, data, element in run.data.walk():
                if element.tag == 0x00101010:
                    values.write(data, element.tag, "089Y")
    return VOID


def _alter_pixels(run: Run, args: list[Any]) -> object:
    """A rectangle painted black: DicomEdit paints 0, whatever value the script names."""
    count(args, 4)
    shape, where, fill, paint = (need(as_text(arg)).strip() for arg in args)
    if shape != "rectangle" or fill != "solid":
        raise Cannot('alterPixels knows "rectangle" and "solid" only')
    value = re.fullmatch(r"(?:v\s*=\s*([0-9]{0,9}))?", paint, re.ASCII)
    if value is None or int(value[1] or 0) > 255:
        raise Cannot("alterPixels needs v=0 to v=255")
    left, top, right, bottom = _sides(where)
    data, file = run.data, run.file
    if not any(tag in data for tag in (PIXELS, 0x7FE00008, 0x7FE00009)):
        return VOID
    rows, columns = data.numbers(0x00280010), data.numbers(0x00280011)
    if left == right or top == bottom or (rows and columns and (
            left >= columns[0] or top >= rows[0] or right <= 0 or bottom <= 0)):
        return VOID  # nothing is painted, so nothing is said to be
    if not encoding_of(file.transfer_syntax).little:
        raise Cannot("pixels of a big endian object cannot be painted")
    pixels.paint(file, [(left, top, right, bottom)], 0)
    file.transfer_syntax = EXPLICIT_LE
    data = file.dataset
    data.put_text(0x00280301, "NO")
    data.put_text(0x00120063, "\\".join([*data.values(0x00120063), _PAINTED]))
    item = data.new_item()
    item.put_text(0x00080100, "113101")
    item.put_text(0x00080102, "DCM")
    item.put_text(0x00080104, "Clean Pixel Data Option")
    data.put_items(0x00120064, [*data.items(0x00120064), item])
    return VOID


def _sides(text: str) -> list[int]:
    """Left, top, right, bottom."""
    parts = [re.fullmatch(r"\s*([ltrb])\s*=\s*([+-]?[0-9]{1,9})\s*", part, re.ASCII) for part in text.split(",")]
    sides = {part[1]: int(part[2]) for part in parts if part}
    if not all(parts) or len(sides) < 4 or sides["l"] > sides["r"] or sides["t"] > sides["b"]:
        raise Cannot("alterPixels needs whole numbers, such as l=0, t=0, r=64, b=8, with l up to r and t up to b")
    return [sides[side] for side in "ltrb"]


CHANGES: dict[str, Function] = {
    "blankValues": _blank_values, "set": _set, "delete": _delete, "removeTags": _remove_tags,
    "retainPrivateTags": _retain_private, "hashUIDList": _hash_uid_list, "mapReferencedUIDs": _map_referenced,
    "shiftDateTimeListByIncrement": _shift_list, "shiftDateTimeSequenceByIncrement": _shift_sequence,
    "scalePatientAgeAndDobFromStudyDate": _scale_age, "alterPixels": _alter_pixels,
}
