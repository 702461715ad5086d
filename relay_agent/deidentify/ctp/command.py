"""The commands of an anonymiser script: text with functions, ``site-@hashptid(@SITEID,this,8)``, made ready to run.

A command is compiled once into parts, a text or a function each; running it joins what they give. ``@keep()``,
``@remove()``, ``@empty()`` and ``@blank(n)`` are no functions but marks in the text; here they cannot come from the
values of an object, as in CTP, where a patient named ``@keep()`` keeps the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from relay_agent.deidentify.ctp.element import Key
from relay_agent.deidentify.ctp.state import State


class Wrong(ValueError):
    """A command that cannot be used; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What is to be done with the element instead of writing text."""

    text: str
    blanks: int = 0


KEEP, REMOVE, EMPTY = Mark("@keep()"), Mark("@remove()"), Mark("@empty()")
MARKS = {mark.text: mark for mark in (KEEP, REMOVE, EMPTY)}

Piece = str | Mark
Part = Piece | Callable[[State], "Pieces"]
Pieces = Piece | tuple[Piece, ...]
Program = tuple[Part, ...]


def run(program: Program, state: State) -> tuple[Piece, ...]:
    """What the parts give, one after the other. Raises Failed, Rejected."""
    out: list[Piece] = []
    for part in program:
        piece = part(state) if callable(part) else part
        if isinstance(piece, tuple):
            out += piece
        else:
            out.append(piece)
    return tuple(out)


@dataclass(slots=True)
class Scope:
    """What a script declares, for its commands; ``notes`` collects what their author should know."""

    parameters: Mapping[str, str]
    local: Mapping[str, Key]
    notes: list[str] = field(default_factory=list)

    def parameter(self, text: str) -> str:
        """The value of ``@NAME``; any other text stands for itself. Raises :class:`Wrong`."""
        name = text.strip()
        if name[:1] not in ("@", "$"):
            return name
        if name[1:] not in self.parameters:
            raise Wrong(f"there is no parameter {name[1:]}; CTP would use the word null")
        return self.parameters[name[1:]]


@dataclass(frozen=True, slots=True)
class Call:
    """One function with its arguments: ``raw`` as written, ``args`` without escapes and quotes."""

    name: str
    raw: tuple[str, ...]
    clauses: tuple[Program, ...]
    scope: Scope

    @property
    def args(self) -> tuple[str, ...]:
        """The arguments, without the quotes and escapes."""
        return tuple(argument(raw) for raw in self.raw)


def argument(raw: str) -> str:
    """An argument without escapes and quotes."""
    text = re.sub(r"\\(.)", r"\1", raw, flags=re.DOTALL).strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def parse(text: str, scope: Scope, build: Callable[[Call], Part]) -> Program:
    """A command; ``build`` makes a part of each function. Raises :class:`Wrong`."""
    parts: list[Part] = []
    literal, position = "", 0
    while position < len(text):
        char = text[position]
        if char == "\\":
            literal += text[position + 1:position + 2]
            position += 2
        elif char != "@":
            literal += char
            position += 1
        else:
            call, position = _call(text, position + 1, scope, build)
            if call is None:
                scope.notes.append("after an @ that begins no function CTP drops the rest of the command, and so does "
                                   "this; write \\@ for the character")
                break
            if literal:
                parts.append(literal)
                literal = ""
            parts.append(call)
    if literal:
        parts.append(literal)
    _alone(parts)
    return tuple(parts)


def _alone(parts: list[Part]) -> None:
    marks = [part for part in parts if isinstance(part, Mark) and part is not REMOVE]
    others = [part for part in parts if part not in marks and (not isinstance(part, str) or part.strip()) and
              part not in (REMOVE, NOTHING)]
    if len(marks) > 1 or (marks and others):
        raise Wrong(f"{marks[0].text} stands alone; together with anything else CTP writes it as text")


def NOTHING(_: State) -> str:
    """What ``@always()`` gives."""
    return ""


def _call(text: str, start: int, scope: Scope, build: Callable[[Call], Part]) -> tuple[Part | None, int]:
    """The part for the function whose name starts here, and where the text goes on; None when there is none."""
    opening = text.find("(", start)
    if opening < 0:
        return None, 0
    name = re.sub(r"\s", "", text[start:opening])
    raw, begin, position = [], opening + 1, opening
    while True:
        position = _delimiter(text, position + 1, ",)", "(")
        if position < 0:
            return None, 0
        raw.append(text[begin:position].strip())
        begin = position + 1
        if text[position] == ")":
            break
    position += 1
    clauses = []
    for optional in {"if": (False, True), "select": (False, True), "append": (False,)}.get(name, ()):
        brace = re.compile(r"\s*\{").match(text, position)
        end = _delimiter(text, brace.end(), "}", "{") if brace is not None else -1
        if end < 0 or brace is None:
            if not optional or brace is not None:
                raise Wrong(f"@{name}(...) is expected to be followed by {{...}}; CTP would drop the rest")
            if text[position:].strip():
                raise Wrong(f"after @{name}(...){{...}} CTP drops what follows, unless it is a second {{...}}")
            break
        clauses.append(parse(text[brace.end():end], scope, build))
        position = end + 1
    return build(Call(name, tuple(raw), tuple(clauses), scope)), position


def _delimiter(text: str, position: int, delimiters: str, opening: str) -> int:
    """Where the list or clause ends, as CTP counts: escapes and quotes skipped, brackets closed; -1 for nowhere."""
    depth, brackets, quoted = 1, 0, False
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif quoted or char == '"':
            quoted = quoted != (char == '"')
        elif char in "[]":
            brackets += 1 if char == "[" else -1
        elif char == opening:
            depth += 1
        elif char in delimiters and not brackets:
            depth -= 1
            if not depth:
                return position
        position += 1
    return -1
