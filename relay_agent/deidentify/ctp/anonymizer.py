"""The DicomAnonymizer of CTP: what a script says, done to one object (RSNA CTP wiki, "The CTP DICOM Anonymizer").

An element with a command gets what the command gives; of the others the script may remove private groups, all that it
does not name, overlays and curves. Like CTP this reads the object as it came and never as it is becoming. Where CTP
fails open this refuses the script, fails, or does the safe thing: ``docs/ctp.md`` lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay_agent.dataset import CHARSET, Broken, Dataset, vr_of
from relay_agent.deidentify.ctp import codes, store
from relay_agent.deidentify.ctp.command import KEEP, REMOVE, Mark, Piece, run
from relay_agent.deidentify.ctp.compiler import Compiled, Rule, compiled
from relay_agent.deidentify.ctp.element import resolve
from relay_agent.deidentify.ctp.safe import SAFE
from relay_agent.deidentify.ctp.state import Level, State
from relay_agent.deidentify.profile.table import attributes
from relay_agent.deidentify.script import Context, Failed, Finding
from relay_agent.instance import File

_KEPT = frozenset({0x00080016, 0x00080018, 0x0020000D})  # whatever is not named: SOP Class, SOP Instance, Study UID
_KEPT_GROUPS = frozenset({0x0028, 0x7FE0})
_BEHIND = 0xFFFA0000  # digital signatures and padding: after a change the first do not hold, and CTP drops both
_FREE = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})  # VRs that Specific Character Set rules
_OVERLAYS, _CURVES = 0x60, 0x50  # high bytes of their groups


class Anonymizer:
    """One anonymiser script with its lookup table."""

    language = "CTP DicomAnonymizer"

    def __init__(self, text: str, name: str, lookup: str | None = None) -> None:
        self.name = name
        self._origin = (text, name, lookup)
        self._script: Compiled = compiled(text, name, lookup)
        source = self._script.source
        self._private = "privategroups" in source.remove
        self._unspecified = "unspecifiedelements" in source.remove
        self._overlays = "overlays" in source.remove
        self._curves = "curves" in source.remove
        self._sweep = self._private or self._overlays or self._curves
        self._safe = bool(source.safe_private)
        self._groups = _KEPT_GROUPS | source.groups.keys()
        self._labels = {what: f"{name} line {line} {what}" for what, line in source.remove.items()}

    def __reduce__(self) -> tuple[type[Anonymizer], tuple[str, str, str | None]]:
        """Read again where it arrives: what is compiled cannot be pickled."""
        return Anonymizer, self._origin

    def findings(self) -> list[Finding]:
        """What the author should know, by line."""
        return sorted(self._script.findings, key=lambda finding: finding.line)

    def touches(self) -> set[int]:
        """Public tags that the script names; of those that it removes unnamed, the ones in the table of PS3.15."""
        named = {rule.key for rule in self._script.rules if isinstance(rule.key, int) and not rule.key >> 16 & 1}
        level = Level(Dataset())  # 0x5: the row of the curves is a whole group, its own tag that of a group length
        return named | {tag for tag in attributes() if self._unwanted(level, tag if tag & 0xFFFF else tag | 5, True)}

    def apply(self, file: File, context: Context) -> None:
        """Change the object. Raises :class:`Failed`, :class:`Rejected`."""
        context.rule = self.name
        data = file.dataset
        if CHARSET not in data:
            context.rule = f"{self.name} (character set)"
            data.put(CHARSET, "CS", b"ISO_IR 100")
        root = Level(data)
        state = State(file, context, root, self._script.lookup, self._rules(root), self._items)
        try:
            for rule in self._script.inserting:
                if isinstance(rule.key, int) and rule.key not in data:
                    self._insert(rule, rule.key, state)
            self._elements(state)
            if self._unwanted(root, CHARSET, CHARSET not in state.rules) and not _needs_character_set(data):
                context.rule = self._labels["unspecifiedelements"]
                data.remove(CHARSET)
        except Failed as error:
            if error.rule:
                raise
            raise Failed(str(error), context.rule) from None
        except Broken as error:
            raise Failed(str(error), context.rule) from None
        except RecursionError:
            raise Failed("the object or the script is nested too deep", context.rule) from None

    def _rules(self, level: Level) -> Mapping[int, Rule]:
        """The rules by the tags that they have here; private ones by creator may have others in each item."""
        if not self._script.by_creator:
            return self._script.fixed
        rules = {}
        for rule in self._script.by_creator:
            tag = resolve(rule.key, level, level)
            if tag is not None:
                rules[tag] = rule
        return rules | self._script.fixed

    def _insert(self, rule: Rule, tag: int, state: State) -> None:
        """An element that the script wants in any case (``@always()``)."""
        data, vr = state.level.live, vr_of(tag)
        state.tag, state.context.rule = tag, rule.label
        if tag == codes.TAG:
            codes.update(data, rule, state)
        elif vr == "SQ":
            if rule.sequence:
                store.empty(data, tag, "SQ")
        elif rule.always:
            pieces = run(rule.program, state)
            if KEEP not in pieces and REMOVE not in pieces:
                self._write(data, tag, "SH" if vr == "UN" else vr, pieces)

    def _elements(self, state: State) -> None:
        """All elements of one level, in tag order."""
        level, context = state.level, state.context
        data, rules = level.live, self._rules(level)
        for tag, element in level.before.items():
            rule = rules.get(tag)
            if tag == CHARSET and rule is None and level.up is None:
                continue  # needed to the end; see apply
            why = self._unwanted(level, tag, rule is None)
            if why:
                context.rule = self._labels.get(why) or f"{self.name} ({why})"
                data.remove(tag)
                continue
            if rule is not None and rule.program != (KEEP,):
                state.tag, context.rule = tag, rule.label
                if tag == codes.TAG:
                    codes.update(data, rule, state)
                else:
                    self._write(data, tag, element.vr, run(rule.program, state))
            if self._sweep and element.vr in ("SQ", "UN") and data.get(tag) is element:
                items = data.items_of(element)
                if items and id(items[0]) not in state.levels:
                    self._inside(items, context)

    def _write(self, data: Dataset, tag: int, vr: str, pieces: tuple[Piece, ...]) -> None:
        if REMOVE in pieces:
            data.remove(tag)
            return
        mark = next((piece for piece in pieces if isinstance(piece, Mark)), None)
        text = "".join(piece for piece in pieces if isinstance(piece, str)).strip()
        if mark is None:
            store.put(data, tag, vr, text)
        elif text or any(isinstance(piece, Mark) and piece is not mark for piece in pieces):
            raise Failed(f"{mark.text} stands alone; together with anything else CTP writes it as text")
        elif mark is not KEEP:
            if mark.blanks and store.fits(vr, " " * mark.blanks):
                store.put(data, tag, vr, " " * mark.blanks)
            else:
                store.empty(data, tag, vr)

    def _unwanted(self, level: Level, tag: int, unnamed: bool) -> str:
        """What of the script removes an element before any command of its own; empty for nothing."""
        group = tag >> 16
        kind = group >> 8
        if kind == _OVERLAYS and self._overlays:
            return "overlays"
        if kind == _CURVES and self._curves:
            return "curves"
        if tag >= _BEHIND:
            return "after pixel data"
        if not tag & 0xFFFF:
            return "group length"  # retired (PS3.5 section 7.2), and no longer right
        if not unnamed or not (self._unspecified or (group & 1 and self._private)):
            return ""
        if group in self._groups or tag in _KEPT:
            return ""
        if group & 1:
            if self._safe and self._is_safe(level, tag):
                return ""
            if self._private:
                return "privategroups"
        return "" if kind in (_OVERLAYS, _CURVES) else "unspecifiedelements"

    @staticmethod
    def _is_safe(level: Level, tag: int) -> bool:
        return not tag & 0xFF00 or (tag >> 16, level.creator(tag), tag & 0xFF) in SAFE

    def _items(self, state: State) -> None:
        """``@process()``: the commands at work on the items of a sequence."""
        level, tag, label = state.level, state.tag, state.context.rule
        element = level.before.get(tag)
        for item in level.live.items_of(element) if element is not None and element.vr == "SQ" else ():
            state.level = state.levels[id(item)] = Level(item, level)
            self._elements(state)
        state.level, state.tag, state.context.rule = level, tag, label

    def _inside(self, items: tuple[Dataset, ...], context: Context) -> None:
        """Private groups, overlays and curves in items that no command works on; CTP leaves them there."""
        for item in items:
            level = rules = None
            for element in item:
                tag = element.tag
                if tag >> 16 & 1 or tag >> 24 in (_OVERLAYS, _CURVES):
                    if level is None or rules is None:
                        level = Level(item)
                        rules = self._rules(level)
                    rule = rules.get(tag)
                    why = self._unwanted(level, tag, rule is None or rule.program != (KEEP,))
                    if why in ("privategroups", "overlays", "curves"):
                        context.rule = self._labels[why]
                        item.remove(tag)
                        continue
                if element.vr in ("SQ", "UN"):
                    self._inside(item.items_of(element), context)


def _needs_character_set(data: Dataset) -> bool:
    """Whether a text is left that nobody could read without Specific Character Set; CTP removes it all the same."""
    return any(element.vr in _FREE and (not (value := element.value).isascii() or b"\x1b" in value)
               for _, _, element in data.walk())
