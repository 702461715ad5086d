"""One script on one object: what statements and functions read and change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relay_agent.dataset import PIXELS, Dataset, encoding_of, vr_of
from relay_agent.deidentify.dicomedit import paths, values
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.paths import Path, Step
from relay_agent.deidentify.script import Context
from relay_agent.instance import File

EXPLICIT_LE = "1.2.840.10008.1.2.1"
_TRANSFER_SYNTAX = 0x00020010
_NATIVE = frozenset({"1.2.840.10008.1.2", EXPLICIT_LE, "1.2.840.10008.1.2.1.99"})


class _Void:
    """What a function gives back that only acts."""

    def __repr__(self) -> str:
        return "VOID"


VOID = _Void()


def as_text(value: Any) -> str | None:
    """A value as Java writes it; None is null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(text if (text := as_text(item)) is not None else "null" for item in value) + "]"
    if value is VOID:
        raise Cannot("a function that gives nothing back stands where a value is needed")
    return str(value)


def as_bool(value: Any) -> bool:
    """A value as a condition: true is true and the text "true". Raises :class:`Cannot` for null."""
    if value is VOID:
        return False
    text = as_text(value)
    if text is None:
        raise Cannot("a condition is neither true nor false: an attribute is absent, or nothing was found")
    return text.lower() == "true"


@dataclass
class Run:
    """The object, the context, and the variables as they are now.

    Group 0002 is the File Meta as it was read: a script sees and changes it, but only Transfer Syntax UID has an
    effect, since File Meta is written anew.
    """

    file: File
    context: Context
    lookup: Mapping[str, str]
    variables: dict[str, Any] = field(default_factory=dict)
    seed: str = field(init=False)  # the object's SOP Instance UID as it came, for new UIDs

    def __post_init__(self) -> None:  # noqa: D105 - the class says it
        self.seed = self.file.dataset.text(0x00080018) or ""
        self._syntax = self.file.meta.text(_TRANSFER_SYNTAX)
        for name in ("project", "subject", "session"):
            value = getattr(self.context, name)
            if value is not None:
                self.variables[name] = value

    @property
    def data(self) -> Dataset:
        """The data set."""
        return self.file.dataset

    def root(self, path: Path) -> Dataset:
        """The data set that a path to one element begins in."""
        step = path.steps[0]
        return self.file.meta if isinstance(step, Step) and step.bits >> 16 == 2 else self.data

    def roots(self, path: Path) -> tuple[Dataset, ...]:
        """The data sets that a path may match in."""
        step = path.steps[0]
        if isinstance(step, Step) and not step.open:
            return (self.root(path),)
        return self.file.meta, self.data

    def read(self, path: Path) -> str | None:
        """The value of a path to one attribute as text, None when it is absent."""
        if path.simple is not None:
            return self.read_tag(path.simple)
        found = paths.locate(self.root(path), path)
        return None if found is None else values.read(*found)

    def read_tag(self, tag: int) -> str | None:
        """The same of a public attribute of the outermost level."""
        data = self.file.meta if tag >> 16 == 2 else self.data
        element = data.get(tag)
        return None if element is None else values.read(data, element)

    def present(self, path: Path) -> bool:
        """isPresent; an unknown private creator counts as having the first block, as in DicomEdit."""
        if paths.locate(self.root(path), path) is not None:
            return True
        last = path.steps[-1]
        if isinstance(last, Step) and last.creator is not None and len(path.steps) == 1:
            return last.block(self.data) is None and last.tag in self.data
        return False

    def unresolved_vr(self, path: Path) -> str:
        """The VR as DicomEdit looks it up: of a private tag, always in the first block (0x10)."""
        if not path.single:
            raise Cannot(f"the path {path} can mean several attributes, or an item")
        where = [(step.tag, step.item) for step in path.steps if isinstance(step, Step)]
        found = paths.locate(self.root(path), Path.direct(where))
        return vr_of(where[-1][0]) if found is None else found[1].vr

    def assign(self, path: Path, text: str | None) -> None:
        """``path := value``; null changes nothing."""
        if not path.singular:
            raise Cannot(f"the path {path} can mean several attributes, and := assigns one only")
        if text is None:
            return
        if path.simple is not None:
            values.write(self.root(path), path.simple, text)
        else:
            values.write(*paths.make(self.root(path), path), text)

    def assign_existing(self, path: Path, text: str | None) -> None:
        """``path ?= value``; null blanks."""
        for root in self.roots(path):
            for data, element in list(path.leaves(root)):
                if element.vr != "SQ":
                    values.write(data, element.tag, text or "")

    def delete(self, path: Path) -> None:
        """``- path``."""
        for root in self.roots(path):
            paths.delete(root, path)

    def remove_private(self, data: Dataset) -> None:
        """``removeAllPrivateTags``: of all levels."""
        for element in data:
            if element.tag >> 16 & 1:
                data.remove(element.tag)
            else:
                for item in data.items(element.tag):
                    self.remove_private(item)

    def finish(self) -> None:
        """Encode in the transfer syntax that the script has set; deleting it means Explicit VR Little Endian."""
        wanted = self.file.meta.text(_TRANSFER_SYNTAX)
        if wanted == self._syntax:
            return
        wanted = wanted or EXPLICIT_LE
        pixels = self.data.get(PIXELS)
        if wanted not in _NATIVE or not encoding_of(self.file.transfer_syntax).little or (
                pixels is not None and pixels.fragments):
            raise Cannot("the script sets a Transfer Syntax UID (0002,0010) that the object cannot be encoded in")
        self.file.transfer_syntax = wanted
