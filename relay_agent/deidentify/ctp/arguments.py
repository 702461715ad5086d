"""The arguments of functions: elements, whole numbers, and Java's regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable

from relay_agent.deidentify.ctp.command import Call, Wrong
from relay_agent.deidentify.ctp.element import Reference, Unknown
from relay_agent.deidentify.ctp.state import State
from relay_agent.java_regex import Regex, RuleError

Text = Callable[[State], str]
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_LOST = re.compile(r'\\([^\\"])|\\\\|\\"')


def reference(call: Call, number: int = 0) -> Reference:
    """The element that an argument names."""
    return element(call, call.args[number])


def element(call: Call, text: str) -> Reference:
    """The element that a text names. Raises :class:`Wrong`."""
    if not text.strip():
        raise Wrong(f"@{call.name}(...) needs an element")
    try:
        return Reference.parse(text, call.scope.local)
    except Unknown as error:
        raise Wrong(str(error)) from None


def contents(call: Call, number: int = 0) -> Text:
    """The text of an element, empty when it is absent."""
    read = reference(call, number).text
    return lambda state: read(state) or ""


def whole(text: str) -> int | None:
    """A whole number as Java reads one, None for anything else."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parameter_number(call: Call, number: int) -> int | None:
    """A whole number, written or as a parameter; None without one, as CTP then sets no limit."""
    return whole(call.scope.parameter(call.raw[number])) if len(call.raw) > number else None


def expression(call: Call, number: int) -> Regex:
    """The expression that an argument holds, after CTP's parser has taken a backslash of each pair. Raises Wrong."""
    literal(call, number)
    try:
        return Regex.compile(call.args[number])
    except RuleError as error:
        raise Wrong(f"argument {number + 1} of @{call.name}: {error}") from None


def literal(call: Call, number: int) -> str:
    """An argument whose backslashes matter: a single one is lost in CTP, so that nothing is found any more."""
    lost = next((found[1] for found in _LOST.finditer(call.raw[number]) if found[1]), None)
    if lost is not None:
        raise Wrong(f"CTP loses the backslash before {lost!r} and looks for something else; write two of them")
    return call.args[number]
