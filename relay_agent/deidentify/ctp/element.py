"""How commands name elements: dcm4che's name, tag, private creator, ``this``, ``root:``, ``A::B`` (first item)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from relay_agent.deidentify.ctp import names
from relay_agent.deidentify.ctp.state import Level, State, meta_text

_HEX = re.compile(r"(?:([0-9a-fA-F]{1,8})|([0-9a-fA-F]{1,4}),([0-9a-fA-F]{1,4}))")
_PRIVATE = re.compile(r"([0-9a-fA-F]{1,4}),?(?:00\[(.+)\]|\[(.+)\]([0-9a-fA-F]{2}))")

Private = tuple[int, str, int]  # group, creator in upper case, low byte; -1 for the creator's own element
Key = int | Private


class Unknown(ValueError):
    """No element is named so; the message says what to write."""


def key(text: str, local: Mapping[str, Key]) -> Key:
    """The element that a text names; ``local`` holds the script's own names for private ones. Raises Unknown."""
    name = text.strip()
    if (name[:1], name[-1:]) in (("[", "]"), ("(", ")")):
        name = name[1:-1].strip()
    tag = names.tag_of(name)
    if tag is not None:
        return tag
    found = _HEX.fullmatch(name)
    if found is not None:
        tag = int(found[1], 16) if found[1] else int(found[2], 16) << 16 | int(found[3], 16)
        if tag < 0x00020000:
            raise Unknown(f"{name} is no tag of a data set; a tag is eight hexadecimal digits, without a comma")
        return tag
    if name in local:
        return local[name]
    found = _PRIVATE.fullmatch(name)
    if found is not None and int(found[1], 16) & 1:
        number = int(found[4], 16) if found[4] else -1
        return int(found[1], 16), (found[2] or found[3]).strip().upper(), number
    raise Unknown(names.hint(name) if re.fullmatch(r"[A-Za-z]\w*", name) else
                  "an element is expected: a name, eight hexadecimal digits, or gggg[CREATOR]ee")


@dataclass(frozen=True, slots=True)
class Reference:
    """An element as seen from where a command runs."""

    root: bool
    path: tuple[Key, ...]  # empty for the element that the command is for

    @classmethod
    def parse(cls, text: str, local: Mapping[str, Key]) -> Reference:
        """Raises :class:`Unknown`."""
        text = text.strip()
        if text == "this":
            return cls(False, ())
        root = text.startswith("root:") and not text.startswith("root::")
        parts = text.removeprefix("root:").split("::") if root else text.split("::")
        return cls(root, tuple(key(part, local) for part in parts))

    def text(self, state: State) -> str | None:
        """The value; None for an absent element or a sequence. Raises :class:`Failed`."""
        level, tag = self._find(state)
        if level is None:
            return None
        if tag < 0x00080000:
            return meta_text(state.file.meta, tag)
        return level.text(tag)

    def exists(self, state: State) -> bool:
        """Whether the element is there."""
        level, tag = self._find(state)
        if level is not None and tag < 0x00080000:
            return meta_text(state.file.meta, tag) is not None
        return level is not None and tag in level.before

    def _find(self, state: State) -> tuple[Level | None, int]:
        level = state.root if self.root else state.level
        if not self.path:
            return level, state.tag
        for step in self.path[:-1]:
            tag = resolve(step, level, state.root)
            inner = state.first_item(level, tag) if tag is not None else None
            if inner is None:
                return None, 0
            level = inner
        last = resolve(self.path[-1], level, state.root)
        return (level, last) if last is not None else (None, 0)


def resolve(step: Key, level: Level, root: Level) -> int | None:
    """The tag that a key stands for here: a private creator's block is looked for at this level, then in the root."""
    if isinstance(step, int):
        return step
    tag = level.private(*step)
    return tag if tag is not None or level is root else root.private(*step)
