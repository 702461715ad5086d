"""Find project, subject, session and auto-archive flag of a study the way the central XNAT would.

Sources: XNAT classes ExtractorFromRuleProvider (rule lines), MatchedPatternExtractor* (matching),
ChainExtractor and CompositeDicomObjectIdentifier (order), ContainedAssignmentExtractor (comments), Labels.

The expressions in a site's rules are Java's; :mod:`relay_agent.java_regex` runs them. No error message holds a
DICOM value, and nothing is logged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from pydicom.datadict import dictionary_VR

from relay_agent.java_regex import Regex, RuleError, RuleValueError

Name = Literal["Project", "Subject", "Session", "AA", "Accession"]  # the last is ours, not XNAT's
COMMENT_TAGS = ("00104000", "00324000", "001021B0")
PROJECT_TAGS, SUBJECT_TAG, SESSION_TAG = ("00081030", "00080050"), "00100010", "00100020"
RULE_LENGTH = 64  # UTF-16 units, cut off before matching; rules with a replacement see the whole value


@dataclass(frozen=True, slots=True)
class Rule:
    """One routing rule; `tag` is GGGGEEEE in upper case, the other fields stand as in the line."""

    tag: str
    regex: str
    group: int
    find: str | None
    replace: str | None
    _match: Regex = field(repr=False, compare=False)
    _find: Regex | None = field(repr=False, compare=False)

    def apply(self, value: str | None) -> str | None:
        """What the rule takes from an attribute's value; None without a match. Raises RuleValueError."""
        text = value or ""
        if self._find is None:
            units = text.encode("utf-16-le", "surrogatepass")
            text = units[:2 * RULE_LENGTH].decode("utf-16-le", "surrogatepass")
        groups = self._match.match(text) if text else None
        if groups is None:
            return None
        if self.group >= len(groups):
            raise RuleValueError(f"The rule wants group {self.group}; its expression has only {len(groups) - 1}.")
        found = groups[self.group]
        if found is None or self._find is None:
            return found
        return self._find.replace_all(found, self.replace or "")


_RULE = Regex.compile(r"\((\p{XDigit}{4}),(\p{XDigit}{4})\):(.+?)(?::(\d+))?(?: t:(.*) r:(.*))?")
# The last part is possessive: as the whole text must match, this only spares useless steps on long comments.
_ASSIGNMENT = {name: Regex.compile(rf"(?i)(?:\A|.*[\s,;]){name}\s*:\s*([\w-]*)(?:[\s,;].*+)?")
               for name in ("Project", "Subject", "Session", "AA", "Accession")}


def parse_rule(line: str) -> Rule:
    """The rule in a line `(gggg,eeee):regex[:group][ t:find r:replace]` (ExtractorFromRuleProvider).

    RuleError if XNAT would refuse the line or the expression cannot be reproduced here. A group that the
    expression does not have is accepted, as by XNAT, and raises RuleValueError when the rule matches.
    """
    line = line.strip("".join(map(chr, range(33))))  # Java String.trim
    match = re.fullmatch(_RULE.python, line, re.ASCII)
    if not match:
        raise RuleError("The line is not a routing rule; write '(gggg,eeee):expression:group'.")
    group, element, regex, index, find, replace = match.groups()
    if int(group, 16) >= 0x8000:
        raise RuleError(f"XNAT cannot read tag group {group}; use a tag below (8000,0000).")
    if len((index or "").lstrip("0")) > 10 or int((index or "1")[-10:]) >= 2**31:
        raise RuleError("The group number after the last ':' is too large; count the brackets before it.")
    return Rule((group + element).upper(), regex, int((index or "1")[-10:]), find, replace,
                Regex.compile(regex), None if find is None else Regex.compile(find))


@dataclass(frozen=True, slots=True)
class Rules:
    """A site's routing rules, each list in the order in which they are tried."""

    project: tuple[Rule, ...] = ()
    subject: tuple[Rule, ...] = ()
    session: tuple[Rule, ...] = ()
    auto_archive: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, project: Iterable[str] = (), subject: Iterable[str] = (), session: Iterable[str] = (),
              auto_archive: Iterable[str] = ()) -> Rules:
        """Rules from lines; empty ones are left out. RuleError names the list and the line (from 1)."""
        lists: list[tuple[Rule, ...]] = []
        for name, lines in zip(cls.__slots__, (project, subject, session, auto_archive), strict=True):
            parsed: list[Rule] = []
            for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, 1):
                try:
                    parsed += [parse_rule(line)] if line.strip() else []
                except RuleError as error:
                    raise RuleError(f"{name} rules, line {number}: {error}") from None
            lists.append(tuple(parsed))
        return cls(*lists)


