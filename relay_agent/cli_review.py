"""``relay-agent review``: what waits for a reviewer, a look at it, and the decisions."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from relay_agent import preview, report, review
from relay_agent.console import DONE, actor, commands_of, open_ledger, print_json, said
from relay_agent.ledger import note


def add(commands: Any) -> None:
    """Add the group of commands to the parser."""
    parser = commands.add_parser("review", help="sessions that wait for a person: list, show, release, reject, exclude",
                                 description="Sessions that wait for a person.",
                                 epilog="example:\n  relay-agent review list",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    command = commands_of(parser.add_subparsers(required=True, metavar="COMMAND"), "review ")
    command("list", _list, "list sessions that wait for review", "list", prints=True)
    sub = command("show", _show, "show what is proposed for a session: labels, scripts, risks, series; not the patient",
                  "show 12 --changes --thumbnails /tmp/12", prints=True)
    sub.add_argument("shipment", type=int)
    sub.add_argument("--changes", action="store_true", help="also what the scripts change, tag by tag (a dry run)")
    sub.add_argument("--thumbnails", type=Path, metavar="FOLDER", help="write a PNG of each series' middle slice there")
    sub.add_argument("--identified", action="store_true", help="also the patient's data, as received; for those whom "
                     "the configuration names, and noted in the history")
    sub = command("release", _release, "approve a session: exactly what was shown, under these labels",
                  "release 12 --digest 3f2a…")
    sub.add_argument("shipment", type=int)
    sub.add_argument("--digest", help="digest that 'review show' printed; anything else is refused")
    sub = command("reject", _reject, "decide that a session does not go; files are kept",
                  'reject 12 --reason "no consent"')
    sub.add_argument("shipment", type=int)
    sub.add_argument("--reason", required=True, help="why; goes into the audit trail")
    sub = command("exclude", _exclude, "set series apart that are not to go; the rest is routed again",
                  'exclude 12 --series 1.2.3.4 --reason "screen capture"')
    sub.add_argument("shipment", type=int)
    sub.add_argument("--series", action="append", required=True, metavar="UID", help="as 'review show' prints it")
    sub.add_argument("--reason", required=True, help="why; goes into the audit trail")


def _list(options: argparse.Namespace) -> int:
    _, ledger = open_ledger(options)
    rows = preview.waiting(ledger)
    if options.json:
        print_json(rows)
    else:
        report.print_rows(report.console(), [{**row, "since": report.when(row["since"])} for row in rows],
                          "nothing waits for review")
    return DONE


def _show(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    number, identified = options.shipment, options.identified
    if identified:
        preview.require_identified(settings, actor())
    try:
        found = preview.summary(settings, ledger, number, identified=identified)
    except KeyError:
        raise review.Refused(f"there is no shipment {number}; see relay-agent review list") from None
    if identified:
        with ledger.write() as connection:
            note(connection, number, "patient's data were looked at", actor())
    changes = preview.changes(settings, ledger, number, identified=identified) if options.changes else None
    if options.thumbnails:
        pictures = preview.thumbnails(settings, ledger, number, identified=identified)
        _write_thumbnails(options.thumbnails, found, pictures)
    if options.json:
        print_json(found | (with_count(changes) if changes is not None else {}))
        return DONE
    console = report.console()
    for key in ("shipment", "state", "reason", "route", "project", "subject", "session", "accession", "auto_archive",
                "instances", "problem", "digest", "approved"):
        if found[key] is not None:
            source = found["sources"].get(key)
            console.print(f"{key.replace('_', ' '):>13}: {escape(str(found[key]))}"
                          + (f"  (from {source})" if source else ""), soft_wrap=True)
    if found["raw"]:
        report.print_raw(console, found["raw"], options.changes)
        return DONE
    console.print(f"{'scripts':>13}: {', '.join(found['scripts']) or 'none: it goes as it was received'}"
                  + ("" if found["deidentified"] or not found["scripts"] else "  (not run yet)"))
    for kind, count in found["pixel_risks"].items():
        console.print(f"{'pixel risk':>13}: {kind}, {count} instances")
    report.print_rows(console, found["series"], "no series", "\nseries")
    if changes is not None:
        print_changes(console, changes, identified=identified)
    return DONE


def with_count(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the scripts change, for JSON: private elements are among the changes, and counted."""
    return {"changes": changes, "private_changes": sum(row["private"] for row in changes)}


def print_changes(console: Console, changes: Sequence[dict[str, Any]], *, identified: bool = False) -> None:
    """What the scripts change, as a page."""
    shown = ("before", "after") if identified else ("after",)
    report.print_rows(console, [
        {key: row[key] for key in ("number", "path", "keyword", "rule")}
        | {key: report.told(row[key]) for key in shown if "refused" not in row}
        | ({"refused": row["refused"]} if "refused" in row else {}) for row in changes if not row["private"]],
        "the scripts change nothing", "\nchanges")
    console.print(f"and {sum(row['private'] for row in changes)} private elements")


def _write_thumbnails(folder: Path, found: dict[str, Any], pictures: Iterable[tuple[str, str, bytes | str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by_series = {row["series"]: row for row in found["series"]}
    for position, (series, number, picture) in enumerate(pictures, 1):
        row = by_series[series]
        if isinstance(picture, str):
            row["thumbnail"] = picture
            continue
        path = folder / f"{position:03}_{''.join(c for c in number if c.isalnum()) or 'series'}.png"
        path.write_bytes(picture)
        row["thumbnail"] = str(path)


def _release(options: argparse.Namespace) -> int:
    digest = review.release(open_ledger(options)[1], options.shipment, actor(), options.digest)
    return said(f"shipment {options.shipment} is released as the set {digest}")


def _reject(options: argparse.Namespace) -> int:
    review.reject(open_ledger(options)[1], options.shipment, actor(), options.reason)
    return said(f"shipment {options.shipment} is rejected; its files are kept (relay-agent retry takes it back)")


def _exclude(options: argparse.Namespace) -> int:
    apart = review.exclude(open_ledger(options)[1], options.shipment, options.series, actor(), options.reason)
    return said(f"set apart as shipment {apart}; shipment {options.shipment} is routed again without them")
