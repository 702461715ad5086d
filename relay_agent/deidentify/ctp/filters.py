"""The DicomFilter of CTP: a boolean expression over the elements of an object.

``!`` not, ``*`` and, ``+`` or, parentheses, ``//`` comments; operands are ``Modality.equals("MR")``,
``[0008,0060].matches("M.")``, ``true.`` and ``false.``. CTP takes an expression that it cannot read for false, and a
misspelt element for empty, so that a negated test is true; here both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

from relay_agent.dataset import Dataset
from relay_agent.deidentify.ctp.conditions import digits
from relay_agent.deidentify.ctp.element import Reference, Unknown
from relay_agent.deidentify.ctp.state import Level, meta_text
from relay_agent.deidentify.script import Context, Failed, Finding, Rejected, ScriptError
from relay_agent.instance import File
from relay_agent.java_regex import Regex, RuleError, RuleValueError

Read = Callable[[Reference], str]
Test = Callable[[Read], bool]

_SKIP = re.compile(r"(?:\s|//[^\n]*)*")
_ELEMENT = re.compile(r"\[(?:[^\[\]\"]|\[[^\[\]\"]*\])*\]|[^\W\d][\w:]*")
_METHOD = re.compile(r"\s*\.\s*([A-Za-z]+)\s*\(\s*")
_VALUE = re.compile(r'"([^"]*)"\s*\)')
_CONSTANT = re.compile(r"(true|false)\s*(\.|$)")
_DEEPEST = 100
_TEXTS: dict[str, Callable[[str, str], bool]] = {
    "equals": lambda text, wanted: text == wanted,
    "contains": lambda text, wanted: wanted in text,
    "startsWith": lambda text, wanted: text.startswith(wanted),
    "endsWith": lambda text, wanted: text.endswith(wanted),
}
_METHODS = (*_TEXTS, *(f"{name}IgnoreCase" for name in _TEXTS), "matches", "isLessThan", "isGreaterThan")


class Parser:
    """One expression; ``origin`` is the place in the whole script where it begins (line and column from 1)."""

    def __init__(self, text: str, origin: tuple[int, int] = (1, 1)) -> None:
        self._text = text
        self._origin = origin
        self._at = 0
        self._depth = 0
        self.findings: list[Finding] = []

    def parse(self) -> Test:
        """The expression as a test. Raises :class:`ScriptError`."""
        test = self._or()
        if self._next():
            self._fail("* (and), + (or) or the end is expected")
        return test

    def _place(self) -> tuple[int, int]:
        before = self._text[:self._at]
        lines = before.count("\n")
        line, column = self._origin
        return line + lines, len(before) - before.rfind("\n") if lines else column + len(before)

    def _fail(self, message: str) -> NoReturn:
        raise ScriptError(message, *self._place())

    def _note(self, message: str) -> None:
        self.findings.append(Finding(message, self._place()[0]))

    def _next(self) -> str:
        found = _SKIP.match(self._text, self._at)
        assert found is not None  # it matches the empty text
        self._at = found.end()
        return self._text[self._at:self._at + 1]

    def _or(self) -> Test:
        tests = [self._and()]
        while self._next() == "+":
            self._at += 1
            tests.append(self._and())
        return tests[0] if len(tests) == 1 else lambda read: any([test(read) for test in tests])

    def _and(self) -> Test:
        tests = [self._not()]
        while self._next() == "*":
            self._at += 1
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else lambda read: all([test(read) for test in tests])

    def _not(self) -> Test:
        if self._next() != "!":
            return self._operand()
        self._at += 1
        if self._next() == "!":
            self._fail("!! is no double negation in CTP, which drops one of them; write none or one")
        test = self._operand()
        return lambda read: not test(read)

    def _operand(self) -> Test:
        if self._next() == "(":
            self._at += 1
            self._depth += 1
            if self._depth > _DEEPEST:
                self._fail(f"parentheses are nested deeper than {_DEEPEST}")
            test = self._or()
            if self._next() != ")":
                self._fail(") is expected")
            self._at += 1
            self._depth -= 1
            return test
        constant = _CONSTANT.match(self._text, self._at)
        if constant is not None:
            self._at = constant.end()
            value = constant[1] == "true"
            return lambda _: value
        return self._comparison()

    def _comparison(self) -> Test:
        name = _ELEMENT.match(self._text, self._at)
        if name is None:
            self._fail('an element like Modality or [0008,0060] is expected, or true. or false., or (')
        if "::" in name[0] or name[0] == "this":
            self._fail("a filter sees elements of the outermost level only, by name or [gggg,eeee]")
        try:
            element = Reference.parse(name[0], {})
        except Unknown as error:
            self._fail(str(error))
        self._at = name.end()
        method = _METHOD.match(self._text, self._at)
        if method is None:
            self._fail('.equals("...") or another comparison is expected')
        if method[1] not in _METHODS:
            self._at = method.start(1)
            self._fail(f"CTP knows no {method[1][:40]}; one of {', '.join(_METHODS)} is expected")
        self._at = method.end()
        value = _VALUE.match(self._text, self._at)
        if value is None:
            self._fail('a text in double quotes and ) are expected')
        test = self._test(element, method[1], value[1])
        self._at = value.end()
        return test

    def _test(self, element: Reference, method: str, wanted: str) -> Test:
        if method == "matches":
            return self._matches(element, wanted)
        if method.startswith("is"):
            self._note(f"{method} compares the digits alone, without sign and decimal point")
            try:
                limit = digits(wanted)
            except Failed:
                self._fail("the number is too large for CTP")
            if method == "isLessThan":
                return lambda read: digits(read(element)) < limit
            return lambda read: digits(read(element)) > limit
        compare = _TEXTS[method.removesuffix("IgnoreCase")]
        if method.endswith("IgnoreCase"):
            lower = wanted.lower()
            return lambda read: compare(read(element).lower(), lower)
        return lambda read: compare(read(element), wanted)

    def _matches(self, element: Reference, wanted: str) -> Test:
        try:
            regex = Regex.compile(wanted)
        except RuleError as error:
            self._fail(str(error))

        def matches(read: Read) -> bool:
            try:
                return regex.match(read(element)) is not None
            except RuleValueError as error:
                raise Failed(str(error)) from None
        return matches


def holds(test: Test, data: Dataset, meta: Dataset) -> bool:
    """Whether an expression is true for an object; absent elements read as empty. Raises :class:`Failed`."""
    level = Level(data)

    def read(element: Reference) -> str:
        step = element.path[0]
        tag = step if isinstance(step, int) else level.private(*step)
        if tag is None:
            return ""
        return (meta_text(meta, tag) if tag < 0x00080000 else level.text(tag)) or ""
    return test(read)


class Filter:
    """One filter script: an object for which it is not true is rejected."""

    language = "CTP DicomFilter"

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._text = text
        parser = Parser(text.removeprefix("\ufeff"))
        self._test = parser.parse()
        self._findings = parser.findings

    def __reduce__(self) -> tuple[type[Filter], tuple[str, str]]:
        """Read again where it arrives."""
        return Filter, (self._text, self.name)

    def matches(self, data: Dataset, meta: Dataset | None = None) -> bool:
        """Whether the expression is true; ``meta`` is the File Meta Information, for elements of group 0002."""
        return holds(self._test, data, meta if meta is not None else Dataset())

    def apply(self, file: File, context: Context) -> None:
        """Raises :class:`Rejected` when the expression is not true, :class:`Failed` when that cannot be told."""
        context.rule = self.name
        try:
            if not self.matches(file.dataset, file.meta):
                raise Rejected(self.name)
        except Failed as error:
            raise Failed(str(error), self.name) from None

    def findings(self) -> list[Finding]:
        """What the author should know."""
        return list(self._findings)

    def touches(self) -> set[int]:
        """Nothing: a filter changes no element."""
        return set()
