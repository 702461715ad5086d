"""Preview: what a reviewer sees of a session before it leaves; the same data for the command line and for a console.

Two views. The patient-free one holds what will leave the box and nothing else of the patient; the identified one also
what is in the received objects, and is for those whom the configuration names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from relay_agent import instance
from relay_agent.config import Config
from relay_agent.dataset import Broken, Dataset, show
from relay_agent.deidentify.key import box_key
from relay_agent.deidentify.make import Numbers, context, deidentify
from relay_agent.deidentify.recipe import Recipe, Unusable
from relay_agent.deidentify.script import Context, Failed, Rejected
from relay_agent.deidentify.tools import difference
from relay_agent.deidentify.work import is_made, recipe_for
from relay_agent.instance import File
from relay_agent.kspace import account
from relay_agent.ledger import Ledger, State
from relay_agent.package import set_digest
from relay_agent.thumbnail import thumbnail

_DESCRIPTION = 0x0008103E


class NotAllowed(Exception):
    """This person may not see identified data; the message says who decides."""


def require_identified(config: Config, person: str) -> None:
    """Raise :class:`NotAllowed` unless the configuration lets this person see patients' data."""
    if person not in config.review.identified:
        raise NotAllowed(f"{person} may not see patients' data; whoever may is listed in the configuration, "
                         "[review] identified")


def waiting(ledger: Ledger) -> list[dict[str, Any]]:
    """Sessions that wait for a reviewer, oldest first, in the patient-free view."""
    return [{"shipment": row["id"], "project": row["project"], "subject": row["subject"], "session": row["session"],
             "instances": row["instances"], "since": row["changed"], "reason": row["reason"]}
            for row in ledger.all("SELECT * FROM shipment WHERE state = ? ORDER BY id", State.REVIEW)]


def summary(config: Config, ledger: Ledger, shipment: int, *, identified: bool = False) -> dict[str, Any]:
    """What is proposed for a session: labels and their sources, scripts, risks, series, and the digest to approve.

    ``KeyError`` when there is no such shipment.
    """
    row = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    if row is None:
        raise KeyError(shipment)
    try:
        recipe, problem = recipe_for(config, row), None
    except Unusable as error:
        recipe, problem = None, str(error)
    made = recipe is not None and is_made(ledger, row, recipe)
    risks: Counter[str] = Counter()
    for part in ledger.all("SELECT risks, count(*) AS n FROM made WHERE shipment = ? GROUP BY risks", shipment):
        risks.update({kind: part["n"] for kind in json.loads(part["risks"])})
    sources = json.loads(row["sources"] or "{}")
    return {
        "shipment": shipment, "state": row["state"], "reason": row["reason"], "route": row["route"],
        "project": row["project"], "subject": row["subject"], "session": row["session"],
        "accession": row["accession"], "sources": sources, "instances": row["instances"],
        "auto_archive": None if row["auto_archive"] is None else bool(row["auto_archive"]),
        "scripts": [step.name for step in recipe.steps] if recipe else [], "problem": problem,
        "deidentified": made, "pixel_risks": dict(risks),
        "digest": set_digest(ledger, row), "approved": row["approved"] == set_digest(ledger, row),
        "raw": account.raw(ledger, shipment),
        "series": list(_series(config, ledger, shipment, made, identified)),
    }


def _series(config: Config, ledger: Ledger, shipment: int, made: bool, identified: bool) -> Iterator[dict[str, Any]]:
    rows = ledger.all("SELECT series_uid, series_number, modality, count(*) AS n, sum(size) AS bytes, "
                      "min(id) AS first, sop_class FROM instance WHERE shipment = ? AND sop_class <> '' GROUP BY "
                      "series_uid ORDER BY min(id)", shipment)
    for row in rows:
        path = _received(config, ledger, row["first"]) if identified else _made(config, ledger, row["first"])
        yield {"series": row["series_uid"], "number": row["series_number"], "modality": row["modality"],
               "instances": row["n"], "bytes": row["bytes"], "sop_class": row["sop_class"],
               "description": _text(path, _DESCRIPTION) if path is not None and (made or identified) else None}


def _received(config: Config, ledger: Ledger, number: int) -> Path:
    return config.spool / str(ledger.value("SELECT path FROM instance WHERE id = ?", number))


