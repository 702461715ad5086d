"""The recipe of a shipment: everything that decides what its de-identified instances will be, bit for bit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from relay_agent import __version__
from relay_agent.config import Config, Route
from relay_agent.deidentify import ctp, dicomedit, profile
from relay_agent.deidentify.script import Script, ScriptError

_PROFILE = re.compile(r"(?i)\s*ps3\.15\b")
_PROPERTIES = re.compile(r"(?m)^\s*#?\s*(set|param|keep|remove)\.")
_FILTER = re.compile(r"\.\s*(equals|matches|contains|startsWith|endsWith|isLessThan|isGreaterThan)\w*\s*\("
                     r"|(?m:^[ \t!(]*(true|false)\b)")
_PIXELS = re.compile(r"\}\s*\(\s*\d+\s*,")


class Unusable(Exception):
    """A script or its table cannot be used; the message says which, where and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """One script with its lookup table, as text: what has been read once is what runs."""

    name: str
    text: str
    lookup: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to each instance of a shipment, in order: scripts, labels into the headers, search for residues."""

    steps: tuple[Step, ...]
    headers: tuple[tuple[int, str], ...]  # tag and text, set after the scripts
    project: str | None  # None: the variable is not set, and a script that reads it fails
    subject: str | None
    session: str | None
    search: tuple[int, ...]  # tags whose original values must not be left anywhere, beside the usual ones
    keep: tuple[int, ...]  # tags whose original values may stay
    agent: str = __version__

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that are known: they are no residue of the patient, wherever they stand."""
        return tuple(label for label in (self.project, self.subject, self.session) if label)

    @property
    def names(self) -> str:
        """The scripts, for people."""
        return ", ".join(step.name for step in self.steps) or "labels only"


def recipe_of(config: Config, route: Route, *, project: str | None, subject: str | None, session: str | None,
              accession: str | None = None) -> Recipe | None:
    """The recipe for a shipment with these labels on this route; None when the route asks for nothing.

    Site-wide scripts come first, then the route's, as XNAT runs its own. Raises :class:`Unusable`.
    """
    site = config.deidentify.scripts if route.site_scripts else ()
    steps = [*(read_step(script, config.deidentify.lookup) for script in site),
             *(read_step(script, route.lookup) for script in route.scripts)]
    if not steps and not route.headers:
        return None
    for step in steps:
        load(step)
    labels = {"project": project or "", "subject": subject or "", "session": session or "",
              "accession": accession or ""}
    return Recipe(tuple(steps), tuple((int(tag, 16), text.format_map(labels)) for tag, text in route.headers.items()),
                  project, subject, session, tuple(int(tag, 16) for tag in route.identifiers),
                  tuple(int(tag, 16) for tag in route.keep))


def read_step(script: str, lookup: Path | None) -> Step:
    """A script as a configuration names it: a file, or the words of the DICOM profile. Raises :class:`Unusable`."""
    if _PROFILE.match(script):
        return Step(script, script)
    try:
        path = Path(script)
        table = lookup.read_text(encoding="utf-8") if lookup else None
        return Step(path.name, path.read_text(encoding="utf-8"), table)
    except OSError as error:
        raise Unusable(f"{error.filename} cannot be read ({error.strerror}); put it there for the service's user, or "
                       "take it from the configuration") from None
    except UnicodeDecodeError:
        raise Unusable(f"{script} or its lookup table is not UTF-8 text; convert it") from None


@lru_cache(64)
def load(step: Step) -> Script:
    """The script, parsed by the engine of its language. Raises :class:`Unusable`."""
    try:
        return parse(step)
    except ScriptError as error:
        raise Unusable(f"{step.name}: {error}") from None


def parse(step: Step) -> Script:
    """As :func:`load`; raises :class:`relay_agent.deidentify.script.ScriptError` with line and column."""
    text, name = step.text, step.name
    if _PROFILE.match(text):
        return profile.parse(text, name)
    start = text.lstrip("\ufeff \t\r\n")
    if start.startswith("<"):
        return ctp.parse(text, name, step.lookup)
    if not dicomedit.is_dicomedit4(text):
        return dicomedit.parse(text, name, step.lookup)
    if _PROPERTIES.search(text):
        return ctp.parse(text, name, step.lookup)
    if ":=" not in text:  # a condition of DicomEdit looks like a region's signature
        if _PIXELS.search(text):
            return ctp.parse_pixels(text, name)
        if _FILTER.search(text):
            return ctp.parse_filter(text, name)
    raise ScriptError(dicomedit.conversion(text))
