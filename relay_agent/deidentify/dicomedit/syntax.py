"""The grammar of DicomEdit 6.

A recursive descent of our own: the tokens of the language overlap (a bracket may begin a tag, ``-4`` is a number and
``-(0010,0010)`` a deletion), and only what stands where says which is meant. In EBNF, blanks and comments left out::

    script     = { newline } { statement { newline } }
    statement  = action | condition "?" action [ ":" action ] | if | "removeAllPrivateTags"
               | "version" string | "describe" name ( string | "hidden" | "const" | "immutable" ) | "export" name string
    action     = path ( ":=" | "?=" ) value | name ":=" value | "-" path | call | "echo" [ value ]
    if         = "if" "(" condition ")" block { "elseif" "(" condition ")" block } [ "else" block ]
    block      = { newline } "{" { statement | newline } "}"
    condition  = value ( "=" | "!=" | "~" | "!~" ) value | call
    value      = number | string | name | path | call | "{" [ value { "," value } ] "}"
    call       = name "[" [ value { "," value } ] "]"
    path       = step { "/" step }
    step       = "*" | "+" | "." | tag [ "[" ( number | "%" ) "]" ]
    tag        = "(" group "," ( element ")" | "{" creator "}" digit digit ")" )
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from relay_agent.deidentify.dicomedit.nodes import (
    Assign,
    Call,
    Compare,
    Condition,
    Declare,
    Delete,
    Do,
    Echo,
    If,
    Items,
    Name,
    RemovePrivate,
    Set,
    Statement,
    Tag,
    Text,
    Value,
    Version,
)
from relay_agent.deidentify.dicomedit.paths import ANY, Path, Step
from relay_agent.deidentify.dicomedit.scanner import NAME, NEWLINE, Scanner
from relay_agent.deidentify.script import ScriptError

VERSIONS = ("6.0", "6.1", "6.2", "6.3", "6.4", "6.5", "6.6")
_DEEPEST = 50
_STRING = re.compile(r'"(?:\\\r?\n|\\(?:[nrtbf()\\]|[0-7]{3})|[^\\"\n])*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+|-?[1-9][0-9]*|0")
_ITEM = re.compile(r"-?[1-9][0-9]*|0|%")
_GROUP = re.compile(r"\(([0-9A-Fa-fXx@#]{4})")
_ELEMENT = re.compile(r"([0-9A-Fa-fXx@#]{4})\)")
_PRIVATE = re.compile(r"\{([A-Za-z][A-Za-z0-9 \-_.:]*)\}([0-9A-Fa-fXx@#]{2})\)")
_OPERATOR = re.compile(r"!=|!~|=|~")
_WORDS = frozenset({"if", "elseif", "else", "describe", "hidden", "const", "immutable", "export", "echo",
                    "removeAllPrivateTags", "version"})
_STATEMENT = 'a statement, such as (0010,0010) := "x", -(0010,0010), name := value, a function or if (...) {'


def parse(text: str) -> tuple[Statement, ...]:
    """The statements of a script. Raises :class:`ScriptError` with line, column and what was expected."""
    parser = _Parser(text)
    parser.check_quotes()
    return parser.script()


@lru_cache(4096)
def parse_path(text: str) -> Path | None:
    """The path that a string holds, None when it holds none."""
    parser = _Parser(text)
    try:
        path = parser.path()
        return path if parser.at_end() else None
    except ScriptError:
        return None


class _Parser(Scanner):
    depth = 0

    def nested(self, parse: Callable[[], Value | tuple[Statement, ...]]) -> Value | tuple[Statement, ...]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error(f"values and blocks are nested deeper than {_DEEPEST} levels")
        result = parse()
        self.depth -= 1
        return result

    # Statements

    def script(self) -> tuple[Statement, ...]:
        statements = []
        self.newlines()
        while not self.at_end():
            statements.append(self.statement())
            self.newlines()
        return tuple(statements)

    def statement(self) -> Statement:
        word = self.word()
        line = self.line
        if word == "if":
            return self.if_statement()
        if word == "removeAllPrivateTags":
            self.take(NAME)
            return RemovePrivate(line)
        if word == "version":
            self.take(NAME)
            return Version(line, self.string('a version in double quotes, such as "6.6"').raw)
        if word in ("describe", "export"):
            self.take(NAME)
            name = self.name(f'a name after "{word}"')
            if not (word == "describe" and self.word() in ("hidden", "const", "immutable") and self.take(NAME)):
                self.string('a text in double quotes' + (", hidden, const or immutable" if word == "describe" else ""))
            return Declare(line, name)
        if word == "echo" or self.sees("-"):
            return self.action()
        start = self.position
        action = self.assignment()
        if action is not None:
            return action
        self.position = start
        return self.conditional_or_call()

    def assignment(self) -> Statement | None:
        """An assignment, None when something else begins here."""
        line = self.line
        if self.sees("(", "*", "+", "."):
            path = self.path()
            existing = self.sees("?=")
            if existing or self.sees(":="):
                self.position += 2
                return Assign(line, path, self.value(f'a value after "{"?=" if existing else ":="}"'), existing)
            return None
        word = self.word()
        if not word or word in _WORDS or word in "xX":
            return None
        self.take(NAME)
        return Set(line, word, self.value('a value after ":="')) if self.accept(":=") else None

    def action(self) -> Statement:
        self.blank()
        line = self.line
        if self.word() == "echo":
            self.take(NAME)
            more = self.sees('"', "(", "*", "+", ".", "{") or self.word() not in {"", *_WORDS} or _NUMBER.match(
                self.text, self.position)
            return Echo(line, self.value("a value") if more else None)
        if self.accept("-"):
            return Delete(line, self.path())
        start = self.position
        found = self.assignment()
        if found is None:
            self.position = start
            if not self.word():
                raise self.error("expected an action: an assignment, a deletion, a function or echo")
            value = self.value("an action")
            if not isinstance(value, Call):
                raise self.error('expected ":=", or "[" of a function, in an action')
            found = Do(line, value)
        return found

    def conditional_or_call(self) -> Statement:
        line = self.line
        if not self.sees('"', "(", "*", "+", ".", "{") and not self.word() and not _NUMBER.match(
                self.text, self.position):
            raise self.error(f"expected {_STATEMENT}")
        condition = self.condition(statement=True)
        if not self.sees("?") or self.sees("?="):
            if isinstance(condition, Call):
                return Do(line, condition)
            raise self.error('expected "?" and an action after the condition (":=" assigns, "=" compares)')
        self.position += 1
        if self.word() in ("removeAllPrivateTags", "if", "version", "describe", "export"):
            raise self.error(f'expected an action after "?"; "{self.word()}" is none, put it into if (...) {{ }}')
        if self.at_end() or NEWLINE.match(self.text, self.position):
            raise self.error('expected an action after "?", on the same line')
        branches: list[tuple[Condition | None, tuple[Statement, ...]]] = [(condition, (self.action(),))]
        if self.accept(":"):
            branches.append((None, (self.action(),)))
        return If(line, tuple(branches))

    def condition(self, statement: bool = False) -> Condition:
        left = self.value(_STATEMENT if statement else "a condition")
        operator = self.take(_OPERATOR)
        if operator is None:
            if isinstance(left, Call):
                return left
            raise self.error('expected ":=" or "?=" to assign, or "=", "!=", "~" or "!~" to compare' if statement else
                             'expected "=", "!=", "~" or "!~"')
        return Compare(left, operator[0], self.value(f'a value after "{operator[0]}"'))

    def if_statement(self) -> If:
        line = self.line
        branches: list[tuple[Condition | None, tuple[Statement, ...]]] = []
        word = "if"
        while word in ("if", "elseif", "else"):
            self.take(NAME)
            condition = None
            if word != "else":
                self.expect("(", f'after "{word}"')
                condition = self.condition()
                self.expect(")", "after the condition")
            self.newlines()
            if word == "else" and self.word() == "if":
                raise self.error('expected "{" after "else"; write "elseif" in one word')
            self.expect("{", f'to begin the block of "{word}"')
            block = self.nested(self.block)
            assert isinstance(block, tuple)
            branches.append((condition, block))
            after = self.position
            self.newlines()
            word = self.word() if word != "else" else ""
            if word not in ("elseif", "else"):
                self.position = after
                break
        return If(line, tuple(branches))

    def block(self) -> tuple[Statement, ...]:
        statements = []
        self.newlines()
        while not self.accept("}"):
            if self.at_end():
                raise self.error('expected "}" to end the block')
            statements.append(self.statement())
            self.newlines()
        return tuple(statements)

    # Values

    def value(self, what: str) -> Value:
        if self.sees('"'):
            return self.string(what)
        number = self.take(_NUMBER)
        if number:
            if re.match("[0-9]", self.text[self.position:self.position + 1]):
                raise self.error("expected a number without a leading zero, or a text in double quotes", number.start())
            return Text(number[0], number[0])
        if self.sees("{"):
            self.position += 1
            items = self.nested(self.list_items)
            assert isinstance(items, Items)
            return items
        if self.sees("(", "*", "+", "."):
            return Tag(self.path())
        name = self.name(what)
        if not self.accept("["):
            return Name(name)
        call = self.nested(lambda: Call(name, self.values("]", f'in the arguments of "{name}"')))
        assert isinstance(call, Call)
        return call

    def list_items(self) -> Items:
        return Items(self.values("}", "in the list", self.newlines))

    def values(self, end: str, where: str, between: Callable[[], None] = lambda: None) -> tuple[Value, ...]:
        between()
        if self.accept(end):
            return ()
        values = []
        while True:
            values.append(self.value(f"a value {where}"))
            between()
            if self.accept(end):
                return tuple(values)
            if not self.accept(","):
                raise self.error(f'expected "," or "{end}" {where}')
            between()

    def string(self, what: str) -> Text:
        found = self.take(_STRING)
        if found is None:
            if self.sees('"'):
                raise self.error('expected a text whose backslashes are doubled ("\\\\" for one)')
            raise self.error(f"expected {what}")
        raw = re.sub(r"\\\r?\n", "", found[0][1:-1])
        return Text(raw.replace("\\\\", "\\"), raw)

    def name(self, what: str) -> str:
        word = self.word()
        if not word or word in _WORDS:
            raise self.error(f"expected {what}" + (f'; "{word}" is a word of the language' if word else ""))
        if word in "xX":
            raise self.error(f'expected {what}; DicomEdit takes "{word}" alone for an open digit of a tag')
        self.take(NAME)
        return word

    # Paths

    def path(self) -> Path:
        steps = [self.step()]
        while self.accept("/"):
            before = steps[-1]
            if isinstance(before, Step) and before.item is None:
                steps[-1] = Step(before.group, before.element, before.creator, ANY)
            steps.append(self.step())
        return Path(tuple(steps))

    def step(self) -> Step | str:
        if self.sees("*", "+", "."):
            self.position += 1
            return self.text[self.position - 1]
        group = self.take(_GROUP)
        if group is None:
            raise self.error("expected a tag such as (0010,0010) or (0029,{CREATOR}08)")
        last = group[1][-1]
        if last in "Xx":
            raise self.error("expected a digit, @ (even) or # (odd) at the end of the group", group.end() - 1)
        self.expect(",", "between group and element")
        step = self.private_element(group[1]) if last in "#13579bBdDfF" else self.public_element(group[1])
        if not self.accept("["):
            return step
        item = self.take(_ITEM)
        if item is None:
            raise self.error("expected an item number from 0, or %")
        self.expect("]", "after the item number")
        return Step(step.group, step.element, step.creator, ANY if item[0] == "%" else int(item[0][:9]))

    def public_element(self, group: str) -> Step:
        element = self.take(_ELEMENT)
        if element is None:
            raise self.error("expected an odd group before a private creator" if self.sees("{", '"') else
                             'expected four digits of the element and ")"')
        return Step(group, element[1])

    def private_element(self, group: str) -> Step:
        element = self.take(_PRIVATE)
        if element is None:
            raise self.error('expected {CREATOR}, two digits and ")"; '
                             f"a private tag is written ({group},{{CREATOR}}08)")
        return Step(group, element[2], element[1])
