"""What the arguments of a function mean: values, whole numbers, tag paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from relay_agent.dataset import Dataset, Element
from relay_agent.deidentify.dicomedit import values
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.paths import Path
from relay_agent.deidentify.dicomedit.run import Run, as_text
from relay_agent.deidentify.dicomedit.syntax import parse_path
from relay_agent.java_regex import Regex, RuleError, RuleValueError


def count(args: list[Any], low: int, high: int | None = None) -> None:
    """Raises :class:`Cannot` for another number of arguments."""
    if not low <= len(args) <= (high or low):
        raise Cannot(f"the function takes {low}{f' to {high}' if high else ''} argument(s), not {len(args)}")


def value(run: Run, arg: Any) -> str | None:
    """An argument as text; of a path, the value that it leads to."""
    return run.read(arg) if isinstance(arg, Path) else as_text(arg)


def need(text: str | None) -> str:
    """A text where null is an error."""
    if text is None:
        raise Cannot("a function needs a value where there is none: the attribute is absent, or nothing was found")
    return text


def whole(arg: Any) -> int:
    """A whole number of 32 bits."""
    text = need(as_text(arg))
    if not re.fullmatch("[+-]?[0-9]{1,10}", text) or not -2**31 <= int(text) < 2**31:
        raise Cannot("a function needs a whole number")
    return int(text)


def flat(args: list[Any]) -> Iterator[Any]:
    """Arguments, those in lists one by one."""
    for arg in args:
        if isinstance(arg, list):
            yield from flat(arg)
        else:
            yield arg


def tag_paths(args: list[Any]) -> list[Path]:
    """Paths, and strings that hold paths."""
    paths = [arg if isinstance(arg, Path) else parse_path(arg) if isinstance(arg, str) else None for arg in flat(args)]
    found = [path for path in paths if path is not None]
    if len(found) < len(paths):
        raise Cannot("an argument is no tag path")
    return found


def leaves(run: Run, paths: list[Path]) -> list[tuple[Dataset, Element]]:
    """What the paths match, each element once."""
    found = {(id(data), element.tag): (data, element)
             for path in paths for root in run.roots(path) for data, element in path.leaves(root)}
    return list(found.values())


def quoted_paths(args: list[Any]) -> list[Path]:
    """Paths that must be strings; where DicomEdit skips a wrong one silently, this refuses."""
    if not all(isinstance(arg, str) for arg in args):
        raise Cannot("this function takes its paths in double quotes only")
    return tag_paths(args)


@lru_cache(1024)
def _regex(text: str) -> Regex:
    return Regex.compile(text)


def full_match(text: str, regex: str) -> list[str | None] | None:
    """The groups of a match of the whole text by a Java regular expression. Raises :class:`Cannot`."""
    try:
        return _regex(regex).match(text)
    except (RuleError, RuleValueError):
        raise Cannot("the regular expression is not valid, or cannot be used here") from None


def collect(run: Run, args: list[Any]) -> list[Any]:
    """The texts, and the values of what the paths match."""
    given = list(flat(args))
    texts: list[Any] = [as_text(arg) for arg in given if not isinstance(arg, Path)]
    found = leaves(run, [arg for arg in given if isinstance(arg, Path)])
    return texts + [values.read(data, element) for data, element in found]
