"""The Basic Application Level Confidentiality Profile of PS3.15 annex E with its options, as a script of one line.

``ps3.15 retain-uids clean-descriptors retain-modified-dates=-30``

=================================  ==================================================================================
retain-uids                        UIDs stay; without it they are mapped by the project's key
retain-device-identity             serial numbers, station names and the like stay, AE titles are cleaned
retain-institution-identity        name, address, department of the institution stay
retain-patient-characteristics     age, sex, size, weight and the like stay, allergies and state are cleaned
retain-full-dates                  dates and times stay, the birth date does not
retain-modified-dates              dates move 1 to 365 days back, the same for all data of a patient ID; times stay
retain-modified-dates=DAYS         dates move by so many days, the same for everybody
retain-safe-private                private attributes of Table E.3.10-1 (and some of Siemens MR) stay
retain-siemens-csa                 CSA headers of Siemens MR stay, cleaned; not of the standard, so without a code
clean-pixel-data                   objects whose pixels may show text fail unless a script before this one painted them
clean-descriptors                  descriptions and comments stay without what identifies
clean-structured-content           structured reports stay without what identifies
clean-graphics                     annotations and curves stay without what identifies; overlays go all the same
=================================  ==================================================================================

Where the table leaves a choice (X/Z/D) the attribute's Type in the object's IOD decides; in items, or when the SOP
Class is not known, the value becomes a dummy. Where two options speak, cleaning goes before keeping. A text is cleaned
by cutting out every value that identifies in this object; when that is not certain, the Basic Profile's action is
taken. The same holds for text that cannot be decoded and dates that are none. Patient's Name and Patient ID become the
subject when one is known. The days by which dates move come from the Patient ID as it is found: a script that changes
it before this one changes them. Pixel data is not changed here: clean-pixel-data
holds what the scripts before should have painted and did not, and faces (113102) are for the centre to remove.
"""

from __future__ import annotations

import re

from relay_agent.dataset import Broken, vr_of
from relay_agent.deidentify.profile import csa
from relay_agent.deidentify.profile.run import CSA, DAYS, OPTIONS, Run
from relay_agent.deidentify.profile.table import EDITION, OVERLAYS, attributes, resolve, row_tag, safe_private, types
from relay_agent.deidentify.residue import PATIENT
from relay_agent.deidentify.script import Context, Failed, Finding, Script, ScriptError
from relay_agent.instance import File

__all__ = ["EDITION", "Profile", "parse"]
_NAMES = frozenset({"PN", "LO", "SH", "ST", "UC", "AE"})


def parse(text: str, name: str) -> Script:
    """The profile from the words of a configuration. Raises :class:`ScriptError` that names what is allowed."""
    words = [(match.group(), match.start() + 1) for match in re.finditer(r"\S+", text)]
    if not words or words[0][0].lower() not in {"ps3.15", f"ps3.15-{EDITION}"}:
        raise ScriptError(f'"ps3.15" (edition {EDITION}) was expected first', 1, words[0][1] if words else 1)
    options: dict[str, int | None] = {}
    for word, column in words[1:]:
        option, equals, number = word.lower().partition("=")
        if option not in OPTIONS:
            raise ScriptError(f"{_shown(option)} is no option; allowed are {', '.join(OPTIONS)}", 1, column)
        if option in options:
            raise ScriptError(f"{option} stands there twice", 1, column)
        if equals and option != DAYS:
            raise ScriptError(f"{option} takes no value; only {DAYS}=DAYS does", 1, column)
        if equals and (not re.fullmatch(r"[+-]?\d{1,5}", number) or not int(number)):
            raise ScriptError(f"{DAYS}= takes a number of days other than 0, such as -30", 1, column)
        options[option] = int(number) if equals else None
    if "retain-full-dates" in options and DAYS in options:
        raise ScriptError("retain-full-dates and retain-modified-dates exclude each other (PS3.15 section E.3.6)", 1)
    return Profile(name, options)


class Profile:
    """The profile with a choice of options."""

    language = f"PS3.15 {EDITION}"

    def __init__(self, name: str, options: dict[str, int | None]) -> None:
        self.name = name
        self.options = frozenset(options)
        self.days = options.get(DAYS)
        self.safe = safe_private() if "retain-safe-private" in options else frozenset()
        if CSA in options:
            self.safe |= {(csa.GROUP, csa.CREATOR, low) for low in csa.HEADERS | csa.TEXTS}
        table = attributes()
        self._plan = {tag: (self._option(tag), resolve(row.basic, None)) for tag, row in table.items()}
        self._combined = [(tag, row.basic) for tag, row in table.items() if "/" in row.basic]
        self._top: dict[str, dict[int, tuple[str, str]]] = {}
        self.identifying = PATIENT.union(  # what is cut out of texts: what goes, but dates and other such texts
            tag for tag, (option, _) in self._plan.items() if option != "K" and vr_of(tag) in _NAMES
            and not table[tag].options.keys() & {"clean-descriptors", DAYS})

    def apply(self, file: File, context: Context) -> None:
        """Change the object. Raises :class:`Failed`."""
        try:
            Run(self, file, context).all()
        except Broken as error:
            raise Failed(str(error), self.name) from None

    def plan(self, sop_class: str | None) -> dict[int, tuple[str, str]]:
        """What happens to public attributes by an option (K, C or "") and otherwise (X, Z, D or U).

        At the first level of an object of a SOP Class; None for items.
        """
        known = types().get(sop_class) if sop_class is not None else None
        if sop_class is None or known is None:
            return self._plan
        if sop_class not in self._top:
            resolved = {tag: (self._plan[tag][0], resolve(basic, known.get(tag, "3"))) for tag, basic in self._combined}
            self._top = {**self._top, sop_class: self._plan | resolved}
        return self._top[sop_class]

    def findings(self) -> list[Finding]:
        """What the options leave that one might not expect."""
        found = []
        if "retain-uids" in self.options:
            found.append(Finding("UIDs stay; some devices put dates, serial numbers or patient IDs into them"))
        if self.days is not None:
            found.append(Finding("every patient's dates move by the same days; who knows one date knows them all"))
        if {DAYS, "retain-device-identity"} <= self.options:
            found.append(Finding("dates of calibration and manufacture are moved, not kept: cleaning goes first"))
        if "clean-graphics" in self.options:
            found.append(Finding("overlay planes are removed: nothing tells whether their bits are text"))
        return found

    def touches(self) -> set[int]:
        """Tags that the profile changes with these options; of repeating groups the first one."""
        return {tag for tag, (option, _) in self._plan.items() if option != "K"}

    def _option(self, tag: int) -> str:
        if row_tag(tag) == OVERLAYS:
            return ""
        chosen = {action for option, action in attributes()[tag].options.items() if option in self.options}
        return min(chosen, default="")  # C before K


def _shown(word: str) -> str:
    return f'"{word[:40]}"'
