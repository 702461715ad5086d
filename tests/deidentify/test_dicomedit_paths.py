"""Tag paths against another reading of them: DicomEdit turns a path into a regular expression over paths as text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from relay_agent.dataset import Dataset
from relay_agent.deidentify.dicomedit import paths
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.paths import ANY, Path, Step, is_creator
from relay_agent.deidentify.dicomedit.syntax import parse_path
from tests.deidentify import golden

OPEN = {"x": "[0-9a-f]", "@": "[02468ace]", "#": "[13579bdf]"}
FILES = {name: golden.read("dicomedit", name) for name in golden.inputs("dicomedit")}


def expression(path: Path) -> str:
    out = ""
    for step, after in zip(path.steps, (*path.steps[1:], None), strict=True):
        if isinstance(step, Step):
            out += one(step) + ("/" if isinstance(after, Step) else "")
        else:
            out += {"*": ".*", ".": "/?[^/]+/", "+": f"(?!{one(after) if step == '+' else ''})([^/]*/)*"}[step]
    return out


def one(step: Step) -> str:
    digits = ["".join(OPEN.get(digit, digit) for digit in part.lower()) for part in (step.group, step.element)]
    tag = "".join(digits) if step.creator is None else f'{digits[0]}"{re.escape(step.creator)}"..{digits[1]}'
    return tag + ("" if step.item is None else r"(\[\d+\])?+" if step.item == ANY else rf"\[{step.item}\]")


def text(data: Dataset, tag: int) -> str:
    digits = f"{tag:08x}"
    if not tag >> 16 & 1:
        return digits
    creator = tag if is_creator(tag) else tag & 0xFFFF0000 | tag >> 8 & 0xFF
    return f'{digits[:4]}"{data.text(creator)}"{digits[4:]}'


def elements(data: Dataset, before: str = "") -> Iterator[tuple[str, Dataset, int]]:
    """All elements as text, data set and tag; sequences with items end with a slash."""
    for element in data:
        items = data.items(element.tag)
        name = before + text(data, element.tag)
        yield name + ("/" if items else ""), data, element.tag
        for index, item in enumerate(items):
            yield from elements(item, f"{name}[{index}]/")


def matching(data: Dataset, path: Path) -> tuple[set[str], set[str]]:
    """What a deletion takes out, and what ``?=`` assigns, by the regular expression."""
    regex = expression(path)
    gone: set[str] = set()
    leaves = set()
    for name, _, tag in elements(data):
        inside = any(name.startswith(outer.rstrip("/") + "[") for outer in gone)
        if inside or (re.fullmatch(f"{regex}.*", name.rstrip("/")) and not is_creator(tag)):
            gone.add(name)
        if not is_creator(tag) and not name.endswith("/") and re.fullmatch(regex, name):
            leaves.add(name)
    return gone, leaves


def some_path(chance: random.Random, data: Dataset) -> str:
    """The path of some element, with digits left open, items left off, and levels as wildcards."""
    name = chance.choice([name for name, _, tag in elements(data) if not is_creator(tag) and '"None"' not in name])
    steps = []
    for part in name.rstrip("/").split("/"):
        group, creator, element, item = re.fullmatch(r'(.{4})(?:"(.*)")?(.{4})(\[\d+\])?', part).groups()
        element = element[2:] if creator else element
        element = "".join(chance.choice("X@#") if chance.random() < 0.1 else digit for digit in element)
        step = f"({group},{{{creator}}}{element})" if creator else f"({group},{element})"
        step += chance.choice([item or "", item or "", "[%]", ""]) if item or chance.random() < 0.1 else ""
        steps += [chance.choice("*.+") if chance.random() < 0.25 else step]
        steps += [chance.choice("*.+")] if chance.random() < 0.1 else []
    return "/".join(steps)


@pytest.mark.parametrize("name", FILES)
def test_paths_match_what_the_regular_expressions_match(name):
    chance = random.Random(name)
    hits = 0
    for _ in range(60):
        data = golden.read("dicomedit", name).dataset
        path = parse_path(some_path(chance, data))
        try:
            path.check()
        except Cannot:
            continue
        names = {(id(where), tag): text for text, where, tag in elements(data)}
        gone, leaves = matching(data, path)
        assert {names[id(where), element.tag] for where, element in path.leaves(data)} == leaves, path
        paths.delete(data, path)
        left = {names[id(where), tag] for _, where, tag in elements(data)}
        assert set(names.values()) - left == gone, path
        hits += bool(gone)
    assert hits > 20
