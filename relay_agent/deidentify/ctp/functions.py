"""The functions of CTP's anonymiser scripts, each made ready for its arguments.

Where CTP writes its own arguments, the word ``null``, or the original value because an argument is wrong, the script
is refused (:class:`Wrong`); where it blanks or removes, so does this.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from relay_agent.deidentify.ctp import dates, tables, values
from relay_agent.deidentify.ctp.arguments import contents, expression, parameter_number, reference, whole
from relay_agent.deidentify.ctp.command import (
    EMPTY,
    KEEP,
    MARKS,
    NOTHING,
    REMOVE,
    Call,
    Mark,
    Part,
    Piece,
    Pieces,
    Wrong,
    run,
)
from relay_agent.deidentify.ctp.conditions import condition
from relay_agent.deidentify.ctp.element import Reference
from relay_agent.deidentify.ctp.state import State
from relay_agent.deidentify.script import Failed, Rejected
from relay_agent.java_regex import RuleValueError

_BLANKS = 55  # CTP writes no more


def _contents(call: Call) -> Part:
    text = contents(call)
    if len(call.args) == 1:
        return text
    regex, replacement = expression(call, 1), call.args[2] if len(call.args) > 2 else ""

    def replaced(state: State) -> str:
        try:
            return regex.replace_all(text(state), replacement)
        except RuleValueError as error:
            raise Failed(str(error)) from None
    return replaced


def _value(call: Call) -> Part:
    text, default = contents(call), call.args[1] if len(call.args) > 1 else ""
    return lambda state: text(state) or default


def _truncate(call: Call) -> Part:
    text, length = contents(call), whole(call.args[1])
    if length is None:
        raise Wrong("@truncate needs a whole number; CTP would write the whole value")
    if length >= 0:
        return lambda state: text(state)[:length]
    return lambda state: text(state).strip()[length:]


def _pathelement(call: Call) -> Part:
    text, index = contents(call), whole(call.args[1])
    if index is None:
        raise Wrong("@pathelement needs a whole number; CTP would write the whole value")

    def part(state: State) -> str:
        path = text(state)
        parts = re.sub("/+$", "", path).split("/")
        place = index if index >= 0 else len(parts) + index
        return parts[place] if 0 <= place < len(parts) else path
    return part


def _initials(call: Call) -> Part:
    text, offset = contents(call), (whole(call.args[1]) or 0) if len(call.args) > 1 else 0
    if not offset:
        return lambda state: values.initials(text(state))

    def moved(state: State) -> str:
        letters = values.caesar(values.initials(text(state)), offset)
        if letters is None:
            raise Failed("initials other than A to Z cannot be moved along the alphabet")
        return letters
    return moved


def _round(call: Call) -> Part:
    text, size = contents(call), whole(call.scope.parameter(call.raw[1]))
    if not size:
        raise Wrong("@round needs an element and a size that is a whole number; CTP would write these arguments")

    def rounded(state: State) -> str:
        age = values.rounded(text(state), size)
        if age is None:
            raise Failed("a value to be rounded is no age")
        return age
    return rounded


def _hash(call: Call) -> Part:
    read, length = reference(call).text, parameter_number(call, 1)

    def hashed(state: State) -> Piece:
        text = read(state)
        return values.md5(text, length) if text is not None else REMOVE
    return hashed


def _hashname(call: Call) -> Part:
    text, length, words = contents(call), parameter_number(call, 1), parameter_number(call, 2) or 0
    return lambda state: values.name(text(state), 4 if length is None else length, words)


def _hashptid(call: Call) -> Part:
    site, text, length = call.scope.parameter(call.raw[0]).strip(), contents(call, 1), parameter_number(call, 2)
    return lambda state: values.md5(f"[{site}]{text(state).strip()}", length)


def _hashuid(call: Call) -> Part:
    root, read = call.scope.parameter(call.raw[0]).strip().rstrip("."), reference(call, 1).text
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", root):
        raise Wrong("@hashuid needs the root of a UID first: numbers with dots between them")
    if len(root) > 43:
        call.scope.notes.append(f"a root of {len(root)} characters leaves {max(63 - len(root), 0)} digits: "
                                "different UIDs may become one")
    other = reference(call, 2) if len(call.args) > 2 else None

    def hashed(state: State) -> Piece:
        old = read(state)
        if old is None:
            return REMOVE
        if other is not None:
            old += _of_other(other, state)
        return values.uid(root + ".", old)
    return hashed


def _of_other(other: Reference, state: State) -> str:
    """What the command of another element gives here; nothing when it has none."""
    tag = state.tag if not other.path else other.path[0]
    rule = state.rules.get(tag) if isinstance(tag, int) else None
    if rule is None:
        return ""
    here = state.tag
    state.tag = tag if isinstance(tag, int) else here
    try:
        return "".join(piece.text if isinstance(piece, Mark) else piece for piece in run(rule.program, state))
    except RecursionError:
        raise Failed("commands call each other without end") from None
    finally:
        state.tag = here


def _encrypt(call: Call) -> Part:
    text, key = contents(call), call.scope.parameter(call.raw[1])
    call.scope.notes.append("@encrypt is Blowfish without salt: whoever has the key can read the value, and equal "
                            "values look equal")
    return lambda state: values.encrypted(text(state), key)


def _decrypt(call: Call) -> Part:
    text, key = contents(call), call.scope.parameter(call.raw[1])

    def plain(state: State) -> str:
        result = values.decrypted(text(state), key)
        if result is None:
            raise Failed("a value cannot be decrypted")
        return result
    return plain


def _if(call: Call) -> Part:
    holds = condition(call, reference(call))
    yes, no = (*call.clauses, ())[:2]
    return lambda state: run(yes if holds(state) else no, state)


def _select(call: Call) -> Part:
    root, item = (*call.clauses, ())[:2]
    return lambda state: run(root if state.level is state.root else item, state)


def _append(call: Call) -> Part:
    clause = call.clauses[0]
    here = Reference(False, ())

    def appended(state: State) -> str:
        pieces = run(clause, state)
        if any(isinstance(piece, Mark) for piece in pieces):
            raise Failed("@append adds text; what its {...} gives is none")
        old = here.text(state)
        text = "".join(map(str, pieces))
        return f"{old}\\{text}" if old else text
    return appended


def _require(call: Call) -> Part:
    other = reference(call) if call.args[0] else None
    default = call.args[1] if len(call.args) > 1 else ""

    def required(state: State) -> Pieces:
        if state.tag in state.level.before:
            return KEEP
        if other is None:
            return ""
        text = (other.text(state) or "") if other.exists(state) else default
        return text if text.strip() else EMPTY
    return required


def _process(_: Call) -> Part:
    def process(state: State) -> Piece:
        state.process(state)
        return KEEP
    return process


def _quarantine(_: Call) -> Part:
    def quarantine(state: State) -> Piece:
        raise Rejected(state.context.rule)
    return quarantine


def _skip(call: Call) -> Part:
    call.scope.notes.append("@skip: CTP lets the object go on unchanged; here it is quarantined")

    def skip(state: State) -> Piece:
        raise Failed("@skip() would let the object go on unchanged, with everything in it")
    return skip


def _blank(call: Call) -> Part:
    digits = re.sub("[^0-9]", "", call.args[0])
    return Mark("@blank(n)", min(int(digits[:9] or "0"), _BLANKS))


def _param(call: Call) -> Part:
    value = call.scope.parameter(call.raw[0])
    return MARKS.get(value.strip(), value)


def _case(call: Call) -> Part:
    text, upper = contents(call), call.name == "uppercase"
    return lambda state: text(state).upper() if upper else text(state).lower()


def _call(_: Call) -> Part:
    raise Wrong("@call asks a plug-in of CTP, and there is none here")


_MARK = {mark.text[1:-2]: mark for mark in MARKS.values()}
# name: fewest and most arguments (empty ones count), what makes it
_FUNCTIONS: dict[str, tuple[int, int, Callable[[Call], Part]]] = {
    "always": (1, 1, lambda _: NOTHING), "append": (1, 1, _append), "blank": (1, 1, _blank), "call": (0, 99, _call),
    "contents": (1, 3, _contents), "date": (1, 1, dates.clock), "dateinterval": (3, 4, dates.dateinterval),
    "decrypt": (2, 2, _decrypt), "encrypt": (2, 2, _encrypt), "hash": (1, 2, _hash), "hashdate": (2, 2, dates.hashdate),
    "hashname": (2, 3, _hashname), "hashptid": (2, 3, _hashptid), "hashuid": (2, 3, _hashuid), "if": (2, 3, _if),
    "incrementdate": (1, 3, dates.incrementdate), "initials": (1, 2, _initials), "integer": (2, 3, tables.integer),
    "lookup": (2, 4, tables.lookup), "lowercase": (1, 1, _case), "modifydate": (1, 4, dates.modifydate),
    "param": (1, 1, _param),
    "pathelement": (2, 2, _pathelement), "process": (1, 1, _process), "quarantine": (1, 1, _quarantine),
    "require": (1, 2, _require), "round": (2, 2, _round), "select": (1, 1, _select), "skip": (1, 1, _skip),
    "time": (1, 1, dates.clock), "truncate": (2, 2, _truncate), "uppercase": (1, 1, _case), "value": (1, 2, _value),
}


def build(call: Call) -> Part:
    """The part for one function. Raises :class:`Wrong` for an unknown one and for wrong arguments."""
    if call.name in _MARK and not any(call.raw):
        return _MARK[call.name]
    if call.name not in _FUNCTIONS:
        close = difflib.get_close_matches(call.name.lower(), [*_FUNCTIONS, *_MARK], 1, 0.7)
        raise Wrong(f"CTP has no function @{call.name[:32]} and would write it as text"
                    + (f"; did you mean @{close[0]}?" if close else ""))
    fewest, most, make = _FUNCTIONS[call.name]
    if not fewest <= len(call.raw) <= most:
        extra = "; a tag is written without a comma" if len(call.raw) > most else ""
        raise Wrong(f"@{call.name} takes {fewest if fewest == most else f'{fewest} to {most}'} arguments, "
                    f"not {len(call.raw)}{extra}")
    return make(call)