def _made(config: Config, ledger: Ledger, number: int) -> Path | None:
    path = ledger.value("SELECT path FROM made WHERE instance = ?", number)
    return config.data / path if path else None


def _text(path: Path, tag: int) -> str | None:
    try:
        return File.read(path).dataset.text(tag)
    except (OSError, ValueError):
        return None


def changes(config: Config, ledger: Ledger, shipment: int, *, identified: bool = False) -> list[dict[str, Any]]:
    """What the scripts change, by a dry run over the first instance of each series; nothing is kept of it.

    Each change: series, path, tag, keyword, rule, and (identified view) the value before; the value after is what
    will leave. Raises :class:`relay_agent.deidentify.recipe.Unusable`; ``KeyError`` when there is no such shipment.
    """
    row = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    if row is None:
        raise KeyError(shipment)
    recipe = recipe_for(config, row)
    if recipe is None:
        return []
    key = box_key(config, ledger)
    found: list[dict[str, Any]] = []
    for part in ledger.all("SELECT series_uid, series_number, min(id) AS first FROM instance WHERE shipment = ? "
                           "GROUP BY series_uid ORDER BY min(id)", shipment):
        told = context(recipe, key, datetime.fromtimestamp(row["opened"]), Numbers(ledger.path, key))
        series = {"series": part["series_uid"], "number": part["series_number"]}
        try:
            for change in dry_run(recipe, told, _received(config, ledger, part["first"])):
                if not identified:
                    change["before"] = None
                found.append({**series, **change})
        except (Failed, Rejected, Broken, OSError) as error:
            found.append({**series, "path": "", "keyword": "", "rule": getattr(error, "rule", ""), "before": None,
                          "after": None, "private": False, "refused": str(error)})
    return found


def dry_run(recipe: Recipe, told: Context, path: Path) -> list[dict[str, Any]]:
    """The changes that a recipe makes to one file. Raises :class:`Failed`, :class:`Rejected`, :class:`Broken`."""
    buffer = instance.read(path)
    before, file = File.parse(buffer), File.parse(buffer)
    rules: dict[str, str] = {}

    def watch(data: Dataset, tag: int) -> None:
        rules[where(data) + show(tag)] = told.rule

    file.dataset.watch = watch
    deidentify(recipe, file, told)
    found = difference(before.dataset, file.dataset)
    return [{**asdict(change), "rule": _rule(rules, change.path)} for change in found]


def where(data: Dataset) -> str:
    """The path of an item, as ``(gggg,eeee)[index]/``; empty for the outermost data set."""
    if data.parent is None:
        return ""
    for element in data.parent:
        for index, item in enumerate(data.parent.items(element.tag)):
            if item is data:
                return f"{where(data.parent)}{show(element.tag)}[{index}]/"
    return where(data.parent)  # an item that is still being made


def _rule(rules: dict[str, str], path: str) -> str:
    """The rule that last touched a path, or what holds it."""
    while path:
        if path in rules:
            return rules[path]
        path = path.rpartition("/")[0].rpartition("[")[0]  # the sequence that holds it
    return ""


def thumbnails(config: Config, ledger: Ledger, shipment: int, *, identified: bool = False
               ) -> Iterator[tuple[str, str, bytes | str]]:
    """Of each series: its UID, its number, and a PNG of the middle instance (or why there is none).

    The patient-free view shows what was made, unless its pixels may identify; where nothing was made yet, nothing.
    """
    for row in ledger.all("SELECT series_uid, series_number FROM instance WHERE shipment = ? GROUP BY series_uid "
                          "ORDER BY min(id)", shipment):
        numbers = [part["id"] for part in ledger.all(
            "SELECT id FROM instance WHERE shipment = ? AND series_uid = ? "
            "ORDER BY cast(instance_number AS INTEGER), id", shipment, row["series_uid"])]
        middle = numbers[len(numbers) // 2]
        if not identified and ledger.value("SELECT risks FROM made WHERE instance = ?", middle) not in (None, "[]"):
            yield row["series_uid"], row["series_number"] or "", "not shown: its pixels may identify the patient"
            continue
        path = _received(config, ledger, middle) if identified else _made(config, ledger, middle)
        try:
            picture: bytes | str = thumbnail(File.read(path)) if path is not None else "not de-identified yet"
        except (Failed, ValueError, OSError) as error:
            picture = str(error)
        yield row["series_uid"], row["series_number"] or "", picture
