"""A script made ready to run: each statement and value becomes a function once, and runs on any number of objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relay_agent.charset import Undecodable
from relay_agent.dataset import Broken
from relay_agent.deidentify.dicomedit import findings, nodes, syntax
from relay_agent.deidentify.dicomedit.arguments import full_match
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.functions import FUNCTIONS
from relay_agent.deidentify.dicomedit.run import Run, as_bool, as_text
from relay_agent.deidentify.script import Context, Failed, Finding
from relay_agent.instance import File

_Action = Callable[[Run], None]
_Value = Callable[[Run], Any]


class DicomEdit:
    """A DicomEdit 6 script; the ``Script`` protocol of :mod:`relay_agent.deidentify.script`."""

    def __init__(self, text: str, name: str, lookup: str | None = None) -> None:
        """Raises :class:`relay_agent.deidentify.script.ScriptError` for what is no script."""
        self.name = name
        self._made_of = text, name, lookup
        self._statements = syntax.parse(text)
        self._lookup = read_lookup(lookup or "")
        self._actions = [self._action(statement) for statement in self._statements]
        versions = [statement.text for statement in self._statements if isinstance(statement, nodes.Version)]
        self.language = f"DicomEdit {versions[0]}" if versions else "DicomEdit 6"

    def __reduce__(self) -> tuple[type[DicomEdit], tuple[str, str, str | None]]:
        """Pickled as its text: parsing takes a few milliseconds, and functions cannot be pickled."""
        return type(self), self._made_of

    def apply(self, file: File, context: Context) -> None:
        """Change the object. Raises ``Failed``, ``Rejected``."""
        context.rule = self.name
        try:
            run = Run(file, context, self._lookup)
            for action in self._actions:
                action(run)
            run.finish()
        except Cannot as error:
            raise Failed(str(error), context.rule) from None
        except Failed as error:  # of what others do for a function
            raise Failed(str(error), context.rule) from None
        except Undecodable:
            raise Failed("a value is no text in its character set", context.rule) from None
        except Broken as error:
            raise Failed(f"the object cannot be read: {error}", context.rule) from None

    def findings(self) -> list[Finding]:
        """What the author should know."""
        return findings.findings(self._statements, bool(self._lookup))

    def touches(self) -> set[int]:
        """The public tags that the script assigns, deletes or passes to a function that changes them."""
        return findings.touches(self._statements)

    # Statements

    def _action(self, statement: nodes.Statement) -> _Action:
        act = self._act(statement)
        rule = f"{self.name} line {statement.line}"

        def action(run: Run) -> None:
            run.context.rule = rule
            act(run)
        return action

    def _act(self, statement: nodes.Statement) -> _Action:
        match statement:
            case nodes.Assign(path=path, value=value, existing=existing):
                get = _value(value)
                if existing:
                    return lambda run: run.assign_existing(path, as_text(get(run)))
                return lambda run: run.assign(path, as_text(get(run)))
            case nodes.Set(name=name, value=value):
                get = _value(value)

                def set_variable(run: Run) -> None:
                    run.variables[name] = get(run)
                return set_variable
            case nodes.Delete(path=path):
                return lambda run: run.delete(path)
            case nodes.Do(call=call):
                get = _value(call)

                def do(run: Run) -> None:
                    get(run)
                return do
            case nodes.Echo(value=None):
                return _fails("echo needs a value")
            case nodes.Echo(value=value):
                assert value is not None
                get = _value(value)

                def echo(run: Run) -> None:
                    as_text(get(run))  # may fail as in DicomEdit; the text is a patient's, and printed nowhere
                return echo
            case nodes.RemovePrivate():
                return lambda run: run.remove_private(run.data)
            case nodes.Version(text=text) if text not in syntax.VERSIONS:
                return _fails(f"the version of the script is none of {', '.join(syntax.VERSIONS)}")
            case nodes.If(branches=branches):
                return self._branches(branches)
        return lambda run: None

    def _branches(self, branches: tuple[tuple[nodes.Condition | None, tuple[nodes.Statement, ...]], ...]) -> _Action:
        ready = [(_condition(condition), [self._action(statement) for statement in block])
                 for condition, block in branches]

        def choose(run: Run) -> None:
            rule = run.context.rule
            for condition, actions in ready:
                run.context.rule = rule
                if condition(run):
                    for action in actions:
                        action(run)
                    return
        return choose


def _fails(message: str) -> _Action:
    def fail(run: Run) -> None:
        raise Cannot(message)
    return fail


def _condition(condition: nodes.Condition | None) -> Callable[[Run], bool]:
    if condition is None:
        return lambda run: True
    if isinstance(condition, nodes.Call):
        call = _value(condition)
        return lambda run: as_bool(call(run))
    left, right = _value(condition.left), _value(condition.right)
    negated = condition.operator.startswith("!")
    if condition.operator.endswith("="):
        return lambda run: ((one := as_text(left(run))) == as_text(right(run)) and one is not None) != negated

    def matches(run: Run) -> bool:
        text, regex = as_text(left(run)), as_text(right(run))
        if text is None:
            return negated
        if regex is None:
            raise Cannot("there is no regular expression to compare with")
        return (full_match(text, regex) is not None) != negated
    return matches


def _value(value: nodes.Value) -> _Value:
    """The value in its place as a statement's or condition's: a path is read."""
    if isinstance(value, nodes.Tag):
        path = value.path
        return lambda run: run.read(path)
    return _argument(value)


def _argument(value: nodes.Value, listed: bool = False) -> _Value:
    """The value as an argument or, ``listed``, in a list: a path is the path itself."""
    match value:
        case nodes.Text(text=text, raw=raw):
            constant = raw if listed else text
            return lambda run: constant
        case nodes.Name(name=name):
            return lambda run: _variable(run, name)
        case nodes.Tag(path=path):
            return lambda run: path
        case nodes.Items(items=items):
            parts = [_argument(item, True) for item in items]
            return lambda run: [part(run) for part in parts]
        case nodes.Call(name=name, arguments=arguments):
            function = FUNCTIONS.get(name)
            if function is None:
                return _fails(f"there is no function {name}")
            called = function
            given = [_argument(argument) for argument in arguments]
            return lambda run: called(run, [argument(run) for argument in given])


def _variable(run: Run, name: str) -> Any:
    if name not in run.variables:
        raise Cannot(f"the variable {name} is not set")
    return run.variables[name]


def read_lookup(text: str) -> dict[str, str]:
    """A lookup table: lines ``type/key = value``; those with another ``=`` or without value, and comments, are none."""
    table = {}
    for line in text.splitlines():
        key, *rest = (part.strip() for part in line.split("="))
        if len(rest) == 1 and rest[0] and not key.startswith("//"):
            table[key] = rest[0]
    return table
