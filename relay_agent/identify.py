"""Find project, subject, session and auto-archive flag of a study the way the central XNAT would.

Sources: XNAT classes ExtractorFromRuleProvider (rule lines), MatchedPatternExtractor* (matching),
ChainExtractor and CompositeDicomObjectIdentifier (order), ContainedAssignmentExtractor (comments), Labels.

Site rules are Java regular expressions, rewritten here for `re`. What has no safe equivalent is refused,
because a wrong guess would send a patient's images to the wrong project. Where XNAT's versions differ, the
newer Java counts: `\\b` is ASCII (since 19), (?i) reaches \\p{Lower} (since 15). No error message holds a
DICOM value, and nothing is logged.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NoReturn

Name = Literal["Project", "Subject", "Session", "AA"]
COMMENT_TAGS = ("00104000", "00324000", "001021B0")
PROJECT_TAGS, SUBJECT_TAG, SESSION_TAG = ("00081030", "00080050"), "00100010", "00100020"
RULE_LENGTH = 64  # UTF-16 units, cut off before matching; rules with a replacement see the whole value
SECONDS = 5.0  # limit for an expression that might backtrack without end
_STEPS = 10**7  # estimated steps up to which an expression is run directly (below a second)
_EOL = r"\n\r\x85\u2028\u2029"
_END = r"(?=(?:\r\n|(?<!\r)\n|[\r\x85\u2028\u2029])?\Z)"
# \B is "not \b", since \B of `re` does not hold in an empty text
_ANCHORS = {r"\A": r"(?:\A)", "^": r"(?:\A)", r"\z": r"(?:\Z)", r"\Z": _END, "$": _END,
            r"\b": r"(?:\b)", r"\B": r"(?!\b)"}
_CHARS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "a": "\a", "e": "\x1b"}
_SETS = {"d": r"\d", "w": r"\w", "s": r"\s", "v": r"\x0b\f" + _EOL,
         "h": r" \t\xa0\u1680\u180e\u2000-\u200a\u202f\u205f\u3000",
         "Lower": "a-z", "Upper": "A-Z", "ASCII": r"\x00-\x7f", "Alpha": "a-zA-Z", "Digit": "0-9",
         "Alnum": "a-zA-Z0-9", "Punct": r"!-/:-@\[-`{-~", "Graph": "!-~", "Print": " -~", "Blank": r" \t",
         "Cntrl": r"\x00-\x1f\x7f", "XDigit": "0-9a-fA-F", "Space": r"\s"}
_HEX = "[0-9A-Fa-f]"  # a character written as two surrogates is left to the last case, which refuses it
_ESCAPE = (rf"\\(?:x(?P<x>{_HEX}{{2}})|u(?P<u>(?![dD][89a-fA-F]){_HEX}{{4}})"
           r"|[pP]\{(?P<posix>[A-Za-z]{2,})\}|(?P<char>.))")
_IN_SET = re.compile(rf"(?s){_ESCAPE}|.")
_TOKEN = re.compile(r"""(?xs)
    (?P<flags>\(\?(?P<on>[is]*)(?:-(?P<off>[is]*))?(?P<end>[:)]))
  | (?P<open>\((?:\?(?:[=!>]|<[=!]|<(?P<name>[a-zA-Z][a-zA-Z0-9]*)>)|(?!\?)))
  | (?P<close>\))
  | (?P<repeat>(?:[*+?]|\{(?P<low>[0-9]{1,9})(?P<more>,(?P<high>[0-9]{0,9}))?\})[?+]?)
  | (?P<anchor>[$^]|\\[AzZB]|\\b(?!\{))
  | (?P<reference>\\(?:(?P<number>[1-9])(?![0-9])|k<(?P<to>[a-zA-Z][a-zA-Z0-9]*)>))
  | (?P<escape>""" + _ESCAPE + r""")
  | (?P<other>.)""")
_REPLACEMENT = re.compile(r"(?s)\\(.)|\$(?:([0-9]+)|\{([a-zA-Z][a-zA-Z0-9]*)\})|([\\$])|[^\\$]+")


class RuleError(ValueError):
    """A rule line that XNAT does not accept, or that uses Java features which cannot be reproduced here."""


class RuleValueError(ValueError):
    """An accepted rule asks for what is not there (XNAT's receiver raises too) or ran into the time limit."""


def _refuse(what: str) -> NoReturn:
    raise RuleError(f"The expression {what}.")


def _unquote(found: re.Match[str]) -> str:
    """Text of \\Q...\\E with its ASCII characters but letters as codes, so that they lose their meaning."""
    if found[1] is None:
        return found[0]
    return re.sub(r"[\x00-@\[-`{-\x7f]", lambda char: f"\\x{ord(char[0]):02x}", found[1])


def _escape(found: re.Match[str]) -> tuple[str, str]:
    """A backslash sequence as ("char", character), ("set", body for [...]) or ("not", body for [^...])."""
    if code := found["x"] or found["u"]:
        return "char", chr(int(code, 16))
    char = found["char"] or ""
    if body := _SETS.get(found["posix"] or char.lower()):
        return ("not" if found[0][1].isupper() else "set"), body
    if char in _CHARS or (char and not (char.isascii() and char.isalnum())):
        return "char", _CHARS.get(char, char)
    _refuse(f"uses '{found[0]}', which has no safe equivalent here; list the wanted characters in [...]")


def _set(text: str, start: int) -> tuple[str, int]:
    """Python text of the class whose '[' stands before `start`, and the position after it."""
    body, low = "[", ""  # low: first character of a range that is being read
    if text.startswith("^", start):
        body, start = "[^", start + 1
    end = start
    while end == start or not text.startswith("]", end):
        found = _IN_SET.match(text, end)
        if not found or found[0] == "[" or text.startswith("&&", end):
            _refuse("has a '[...]' not closed or with '[' or '&&' inside; write '\\[' or list the characters")
        kind, item = _escape(found) if len(found[0]) > 1 else ("char", found[0])
        if low and (kind != "char" or item < low):
            _refuse("has a range in [...] that ends in a class or too early; write '\\-' for a plain hyphen")
        if kind == "not" and item not in (r"\d", r"\w", r"\s"):
            _refuse(f"has the negated class '{found[0]}' in [...]; list the wanted characters")
        body += re.escape(item) if kind == "char" else item if kind == "set" else item.upper()
        end = found.end()
        if not low and kind == "char" and re.compile(r"-[^\]\[]", re.DOTALL).match(text, end):
            body, low, end = body + "-", item, end + 1
        else:
            low = ""
    return body + "]", end + 1


@dataclass(slots=True)
class _Group:
    """A group being read: its start in the output, what to restore, what is known of its alternatives."""

    start: int = 0
    outer_flags: str = ""
    names: tuple[str, ...] = ()  # number and name, if it captures
    varies: bool = False  # can match in several ways
    empty: bool = True  # the current alternative, without its last entry, can match nothing
    some_empty: bool = False  # an earlier alternative can
    captures: int = 0  # 1: has capturing groups inside, 2: has repeated ones inside


class _Translation:
    """One pass over a Java expression: its Python text, and what is known of the work a match can take."""

    def __init__(self, java: str) -> None:
        """Translate; RuleError for what Java refuses and for what cannot be reproduced."""
        self.text, self.position = re.sub(r"(?s)\\Q(.*?)(?:\\E|\Z)|\\.", _unquote, java), 0
        self.out: list[str] = []  # the last entry is what a quantifier repeats
        self.groups = self.choices = 0  # capturing groups so far; choices a match has to make
        self.nested = False  # a part that can match in several ways is itself repeated
        self.flags = ""
        self.stack = [_Group()]
        self.closed: set[str] = set()  # groups, by number and name, to which a back-reference may point
        # The last entry: can be repeated, match in several ways, match nothing; `captures` as in _Group.
        self.repeatable, self.varies, self.empty, self.captures = False, False, True, 0
        while found := _TOKEN.match(self.text, self.position):
            self.position = found.end()
            if found.lastgroup == "repeat":
                self._repeat(found)
                continue
            self.stack[-1].empty &= self.empty
            self.repeatable, self.varies, self.empty, self.captures = True, False, False, 0
            if found.lastgroup in ("open", "flags"):
                self._open(found)
            elif found.lastgroup == "close":
                self._close()
            elif found[0] == "|":
                self._alternative()
            else:
                self._single(found)
        if len(self.stack) > 1:
            _refuse("opens a bracket '(' that is not closed; close it or write '\\('")

    def _repeat(self, found: re.Match[str]) -> None:
        piece, group = found[0], self.stack[-1]
        low = int(found["low"] or piece[0] == "+")
        open_end = found["more"] or piece[0] in "*+"
        high = int(found["high"] or 10**9) if open_end else max(low, piece[0] == "?")
        if not self.repeatable:
            _refuse(f"has '{piece}' with nothing before it to repeat; write '\\{piece}' for the text")
        if high > 1 and self.empty:  # a count of it could run for ever
            _refuse(f"repeats with '{piece}' a part that can match nothing; let it take a character")
        if (self.captures and piece[1:].endswith("+")) or (self.captures > 1 and high > 1):
            # Java and Python keep different texts for such groups, and Python 3.11 may even fail
            _refuse(f"repeats with '{piece}' a part with (repeated) capturing groups; write '(?:' there")
        if self.captures:
            group.captures = 2
        if low != high:
            group.varies, self.choices = True, self.choices + 1
        self.nested |= high > 1 and self.varies
        self.empty |= low == 0
        self.repeatable = False
        self.out[-1] += piece

    def _open(self, found: re.Match[str]) -> None:
        flags, self.repeatable, self.empty = self.flags, False, True
        if found.lastgroup == "flags":
            self.flags = "".join(set(flags + found["on"]) - set(found["off"] or ""))
        if found["end"] == ")":
            return  # (?i): for the rest of the group around it
        names: tuple[str, ...] = ()
        if found[0] == "(" or found["name"]:
            self.groups += 1
            names = (str(self.groups), found["name"] or "")
        self.stack.append(_Group(len(self.out), flags, names))
        head = "(?:" if found.lastgroup == "flags" else found[0]
        self.out.append(f"(?P<{found['name']}>" if found["name"] else head)

    def _close(self) -> None:
        group = self.stack.pop()
        if not self.stack:
            _refuse("closes a bracket that was not opened; write '\\)' for the character itself")
        opening, self.flags = self.out[group.start], group.outer_flags
        self.out[group.start:] = ["".join(self.out[group.start:]) + ")"]
        if group.captures and opening[1:3] in ("?=", "?!", "?>", "?<"):  # Java keeps some that failed
            _refuse(f"has a capturing group inside '{opening}'; write '(?:', or put the group around it")
        self.closed.update(group.names)
        self.empty = group.empty or group.some_empty or opening[-1] in "=!"
        self.varies, self.captures = group.varies, max(group.captures, len(group.names) > 0)
        self.stack[-1].varies |= self.varies
        self.stack[-1].captures = max(self.stack[-1].captures, self.captures)

    def _alternative(self) -> None:
        group = self.stack[-1]
        group.varies, group.some_empty, group.empty = True, group.some_empty or group.empty, True
        self.choices, self.repeatable, self.empty = self.choices + 1, False, True
        self.out.append("|")

    def _single(self, found: re.Match[str]) -> None:
        """An anchor, a back-reference, a class or a character."""
        kind, piece = found.lastgroup, found[0]
        self.empty = kind in ("anchor", "reference")
        if kind == "anchor":
            return self.out.append(_ANCHORS[piece])
        if piece == ".":
            return self.out.append("(?s:.)" if "s" in self.flags else f"[^{_EOL}]")
        if piece in ("\\", "(", "{"):
            _refuse(f"has '{piece}' not as Java knows it, or flags other than (?i), (?s); write '\\{piece}'")
        if kind == "reference":
            if (found["number"] or found["to"]) not in self.closed:
                _refuse(f"refers with '{piece}' to a group not complete there; refer to one on its left")
            piece = f"(?:{piece})" if found["number"] else f"(?P={found['to']})"
        elif piece == "[":
            piece, self.position = _set(self.text, self.position)
        else:
            shape, item = _escape(found) if kind == "escape" else ("char", piece)
            piece = re.escape(item) if shape == "char" else f"[{'^' * (shape == 'not')}{item}]"
        self.out.append(f"(?i:{piece})" if "i" in self.flags else piece)


def _scan(python: str, text: str, whole: bool) -> list[list[tuple[int, int]]]:
    regex, found, position = re.compile(python, re.ASCII), [], 0
    # not finditer: after an empty match Java moves on by one character, Python tries the same place again
    find = regex.fullmatch if whole else regex.search
    while position <= len(text) and (match := find(text, position)):
        found.append([match.span(number) for number in range(regex.groups + 1)])
        position = len(text) + 1 if whole else match.end() + (match.end() == match.start())
    return found


@dataclass(frozen=True, slots=True)
class _Regex:
    python: str
    choices: int
    nested: bool
    groups: int
    names: Mapping[str, int]

    @classmethod
    def compile(cls, java: str) -> _Regex:
        translated = _Translation(java)
        python = "".join(translated.out)
        try:
            compiled = re.compile(python, re.ASCII)
        except (re.error, RecursionError, OverflowError) as error:
            raise RuleError(f"The expression cannot be used here ({error}); simplify it.") from None
        return cls(python, translated.choices, translated.nested, compiled.groups, compiled.groupindex)

    def spans(self, text: str, whole: bool) -> list[list[tuple[int, int]]]:
        """Spans of the groups for the match of the whole text, or for each successive match (matches, find).

        The 64-character cut bounds the input, not the time: (a+)+b takes 2**63 steps on 64 letters, and `re`
        cannot be interrupted and blocks all threads. So what is not provably quick runs in a child process
        with a time limit. (Java remembers some dead ends and may answer where this gives up.)
        """
        quick = not self.nested and (len(text) + 2) ** (self.choices + (not whole)) <= _STEPS
        try:
            if quick:
                return _scan(self.python, text, whole)
            job = json.dumps([self.python, text, whole])
            command = [sys.executable, "-I", __file__]
            child = subprocess.run(command, input=job, timeout=SECONDS, check=True,  # noqa: S603 - all our own
                                   capture_output=True, text=True)
            return [[(start, end) for start, end in match] for match in json.loads(child.stdout)]
        except (OSError, ValueError, SystemError, subprocess.SubprocessError):
            # "from None", as the original error carries the input; SystemError: defects of `re` in 3.11
            raise RuleValueError("The expression was stopped or failed; simplify its repeats.") from None

    def expand(self, template: str, text: str, spans: list[tuple[int, int]]) -> str:
        """A Java replacement text (Matcher.appendReplacement): $1, ${name}, backslash as escape."""
        def part(token: re.Match[str]) -> str:
            digits, size = token[2] or "", 1
            if not (digits or token[3] or token[4]):
                return token[1] or token[0]
            while size < len(digits) and int(digits[:size + 1]) <= self.groups:
                size += 1  # Java takes a further digit only while such a group exists
            number = int(digits[:size]) if digits else self.names.get(token[3], self.groups + 1)
            if number > self.groups:
                raise RuleValueError("The replacement names a missing group or has a lone '$' or '\\' in it.")
            return text[slice(*spans[number])] + digits[size:]
        return _REPLACEMENT.sub(part, template)


@dataclass(frozen=True, slots=True)
class Rule:
    """One routing rule; `tag` is GGGGEEEE in upper case, the other fields stand as in the line."""

    tag: str
    regex: str
    group: int
    find: str | None
    replace: str | None
    _match: _Regex = field(repr=False, compare=False)
    _find: _Regex | None = field(repr=False, compare=False)

    def apply(self, value: str | None) -> str | None:
        """What the rule takes from an attribute's value; None without a match. Raises RuleValueError."""
        text = value or ""
        if self._find is None:
            units = text.encode("utf-16-le", "surrogatepass")
            text = units[:2 * RULE_LENGTH].decode("utf-16-le", "surrogatepass")
        matches = self._match.spans(text, whole=True) if text else []
        if matches and self.group > (count := self._match.groups):
            raise RuleValueError(f"The rule wants group {self.group}; its expression has only {count}.")
        if not matches or matches[0][self.group][0] < 0:
            return None
        text = text[slice(*matches[0][self.group])]
        if self._find is None:
            return text
        result, end = "", 0
        for spans in self._find.spans(text, whole=False):
            result += text[end:spans[0][0]] + self._find.expand(self.replace or "", text, spans)
            end = spans[0][1]
        return result + text[end:]


_RULE = _Regex.compile(r"\((\p{XDigit}{4}),(\p{XDigit}{4})\):(.+?)(?::(\d+))?(?: t:(.*) r:(.*))?")
# The last part is possessive: as the whole text must match, this only spares useless steps on long comments.
_ASSIGNMENT = {name: _Regex.compile(rf"(?i)(?:\A|.*[\s,;]){name}\s*:\s*([\w-]*)(?:[\s,;].*+)?")
               for name in ("Project", "Subject", "Session", "AA")}


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
                _Regex.compile(regex), None if find is None else _Regex.compile(find))


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
    from pydicom.datadict import dictionary_VR  # noqa: PLC0415 - so that the child process starts without it

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


if __name__ == "__main__":  # the child process of _Regex.spans
    json.dump(_scan(*json.load(sys.stdin)), sys.stdout)
