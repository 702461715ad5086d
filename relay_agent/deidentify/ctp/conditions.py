"""The conditions of ``@if``."""

from __future__ import annotations

import re
from collections.abc import Callable

from relay_agent.deidentify.ctp.arguments import expression, literal
from relay_agent.deidentify.ctp.command import Call, Wrong
from relay_agent.deidentify.ctp.element import Reference
from relay_agent.deidentify.ctp.state import State
from relay_agent.deidentify.script import Failed
from relay_agent.java_regex import RuleValueError

Condition = Callable[[State], bool]
_LARGEST = 2**31 - 1


def digits(text: str) -> int:
    """The digits of a text as a number, as CTP compares; none is 0. Raises :class:`Failed` beyond Java's int."""
    number = int(re.sub("[^0-9]", "", text[:4096]) or "0")
    if number > _LARGEST:
        raise Failed("a number to be compared is too large for CTP")
    return number


def condition(call: Call, element: Reference) -> Condition:
    """The condition of an ``@if``. Raises :class:`Wrong`."""
    test = call.args[1].strip()
    if test == "exists":
        return element.exists
    read = element.text
    if test == "isblank":
        return lambda state: not (read(state) or "").strip()
    if test not in ("equals", "contains", "matches", "greaterthan"):
        raise Wrong("@if knows exists, isblank, equals, contains, matches, greaterthan; CTP takes others for not true")
    if len(call.args) < 3:
        raise Wrong(f"@if(...,{test}) needs something to compare with; CTP takes it for not true")
    if call.args[2].startswith("@"):
        wanted = call.scope.parameter(call.args[2])
    elif test == "matches":
        wanted = call.args[2]
    else:
        wanted = literal(call, 2)
    lower = wanted.lower()
    if test == "equals":
        return lambda state: (read(state) or "").lower() == lower
    if test == "contains":
        return lambda state: lower in (read(state) or "").lower()
    if test == "greaterthan":
        call.scope.notes.append("greaterthan compares the digits alone, without sign and decimal point")
        try:
            limit = digits(wanted)
        except Failed:
            raise Wrong("the number to compare with is too large for CTP") from None
        return lambda state: digits(read(state) or "") > limit
    regex = expression(call, 2)

    def matches(state: State) -> bool:
        try:
            return regex.match(read(state) or "") is not None
        except RuleValueError as error:
            raise Failed(str(error)) from None
    return matches
