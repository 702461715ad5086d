"""The functions of CTP that ask a table: ``@lookup`` and ``@integer``."""

from __future__ import annotations

from relay_agent.deidentify.ctp.arguments import contents, element, expression, whole
from relay_agent.deidentify.ctp.command import MARKS, Call, Part, Piece
from relay_agent.deidentify.ctp.state import State
from relay_agent.deidentify.script import Failed
from relay_agent.java_regex import RuleValueError


def entry(state: State, kind: str, key: str) -> str | None:
    """What the lookup table has for a key of a kind, ``@kind/key`` followed ten times at most; None without it."""
    lookup = state.lookup
    if not lookup:
        return None
    value = lookup.get(f"{kind.strip()}/{key.strip()}")
    for _ in range(10):
        if value is None:
            return None
        value = value.strip()
        if value[:1] != "@" or "/" not in value:
            return value
        value = lookup.get(value[1:].strip())
    return None


def lookup(call: Call) -> Part:
    """``@lookup(El[|El...],keytype[,keep|remove|empty|default,text|ignore,regex])``."""
    keys = [element(call, text) for text in call.args[0].split("|")]
    kind = call.args[1]
    action = call.args[2].strip() if len(call.args) > 2 else ""
    extra = call.args[3].strip() if len(call.args) > 3 else None
    if action and action not in ("keep", "remove", "empty", "default", "ignore"):
        call.scope.notes.append(f"@lookup knows no {action}; an object whose value is not in the table is quarantined")
    if action in ("default", "ignore") and extra is None:
        call.scope.notes.append(f"@lookup(...,{action}) has no value; without an entry the object is quarantined")
    pattern = expression(call, 3) if action == "ignore" and extra is not None else None
    missing: Piece | None = MARKS.get(f"@{action}()")
    if action == "default" and extra is not None:
        missing = MARKS.get(extra, extra)

    def found(state: State) -> Piece:
        key = "|".join(part.text(state) or "" for part in keys).replace("\\", "")
        value = entry(state, kind, key)
        if value is not None:
            return MARKS.get(value, value)
        if missing is not None:
            return missing
        try:
            if pattern is not None and pattern.match(key) is not None:
                return key
        except RuleValueError as error:
            raise Failed(str(error)) from None
        raise Failed("a value is not in the lookup table" if state.lookup else "there is no lookup table")
    return found


def integer(call: Call) -> Part:
    """``@integer(El,keytype[,width])``: each value of a type has a number of its own."""
    text, kind = contents(call), call.args[1].strip()
    width = (whole(call.args[2].strip()) or 0) if len(call.args) > 2 else 0

    def number(state: State) -> str:
        if state.context.number is None:
            raise Failed("@integer needs a table of numbers, and there is none here")
        return f"{state.context.number(kind, text(state).strip()):0{min(max(width, 1), 64)}}"
    return number
