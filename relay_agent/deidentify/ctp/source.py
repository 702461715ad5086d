"""The two forms of an anonymiser script, read into one: XML, and the older properties (CTP wiki, DicomAnonymizer)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers import expat

from relay_agent.deidentify.ctp import properties
from relay_agent.deidentify.script import Finding, ScriptError

REMOVABLE = ("privategroups", "unspecifiedelements", "curves", "overlays")
_ATTRIBUTES = {"p": {"t"}, "e": {"en", "t", "n"}, "k": {"en", "t", "n"}, "r": {"en", "t", "n"}}
_SET = re.compile(r"set\.\[((?:[^\[\]]|\[[^\[\]]*\])*)\](.*)", re.DOTALL)


@dataclass(slots=True)
class Line:
    """One element with its command; ``name`` is the author's own for it."""

    element: str
    name: str
    command: str
    line: int


@dataclass(slots=True)
class Source:
    """A script as it is written, all that is enabled; values of ``remove`` and ``groups`` are lines."""

    parameters: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    groups: dict[int, int] = field(default_factory=dict)
    safe_private: int = 0
    remove: dict[str, int] = field(default_factory=dict)
    disabled: int = 0
    findings: list[Finding] = field(default_factory=list)

    def parameter(self, name: str, value: str, line: int) -> None:
        """``<p t="name">value</p>`` or ``param.name=value``."""
        if not name:
            raise ScriptError("a parameter needs a name", line)
        if name in self.parameters:
            self.findings.append(Finding(f"the parameter {name} is set twice; the last value is used", line))
        self.parameters[name] = value

    def keep(self, what: str, line: int) -> None:
        """A group (hexadecimal) or ``safeprivateelements``."""
        if what.startswith("safe"):
            self.safe_private = line
        elif re.fullmatch("[0-9a-fA-F]{1,4}", what):
            self.groups[int(what, 16)] = line
        else:
            raise ScriptError("a group to keep is expected as hexadecimal digits, or safeprivateelements", line)

    def discard(self, what: str, line: int) -> None:
        """One of :data:`REMOVABLE`."""
        if what not in REMOVABLE:
            raise ScriptError(f"CTP can remove {', '.join(REMOVABLE)}; anything else it would ignore", line)
        self.remove[what] = line


def read(text: str) -> Source:
    """A script in either form. Raises :class:`ScriptError` for what CTP would pass over in silence."""
    text = text.removeprefix("\ufeff")  # CTP does nothing at all with a script that starts with this mark
    return _read_xml(text) if text.lstrip()[:1] == "<" else _read_properties(text)


class _Xml:
    """Handlers of the parser."""

    def __init__(self) -> None:
        self.source = Source()
        self.parser = expat.ParserCreate("utf-8")
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._data
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.buffer_text = True
        self.depth = 0
        self.tag = ""
        self.attributes: dict[str, str] = {}
        self.text = ""
        self.line = 0

    def _fail(self, message: str) -> ScriptError:
        return ScriptError(message, self.parser.CurrentLineNumber, self.parser.CurrentColumnNumber + 1)

    def _doctype(self, *_: object) -> None:  # no entities, so none can be expanded
        raise self._fail("a document type or entities are not allowed")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth == 1:
            if tag != "script":
                raise self._fail("the outermost element is expected to be <script>")
            return
        if self.depth > 2:
            raise self._fail(f"no element is expected inside <{self.tag}>; write text, with &lt; for <")
        if tag not in _ATTRIBUTES:
            raise self._fail("one of <p>, <e>, <k>, <r> is expected; CTP would ignore anything else")
        unknown = set(attributes) - _ATTRIBUTES[tag]
        if unknown:
            raise self._fail(f"<{tag}> has no attribute {min(unknown)}")
        if "t" not in attributes:
            raise self._fail(f"<{tag}> needs the attribute t")
        if tag != "p" and attributes.get("en") not in ("T", "F"):
            raise self._fail(f'<{tag}> needs en="T" (enabled) or en="F"; CTP takes anything but T for disabled')
        self.tag, self.attributes, self.text, self.line = tag, attributes, "", self.parser.CurrentLineNumber

    def _data(self, data: str) -> None:
        if self.depth == 2:
            self.text += data
        elif data.strip():
            raise self._fail("text is expected only inside <p> and <e>")

    def _end(self, _: str) -> None:
        self.depth -= 1
        if self.depth != 1:
            return
        what = self.attributes["t"]
        if self.tag == "p":
            self.source.parameter(what, self.text, self.line)
        elif self.attributes["en"] == "F":
            self.source.disabled += 1
        elif self.tag == "e":
            element = re.fullmatch(r"([0-9a-fA-F]{4})([0-9a-fA-F]{4}|\[.+\][0-9a-fA-F]{2}|00\[.+\])", what)
            if element is None:
                raise ScriptError("t is expected as eight hexadecimal digits, or gggg[CREATOR]ee for a private "
                                  "element; CTP would ignore this element", self.line)
            self.source.lines.append(Line(f"{element[1]},{element[2]}", self.attributes.get("n", "").strip(),
                                          self.text.strip(), self.line))
        elif self.tag == "k":
            self.source.keep(what, self.line)
        else:
            self.source.discard(what, self.line)


def _read_xml(text: str) -> Source:
    xml = _Xml()
    try:
        xml.parser.Parse(text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise ScriptError(f"the script is no well-formed XML ({expat.ErrorString(error.code)}); "
                          "CTP would do nothing at all", error.lineno, error.offset + 1) from None
    return xml.source


def _read_properties(text: str) -> Source:
    source = Source()
    source.disabled = len(re.findall(r"(?m)^[ \t]*#[ \t]*(?:set|keep|remove)\.", text))
    lines: dict[str, Line] = {}
    for key, value, line, separator in properties.entries(text):
        if separator != "=":
            raise ScriptError("key=value is expected, without blanks or colons in the key", line)
        kind, _, what = key.partition(".")
        if kind == "param":
            source.parameter(what, value, line)
        elif kind == "keep" and what.startswith(("group", "safe")):
            source.keep(what.removeprefix("group").strip(), line)
        elif kind == "remove":
            source.discard(what, line)
        elif (found := _SET.fullmatch(key)) is not None:
            if key in lines:
                source.findings.append(Finding(f"{key.partition(']')[0]}] is set twice; the last line is used", line))
            lines[key] = Line(found[1].strip(), found[2].strip(), value.strip(), line)
        else:
            raise ScriptError("param.NAME, set.[gggg,eeee]NAME, keep.groupGGGG, keep.safeprivateelements or "
                              "remove.NAME is expected; CTP would ignore this line", line)
    source.lines = list(lines.values())
    return source
