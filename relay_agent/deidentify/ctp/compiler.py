"""An anonymiser script made ready: its commands compiled, everything that CTP would pass over in silence found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from relay_agent.dataset import CHARSET, PIXELS, show, vr_of
from relay_agent.deidentify.ctp import properties, source, store
from relay_agent.deidentify.ctp.command import KEEP, NOTHING, Mark, Program, Scope, Wrong, parse
from relay_agent.deidentify.ctp.element import Key, Unknown, key
from relay_agent.deidentify.ctp.functions import build
from relay_agent.deidentify.ctp.source import Line, Source
from relay_agent.deidentify.script import Finding, ScriptError

_CODES = 0x00120064
_FOR_SEQUENCES = re.compile(r"@\s*(?:process|remove|keep|empty|blank|if|select|require|lookup)\s*\(")
_BARE = re.compile(r"\b(?:keep|remove|empty|blank|process|hash\w*|incrementdate|lookup|param|contents)\(")


@dataclass(frozen=True, slots=True)
class Rule:
    """One element of the script: ``label`` names it in messages, ``always`` creates it where it is absent."""

    key: Key
    program: Program
    label: str
    line: int
    always: bool
    sequence: bool  # @always()@require(): an absent sequence is created, empty


@dataclass(slots=True)
class Compiled:
    """A script, ready to run."""

    source: Source
    rules: list[Rule]
    lookup: Mapping[str, str] | None
    findings: list[Finding]
    fixed: dict[int, Rule] = field(default_factory=dict)  # those whose tag is in the script
    by_creator: list[Rule] = field(default_factory=list)  # private ones, by creator
    inserting: list[Rule] = field(default_factory=list)


def compiled(text: str, name: str, lookup: str | None) -> Compiled:
    """A script with its lookup table. Raises :class:`ScriptError`."""
    read = source.read(text)
    table = None
    if lookup is not None:
        try:
            table = {entry.key: entry.value for entry in properties.entries(lookup.removeprefix("\ufeff"))}
        except ScriptError as error:
            raise ScriptError(f"lookup table, {error}") from None
    lines, local = _keys(read)
    script = Compiled(read, [], table, list(read.findings))
    for element, line in lines.items():
        rule = _rule(element, line, name, Scope(read.parameters, local), script.findings)
        script.rules.append(rule)
        if isinstance(element, int):
            script.fixed[element] = rule
            if rule.always or rule.sequence or element == _CODES:
                script.inserting.append(rule)
        else:
            script.by_creator.append(rule)
    script.inserting.sort(key=lambda rule: str(rule.key) if not isinstance(rule.key, int) else f"{rule.key:08X}")
    script.findings += _about(script)
    return script


def _keys(read: Source) -> tuple[dict[Key, Line], dict[str, Key]]:
    """The elements of the script, and its own names for private ones."""
    lines: dict[Key, Line] = {}
    local: dict[str, Key] = {}
    for line in read.lines:
        try:
            element = key(line.element, {})
        except Unknown as error:
            raise ScriptError(f"{error}; CTP would ignore this element", line.line) from None
        if element in lines:
            if lines[element].name != line.name:
                raise ScriptError(f"{_show(element)} has a command in line {lines[element].line} already, under "
                                  "another name; which of them CTP obeys is chance", line.line)
            read.findings.append(Finding(f"{_show(element)} has a command in line {lines[element].line} already; this "
                                         "one is obeyed", line.line))
        lines[element] = line
        group = element >> 16 if isinstance(element, int) else element[0]
        if group & 1 and line.name:
            local[line.name] = element
    return lines, local


def _show(element: Key) -> str:
    if isinstance(element, int):
        return show(element)
    group, creator, number = element
    return f"({group:04x},[{creator}]{f'{number:02x}' if number >= 0 else ''})"


def _rule(element: Key, line: Line, name: str, scope: Scope, findings: list[Finding]) -> Rule:
    where = _show(element)
    try:
        program = parse(line.command, scope, build)
    except Wrong as error:
        raise ScriptError(f"{where}: {error}", line.line) from None
    except RecursionError:
        raise ScriptError(f"{where}: the command is nested too deep", line.line) from None
    always = line.command.startswith("@always()")
    if element == PIXELS and program != (KEEP,):
        raise ScriptError(f"{where}: CTP never changes pixel data, whatever the command; remove it", line.line)
    if isinstance(element, int) and element < 0x00080000 and element >> 16 == 2:
        findings.append(Finding(f"{where}: File Meta Information is written anew; this does nothing", line.line))
        always = False
    findings += (Finding(f"{where}: {note}", line.line) for note in scope.notes)
    findings += _notes(element, where, line, program, always)
    return Rule(element, program, f"{name} line {line.line} {where}", line.line, always,
                re.match(r"@always\(\)\s*@require\(\)", line.command) is not None)


def _notes(element: Key, where: str, line: Line, program: Program, always: bool) -> list[Finding]:
    """What is legal in a command and hardly meant."""
    found = []
    texts = [part for part in program if isinstance(part, str)]
    if any(_BARE.search(text) for text in texts):
        found.append(Finding(f"{where}: a function without @ is written as text", line.line))
    if NOTHING in program and not always:
        found.append(Finding(f"{where}: @always() works only at the beginning of a command", line.line))
    if isinstance(element, int) and not element >> 16 & 1 and element != _CODES:
        vr = vr_of(element)
        text = "".join(texts).strip()
        fixed = all(isinstance(part, str | Mark) or part is NOTHING for part in program)
        if fixed and text and not any(isinstance(part, Mark) for part in program) and not store.fits(vr, text):
            found.append(Finding(f"{where}: its VR {vr} cannot hold this text. CTP leaves the original value; here "
                                 "every object that has the element is quarantined", line.line, True))
        if vr == "SQ" and not _FOR_SEQUENCES.search(line.command):
            found.append(Finding(f"{where}: a sequence holds no text. CTP leaves it as it is; here every object that "
                                 "has it is quarantined. Write @process(), @remove() or @empty()", line.line, True))
    if element == CHARSET and program != (KEEP,):
        found.append(Finding(f"{where}: without it, or with another value, nobody can read the texts that stay",
                             line.line))
    return found


def _about(script: Compiled) -> list[Finding]:
    """What there is to know of a script as a whole, with what CTP does otherwise."""
    read, found = script.source, []
    if read.disabled:
        found.append(Finding(f"{read.disabled} elements of the script are disabled"))
    if not script.rules and not read.remove:
        found.append(Finding("the script changes nothing"))
    line = read.remove.get("privategroups", 0)
    if line:
        found.append(Finding("CTP leaves private elements in the items of sequences, unless a @process() reaches them; "
                             "here they are removed there too", line))
    elif "unspecifiedelements" not in read.remove:
        found.append(Finding("private groups are not removed; they often hold identifying values"))
    if "unspecifiedelements" not in read.remove and not any("process" in entry.command for entry in read.lines):
        found.append(Finding("no command has @process(): elements in the items of sequences stay as they are"))
    if "curves" in read.remove:
        found.append(Finding("CTP removes curves only together with unspecifiedelements; here they are removed always",
                             read.remove["curves"]))
    for kind, groups in (("overlays", 0x60), ("curves", 0x50)):
        if kind in read.remove:
            found += (Finding(f"{show(tag)}: has no effect, {kind} are removed", rule.line)
                      for tag, rule in script.fixed.items() if tag >> 24 == groups)
    if read.safe_private:
        text = ("only private elements that PS3.15 and CTP both hold for safe are kept, which is fewer than CTP keeps"
                if read.remove else "keeping safe private elements does nothing unless private groups are removed")
        found.append(Finding(text, read.safe_private))
    if script.lookup is None and any("lookup" in entry.command or "dateinterval" in entry.command
                                     for entry in read.lines):
        found.append(Finding("the script uses a lookup table, and none is given", 0, True))
    return found
