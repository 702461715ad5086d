"""Reading a DicomEdit script piece by piece, with the place of an error."""

from __future__ import annotations

import re

from relay_agent.deidentify.script import ScriptError

NEWLINE = re.compile(r"\r?\n")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK = re.compile(r"(?:[ \t\r;]|\\\r?\n|(?<!:)//(?:\\\r?\n|[^\n])*)*")


class Scanner:
    """A position in a script; blanks and comments are skipped before whatever is looked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def error(self, message: str, position: int | None = None) -> ScriptError:
        """The error for here, or for another position."""
        position = self.position if position is None else position
        start = self.text.rfind("\n", 0, position) + 1
        return ScriptError(message, self.text.count("\n", 0, position) + 1, position - start + 1)

    def blank(self) -> None:
        """Go past blanks and comments."""
        found = _BLANK.match(self.text, self.position)
        assert found is not None
        self.position = found.end()

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Take what matches here, None when nothing does."""
        self.blank()
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def sees(self, *texts: str) -> bool:
        """Whether one of the texts stands here."""
        self.blank()
        return self.text.startswith(texts, self.position)

    def accept(self, text: str) -> bool:
        """Take a text if it stands here."""
        if self.sees(text):
            self.position += len(text)
            return True
        return False

    def expect(self, text: str, where: str) -> None:
        """Take a text that must stand here."""
        if not self.accept(text):
            raise self.error(f'expected "{text}" {where}')

    def newlines(self) -> None:
        """Go past ends of lines."""
        while self.take(NEWLINE):
            pass

    def at_end(self) -> bool:
        """Whether nothing follows."""
        self.blank()
        return self.position >= len(self.text)

    @property
    def line(self) -> int:
        """The line, from 1."""
        return self.text.count("\n", 0, self.position) + 1

    def word(self) -> str:
        """The word that stands here, not taken."""
        self.blank()
        found = NAME.match(self.text, self.position)
        return found[0] if found else ""

    def check_quotes(self) -> None:
        """DicomEdit pairs the quotes of a line, those in comments too."""
        start = 0
        for line in re.split(r"(?<!\\)(?<!\\\r)\n", self.text):
            if line.count('"') % 2:
                raise self.error('expected a second quote (") on this line; DicomEdit has no \\" within strings, and '
                                 "counts quotes in comments too", start + line.rfind('"'))
            start += len(line) + 1