@dataclass(frozen=True, slots=True)
class Identity:
    """What was found. `sources` names for each found field the step that gave it: tags only, never values."""

    project: str | None
    subject: str | None
    session: str | None
    auto_archive: bool | None
    sources: dict[str, str] = field(default_factory=dict)


def extract(identifier: Name, text: str) -> str | None:
    """Value of `identifier:value` in a comment, maybe empty; None without (ContainedAssignmentExtractor)."""
    match = re.fullmatch(_ASSIGNMENT[identifier].python, text, re.ASCII)
    return match[1] if match else None


def auto_archive(value: str | None) -> bool | None:
    """XNAT's reading of an AA value: t, true, f, false in any case (CompositeDicomObjectIdentifier)."""
    word = value.lower() if value and value.isascii() else ""
    return {"t": True, "true": True, "f": False, "false": False}.get(word)


def label(text: str) -> str:
    """The text as a label: all characters but ASCII letters, digits, '_' and '-' become '_' (Labels)."""
    return re.sub(r"[^\w-]", "_", text, flags=re.ASCII)


def needed_tags(rules: Rules) -> frozenset[str]:
    """Tags (GGGGEEEE) whose values `identify` needs with these rules."""
    used = {rule.tag for rule in (*rules.project, *rules.subject, *rules.session, *rules.auto_archive)}
    return frozenset(used | {*COMMENT_TAGS, *PROJECT_TAGS, SUBJECT_TAG, SESSION_TAG})


@cache
def _vr(tag: str) -> str:
    try:
        return str(dictionary_VR(int(tag, 16)))
    except KeyError:
        return ""


def _value(values: Mapping[str, str], tag: str) -> str:
    """The value as dcm4che2's getString gives it (its classes VR, StringUtils).

    Text (LT, ST, UT: the comments) is never split at backslashes and loses only the padding at its end. Of
    anything else the first value counts, trimmed; person names also lose '^' at their end (dcm4che3, in later
    XNATs, may keep it). Tags outside the dictionary, private ones above all, count as short strings.
    """
    value, vr = values.get(tag, ""), _vr(tag)
    if vr in ("LT", "ST", "UT"):
        return value.lstrip("\0").rstrip("\0 ")
    return value.split("\\")[0].lstrip(" ").rstrip("^ " if vr == "PN" else "\0 ")


def _steps(values: Mapping[str, str], rules: tuple[Rule, ...], name: Name,
           whole: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """XNAT's steps in its order, each run only when reached; empty results do not count (ChainExtractor)."""
    def shown(tag: str) -> str:
        return f"({tag[:4]},{tag[4:]})"
    for rule in rules:
        if found := rule.apply(_value(values, rule.tag)):
            yield found, f"rule {shown(rule.tag)}"
    for tag in COMMENT_TAGS:
        if found := extract(name, _value(values, tag)):
            yield found, shown(tag)
    for tag in whole:
        if found := _value(values, tag):
            yield found, f"fallback {shown(tag)}"


def project_candidates(values: Mapping[str, str], rules: Rules) -> list[tuple[str, str]]:
    """(candidate, source) in XNAT's order (Xnat15DicomProjectIdentifier). Raises RuleValueError."""
    return list(_steps(values, rules.project, "Project", PROJECT_TAGS))


def identify(values: Mapping[str, str], rules: Rules = Rules(),
             known_project: Callable[[str], str | None] | None = None) -> Identity:
    """Identity of a study from decoded values by tag ('GGGGEEEE', upper case); each field's first hit wins.

    `known_project` turns a project id or alias into the id, None if unknown or not permitted. Raises
    RuleValueError where XNAT's receiver fails too: the caller holds the study; no later step may guess.
    """
    sources: dict[str, str] = {}
    project = None
    for candidate, source in _steps(values, rules.project, "Project", PROJECT_TAGS):
        if known_project:
            project = known_project(candidate)
        elif not source.startswith("fallback") and label(candidate) == candidate:
            # without the server's list a whole StudyDescription such as "Brain" must not become a project
            project = candidate
        if project is not None:
            sources["project"] = source
            break

    def first(name: str, steps: Iterator[tuple[str, str]]) -> str | None:
        found, source = next(steps, (None, ""))
        if found is not None:
            sources[name] = source
        return found

    subject = first("subject", _steps(values, rules.subject, "Subject", (SUBJECT_TAG,)))
    session = first("session", _steps(values, rules.session, "Session", (SESSION_TAG,)))
    archive = auto_archive(first("auto_archive", _steps(values, rules.auto_archive, "AA", ())))
    return Identity(project, subject and label(subject), session and label(session), archive, sources)
