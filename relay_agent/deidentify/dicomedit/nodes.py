"""What a script is parsed into, and ways through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from relay_agent.deidentify.dicomedit.paths import Path


@dataclass(frozen=True)
class Text:
    """A string or number; ``raw`` is a string without its backslashes undone, as it counts within a list."""

    text: str
    raw: str


@dataclass(frozen=True)
class Name:
    """A variable."""

    name: str


@dataclass(frozen=True)
class Tag:
    """A path; its value is meant outside of functions and lists, the path itself within."""

    path: Path


@dataclass(frozen=True)
class Call:
    """A function with its arguments."""

    name: str
    arguments: tuple[Value, ...]


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Value, ...]


Value = Text | Name | Tag | Call | Items


@dataclass(frozen=True)
class Compare:
    """Two values and ``=``, ``!=``, ``~`` or ``!~``."""

    left: Value
    operator: str
    right: Value


Condition = Compare | Call


@dataclass(frozen=True)
class Assign:
    """``path := value`` or, ``existing``, ``path ?= value``."""

    line: int
    path: Path
    value: Value
    existing: bool


@dataclass(frozen=True)
class Set:
    """``name := value``."""

    line: int
    name: str
    value: Value


@dataclass(frozen=True)
class Delete:
    """``- path``."""

    line: int
    path: Path


@dataclass(frozen=True)
class Do:
    """A function as a statement."""

    line: int
    call: Call


@dataclass(frozen=True)
class Echo:
    """``echo``; what it prints is not printed here."""

    line: int
    value: Value | None


@dataclass(frozen=True)
class RemovePrivate:
    """``removeAllPrivateTags``."""

    line: int


@dataclass(frozen=True)
class Version:
    """``version "6.6"``."""

    line: int
    text: str


@dataclass(frozen=True)
class Declare:
    """``describe`` and ``export``: for XNAT's forms, nothing happens to the object."""

    line: int
    name: str


@dataclass(frozen=True)
class If:
    """Branches in turn, of ``if`` or of ``condition ? action : action``; a branch without condition is the last."""

    line: int
    branches: tuple[tuple[Condition | None, tuple[Statement, ...]], ...]


Statement = Assign | Set | Delete | Do | Echo | RemovePrivate | Version | Declare | If


def walk(statements: tuple[Statement, ...]) -> Iterator[Statement]:
    """All statements, those of branches too."""
    for statement in statements:
        yield statement
        if isinstance(statement, If):
            for _, block in statement.branches:
                yield from walk(block)


def values(statement: Statement) -> Iterator[Value]:
    """The outermost values of a statement, those of its conditions too."""
    match statement:
        case Assign(value=value) | Set(value=value):
            yield value
        case Echo(value=value) if value is not None:
            yield value
        case Do(call=call):
            yield call
        case If(branches=branches):
            for condition, _ in branches:
                if isinstance(condition, Compare):
                    yield from (condition.left, condition.right)
                elif condition is not None:
                    yield condition


def inner(value: Value) -> Iterator[Value]:
    """A value and those in it."""
    yield value
    for part in value.arguments if isinstance(value, Call) else value.items if isinstance(value, Items) else ():
        yield from inner(part)
