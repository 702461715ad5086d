"""The functions of CTP for dates."""

from __future__ import annotations

from collections.abc import Callable

from relay_agent.deidentify.ctp import values
from relay_agent.deidentify.ctp.arguments import contents, reference, whole
from relay_agent.deidentify.ctp.command import EMPTY, REMOVE, Call, Part, Piece, Wrong
from relay_agent.deidentify.ctp.element import Reference
from relay_agent.deidentify.ctp.state import State
from relay_agent.deidentify.ctp.tables import entry
from relay_agent.deidentify.script import Failed


def _dates(call: Call, change: Callable[[State, str], str | None]) -> Callable[[State], Piece]:
    """Absent dates remove the element, what is no date or cannot be changed blanks it."""
    read = reference(call).text

    def changed(state: State) -> Piece:
        text = read(state)
        if text is None:
            return REMOVE
        return (change(state, text) if len(text) >= 8 else None) or EMPTY
    return changed


def hashdate(call: Call) -> Part:
    """``@hashdate(El,KeyEl)``: up to ten years earlier, by the hash of another element."""
    seed = reference(call, 1).text

    def earlier(state: State, text: str) -> str | None:
        key = seed(state)
        return values.shifted(text, -(int(values.md5(key)[-4:]) % 3650 or 1)) if key is not None else None
    date = _dates(call, earlier)
    return lambda state: REMOVE if seed(state) is None else date(state)


def incrementdate(call: Call) -> Part:
    """``@incrementdate(El,days)`` or ``(El,KeyEl,keytype)`` with days from the lookup table."""
    if len(call.raw) == 2:
        days = whole(call.scope.parameter(call.raw[1]))
        if days is None:
            call.scope.notes.append("the increment is no whole number, so the date is blanked")
        return _dates(call, lambda _, text: None if days is None else _shifted(text, days))
    if len(call.raw) < 2:
        call.scope.notes.append("@incrementdate has no increment, so the date is blanked")
        return _dates(call, lambda _, text: None)
    key, kind = reference(call, 1).text, call.scope.parameter(call.raw[2])

    def change(state: State, text: str) -> str | None:
        by = key(state)
        found = entry(state, kind, by) if by is not None else None
        increment = whole(found) if found is not None else None
        return _shifted(text, increment) if increment is not None else None
    return _dates(call, change)


def _shifted(text: str, days: int) -> str | None:
    return values.shifted(text, days) if abs(days) < 10**7 else None


def modifydate(call: Call) -> Part:
    """``@modifydate(El,year,month,day)``, ``*`` leaves a part as it is."""
    if len(call.raw) < 4:
        call.scope.notes.append("@modifydate needs year, month and day, so the date is blanked")
        return _dates(call, lambda _, text: None)
    parts = [call.scope.parameter(raw).strip() for raw in call.raw[1:4]]
    numbers = [-1 if part == "*" else whole(part) for part in parts]
    if any(number is None or number > 9999 for number in numbers):
        raise Wrong("@modifydate needs a number or * for year, month and day; CTP would leave the date as it is")
    year, month, day = (number or 0 for number in numbers)
    return _dates(call, lambda _, text: values.modified(text, (year, month, day)))


def dateinterval(call: Call) -> Part:
    """``@dateinterval(El,keytype,KeyEl[,origin])``: days since a date of the lookup table; as many after ``origin``."""
    text, kind, key = contents(call), call.args[1], reference(call, 2)
    key = Reference(True, key.path) if key.path else key
    origin = call.scope.parameter(call.raw[3]) if len(call.raw) > 3 else None

    def interval(state: State) -> str:
        base = entry(state, kind, key.text(state) or "")
        days = values.days_between(text(state), base) if base is not None else None
        if days is None:
            raise Failed("an interval needs a date and an entry in the lookup table")
        result = str(days) if origin is None else values.shifted(origin, days)
        if result is None:
            raise Failed("the date of origin is no date")
        return result
    return interval


def clock(call: Call) -> Part:
    """``@date(separator)`` and ``@time(separator)``."""
    mark, pattern = call.args[0], ("%Y", "%m", "%d") if call.name == "date" else ("%H", "%M", "%S")
    return lambda state: mark.join(state.context.now.strftime(part) for part in pattern)
