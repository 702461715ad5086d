"""What a script's author should know, found without an object: what will fail, has no effect, or differs here."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterator

from relay_agent.deidentify.dicomedit import nodes, syntax
from relay_agent.deidentify.dicomedit.arguments import full_match
from relay_agent.deidentify.dicomedit.changes import CHANGES
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.functions import FUNCTIONS
from relay_agent.deidentify.dicomedit.paths import Path, Step
from relay_agent.deidentify.profile.table import attributes
from relay_agent.deidentify.script import Finding

_ARGUMENTS = {  # at least, at most
    "substring": (3, 3), "replace": (3, 3), "lowercase": (1, 1), "uppercase": (1, 1), "normalizeString": (1, 2),
    "match": (3, 3), "ismatch": (2, 2), "format": (1, 99), "lookup": (2, 2), "reject": (0, 1), "set": (2, 2),
    "delete": (1, 1), "hashUID": (1, 99), "mapUID": (2, 2), "mapReferencedUIDs": (2, 99),
    "shiftDateByIncrement": (2, 3), "shiftDateTimeByIncrement": (2, 3), "shiftDateTimeListByIncrement": (3, 3),
    "shiftDateTimeSequenceByIncrement": (2, 99), "alterPixels": (4, 4), "valueAt": (1, 1),
}
_MAY_BE_NOTHING = {"match", "lookup", "hashUID", "normalizeString", "valueAt"}
_PATHS_ONLY = {"hashUIDList", "removeTags", "retainPrivateTags", "valueAt"}
_QUOTED_FROM = {"mapReferencedUIDs": 1, "shiftDateTimeSequenceByIncrement": 1}
_REMARKS = {
    "getURL": ("getURL is refused: it would send values of the object to another place", True),
    "retainPrivateTags": ("DicomEdit 6.6.0 turns binary values that it retains into text, and retains elements whose "
                          "last two digits are the block's number; here values stay, the others go", False),
    "scalePatientAgeAndDobFromStudyDate": ("the arguments do not count: DicomEdit always scales to 89 years", False),
    "alterPixels": ("DicomEdit paints 0 (black), whatever value the script names", False),
    "mapUID": ("new UIDs are the same for the same UID and project; DicomEdit's are random", False),
    "mapReferencedUIDs": ("new UIDs are the same for the same UID and project; DicomEdit's are random", False),
    "newUID": ("a new UID is the same when the same object comes again; DicomEdit's is random", False),
}


def findings(statements: tuple[nodes.Statement, ...], table: bool) -> list[Finding]:
    """The findings in the order of the lines; ``table`` when there is a lookup table with something in it."""
    found = [*_whole(statements), *_variables(statements)]
    for statement in nodes.walk(statements):
        found += _statement(statement)
        if not table and any(isinstance(value, nodes.Call) and value.name == "lookup"
                             for outer in nodes.values(statement) for value in nodes.inner(outer)):
            found.append(Finding("there is no lookup table, or none with valid lines: lookup finds nothing",
                                 statement.line))
    return sorted(dict.fromkeys(found), key=lambda finding: finding.line)


def _path(value: nodes.Value) -> Path | None:
    if isinstance(value, nodes.Tag):
        return value.path
    return syntax.parse_path(value.text) if isinstance(value, nodes.Text) else None


def touches(statements: tuple[nodes.Statement, ...]) -> set[int]:
    """Public tags named where they are assigned, deleted, or given to a function that changes them.

    Of those that match a wildcard, the ones in the table of PS3.15.
    """
    paths: list[Path | None] = []
    for statement in nodes.walk(statements):
        match statement:
            case nodes.Assign(path=path) | nodes.Delete(path=path):
                paths.append(path)
            case nodes.Set(value=nodes.Items() as items):  # a list is for such a function
                paths += map(_path, nodes.inner(items))
        for outer in nodes.values(statement):
            for value in nodes.inner(outer):
                if isinstance(value, nodes.Call) and value.name in CHANGES:
                    paths += [_path(part) for argument in value.arguments for part in nodes.inner(argument)]
    steps = [step for path in paths if path is not None and isinstance(step := path.steps[-1], Step)
             and step.creator is None]
    return {step.tag for step in steps if not step.open} | {
        tag for step in steps if step.open for tag in attributes() if tag & step.mask == step.bits}


def _whole(statements: tuple[nodes.Statement, ...]) -> Iterator[Finding]:
    versions = [statement for statement in statements if isinstance(statement, nodes.Version)]
    if not versions:
        yield Finding("there is no version line: XNAT takes this for a DicomEdit 4 script", 1)
    elif versions[0] is not statements[0]:
        yield Finding("the version should be the first statement", versions[0].line)
    yield from _unreachable(statements)
    for index, statement in enumerate(statements):
        if isinstance(statement, nodes.Assign) and statement.path.simple is not None and not statement.existing:
            line = _overwritten(statement.path, statements[index + 1:])
            if line:
                yield Finding(f"this has no effect: line {line} overwrites it", statement.line)


def _unreachable(block: tuple[nodes.Statement, ...]) -> Generator[Finding, None, bool]:
    """What no object comes to; returns whether the block rejects every object."""
    for index, statement in enumerate(block):
        rejects = isinstance(statement, nodes.Do) and statement.call.name == "reject" and not statement.call.arguments
        if isinstance(statement, nodes.If):
            rejects = yield from _branches(statement)
        if rejects:
            after = ": what follows is unreachable" if index + 1 < len(block) else ""
            yield Finding(f"every object that comes here is rejected{after}", statement.line)
            return True
    return False


def _branches(statement: nodes.If) -> Generator[Finding, None, bool]:
    """The same for the branches of a condition."""
    before: list[nodes.Condition] = []
    rejects = []
    for condition, block in statement.branches:
        line = block[0].line if block else statement.line
        known = True if condition is None else False if condition in before else _known(condition)
        if True in map(_known, before) or known is False:
            yield Finding("this is unreachable: its condition, or one before it, is always the same", line)
        else:
            rejects.append((yield from _unreachable(block)))
        if condition is None:
            return all(rejects)
        before.append(condition)
    return False


def _known(condition: nodes.Condition) -> bool | None:
    """What a condition is for every object, None when that depends."""
    match condition:
        case nodes.Call(name="true" | "false", arguments=()):
            return condition.name == "true"
        case nodes.Compare(left=nodes.Text(text=left), operator="=" | "!=" as operator, right=nodes.Text(text=right)):
            return (left == right) is (operator == "=")
    return None


def _overwritten(path: Path, after: tuple[nodes.Statement, ...]) -> int:
    """The line that sets the path anew, whatever the object, before anything is read; 0 when there is none."""
    for statement in after:
        constant = all(isinstance(value, nodes.Text | nodes.Name) for value in nodes.values(statement))
        if not constant or not isinstance(statement, nodes.Assign | nodes.Delete | nodes.Set):
            return 0
        if isinstance(statement, nodes.Assign | nodes.Delete) and statement.path == path and not (
                isinstance(statement, nodes.Assign) and statement.existing):
            return statement.line
    return 0


def _variables(statements: tuple[nodes.Statement, ...]) -> Iterator[Finding]:
    known = {"project", "subject", "session"}
    for statement in nodes.walk(statements):
        for outer in nodes.values(statement):
            for value in nodes.inner(outer):
                if isinstance(value, nodes.Name) and value.name not in known:
                    yield Finding(f"the variable {value.name} is not set before: this fails", statement.line, True)
        if isinstance(statement, nodes.Set):
            known.add(statement.name)


def _may_be_nothing(value: nodes.Value) -> bool:
    return isinstance(value, nodes.Tag) or (isinstance(value, nodes.Call) and value.name in _MAY_BE_NOTHING
                                             and (value.name in ("match", "lookup") or any(
                                                 isinstance(part, nodes.Tag) for part in value.arguments)))


def _statement(statement: nodes.Statement) -> Iterator[Finding]:  # noqa: PLR0912 - one case for each kind
    line = statement.line
    match statement:
        case nodes.Version(text=text) if text not in syntax.VERSIONS:
            yield Finding(f"version \"{text}\" is not supported: {', '.join(syntax.VERSIONS)} are", line, True)
        case nodes.Echo(value=value):
            yield Finding("echo needs a value" if value is None else "echo has no effect here", line, value is None)
        case nodes.Assign(path=path, existing=False) if not path.single:
            yield Finding("this path can mean several attributes, or an item: := fails, ?= and - do not", line, True)
        case nodes.Assign(value=value, existing=existing) if _may_be_nothing(value):
            effect = "is blanked" if existing else "stays as it is"
            yield Finding(f"where the right side finds nothing, the attribute {effect}", line)
        case nodes.If(branches=branches):
            for condition, _ in branches:
                if isinstance(condition, nodes.Compare) and condition.operator.endswith("~"):
                    yield from _regex(condition.right, line)
    for path in [statement.path] if isinstance(statement, nodes.Assign | nodes.Delete) else []:
        yield from _wildcards(path, line)
    for outer in nodes.values(statement):
        if isinstance(outer, nodes.Tag) and not outer.path.single:
            yield Finding("a path that can mean several attributes cannot be read: this fails", line, True)
        for value in nodes.inner(outer):
            if isinstance(value, nodes.Text) and not value.text.isascii():
                yield Finding("this text is not ASCII: XNAT reads it in the character set of its machine", line)
            elif isinstance(value, nodes.Call):
                yield from _call(value, line)


def _wildcards(path: Path, line: int) -> Iterator[Finding]:
    try:
        path.check()
    except Cannot as error:
        yield Finding(str(error), line, True)


def _regex(value: nodes.Value, line: int) -> Iterator[Finding]:
    if isinstance(value, nodes.Text):
        try:
            full_match("", value.text)
        except Cannot as error:
            yield Finding(str(error), line, True)


def _call(call: nodes.Call, line: int) -> Iterator[Finding]:
    if call.name not in FUNCTIONS:
        close = {name.lower(): name for name in FUNCTIONS}.get(call.name.lower()) or next(
            iter(difflib.get_close_matches(call.name, FUNCTIONS, 1)), "")
        yield Finding(f"there is no function {call.name}" + (f"; {close} is meant?" if close else ""), line, True)
        return
    low, high = _ARGUMENTS.get(call.name, (0, 1 << 30))
    if not low <= len(call.arguments) <= high:
        yield Finding(f"{call.name} does not take {len(call.arguments)} argument(s): this fails", line, True)
    elif call.name in ("match", "ismatch"):
        yield from _regex(call.arguments[1], line)
    if call.name in _REMARKS:
        yield Finding(_REMARKS[call.name][0], line, _REMARKS[call.name][1])
    first = 0 if call.name in _PATHS_ONLY else _QUOTED_FROM.get(call.name)
    for argument in call.arguments[first:] if first is not None else ():
        for value in nodes.inner(argument):
            if (isinstance(value, nodes.Text) and syntax.parse_path(value.text) is None) or (
                    call.name in _QUOTED_FROM and isinstance(value, nodes.Tag)):
                yield Finding(f"{call.name} takes paths"
                              + (" in double quotes" if call.name in _QUOTED_FROM else "") + ": this fails", line, True)
    if call.name == "isPresent" and any(not isinstance(value, nodes.Tag | nodes.Name | nodes.Items)
                                        for value in call.arguments):
        yield Finding("isPresent takes tags without double quotes: this fails", line, True)
