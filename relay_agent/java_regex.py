"""Java regular expressions, as XNAT's rules are written in them, run by `re`: what Java would find, or a refusal.

What has no safe equivalent is refused, because a wrong guess would send a patient's images to the wrong project.
Where XNAT's versions differ, the newer Java counts: `\\b` is ASCII (since 19), (?i) reaches \\p{Lower} (since 15).
No error message holds a text that was matched, and nothing is logged.

:meth:`Regex.compile`, :meth:`Regex.match` and :meth:`Regex.replace_all` are all that others need. An expression that
might backtrack without end runs in a child process with a time limit: this file, started as a script.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

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
class Regex:
    """A Java expression, ready to be used; `python` is what `re` is given (with re.ASCII)."""

    python: str
    groups: int
    names: Mapping[str, int]
    choices: int  # that a match has to make, as _Translation counts them
    nested: bool

    @classmethod
    def compile(cls, java: str) -> Regex:
        """Translate; RuleError for what Java refuses and for what cannot be reproduced."""
        translated = _Translation(java)
        python = "".join(translated.out)
        try:
            compiled = re.compile(python, re.ASCII)
        except (re.error, RecursionError, OverflowError) as error:
            raise RuleError(f"The expression cannot be used here ({error}); simplify it.") from None
        return cls(python, compiled.groups, compiled.groupindex, translated.choices, translated.nested)

    def match(self, text: str) -> list[str | None] | None:
        """The groups (0: all) of a match of the whole text, None without one (Matcher.matches)."""
        found = self._spans(text, whole=True)
        return [text[start:end] if start >= 0 else None for start, end in found[0]] if found else None

    def replace_all(self, text: str, replacement: str) -> str:
        """The text with every match replaced (String.replaceAll)."""
        result, end = "", 0
        for spans in self._spans(text, whole=False):
            result += text[end:spans[0][0]] + self._expand(replacement, text, spans)
            end = spans[0][1]
        return result + text[end:]

    def _spans(self, text: str, whole: bool) -> list[list[tuple[int, int]]]:
        """Spans of the groups for the match of the whole text, or for each successive match (matches, find).

        The length that XNAT looks at bounds the input, not the time: (a+)+b takes 2**63 steps on 64 letters, and `re`
        cannot be interrupted and blocks all threads. So what is not provably quick runs in a child process
        with a time limit. (Java remembers some dead ends and may answer where this gives up.)
        """
        quick = not self.nested and (len(text) + 2) ** (self.choices + (not whole)) <= _STEPS
        try:
            if quick:
                return _scan(self.python, text, whole)
            job = json.dumps([self.python, text, whole])
            command = [sys.executable, "-I", __file__]
            child = subprocess.run(command, input=job, timeout=SECONDS, check=True,
                                   capture_output=True, text=True)
            return [[(start, end) for start, end in match] for match in json.loads(child.stdout)]
        except (OSError, ValueError, SystemError, subprocess.SubprocessError):
            # "from None", as the original error carries the input; SystemError: defects of `re` in 3.11
            raise RuleValueError("The expression was stopped or failed; simplify its repeats.") from None

    def _expand(self, template: str, text: str, spans: list[tuple[int, int]]) -> str:
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


if __name__ == "__main__":  # the child process of Regex
    json.dump(_scan(*json.load(sys.stdin)), sys.stdout)
