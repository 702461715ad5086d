"""``relay-agent kspace``: raw data of Siemens scanners by hand, without a box or a configuration."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from relay_agent.console import DONE, FINDINGS, commands_of, print_json
from relay_agent.deidentify.uids import UIDs
from relay_agent.kspace import facts, join
from relay_agent.kspace.identity import KEEPABLE
from relay_agent.kspace.match import Match, State, match
from relay_agent.kspace.protocol import Unreadable
from relay_agent.kspace.scrub import VERSIONS, Held, plan, scrub
from relay_agent.kspace.twix import Check, NotTwix, Verdict, check

INCOMPLETE, NOT_TWIX, ERROR = 2, 3, 4
_TRIAL_KEY = b"relay-agent: trial runs of scripts, not a secret"
_STATUS = {Verdict.COMPLETE: DONE, Verdict.ABORTED: INCOMPLETE, Verdict.INCOMPLETE: INCOMPLETE,
           Verdict.NOT_TWIX: NOT_TWIX}


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser("kspace", help="raw k-space data: check, scrub, match",
                                 description="Raw k-space data of Siemens scanners (TWIX, meas_*.dat).",
                                 epilog="example:\n  relay-agent kspace check meas_MID00358.dat",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    command = commands_of(parser.add_subparsers(required=True, metavar="COMMAND"), "kspace ", configured=False)
    sub = command("check", _check, "is it complete? Exit status: 0 complete, 2 incomplete or aborted, 3 not TWIX, 4 "
                  "error; of several files the worst", "check meas_MID00358.dat", prints=True)
    sub.add_argument("file", type=Path, nargs="+")
    sub = command("scrub", _scrub, "write it without what identifies the patient; k-space and length stay as they are. "
                  "Exit status: 0 done, 3 not TWIX, 4 held, nothing written", "scrub --project P1 in.dat out.dat",
                  prints=True)
    sub.add_argument("source", type=Path, metavar="IN")
    sub.add_argument("target", type=Path, metavar="OUT", help="must not exist yet")
    sub.add_argument("--project", default="", metavar="LABEL", help="the project, for its UIDs")
    sub.add_argument("--key", type=Path, metavar="FILE", help="the box's key, for the UIDs that its DICOM gets "
                     "(default: a trial key)")
    sub.add_argument("--keep", action="append", default=[], choices=sorted(KEEPABLE), help="fields that stay")
    sub.add_argument("--known", action="append", default=[], metavar="TEXT", help="a name or an ID that must not occur "
                     "either, for raw data that the scanner anonymised in part")
    sub.add_argument("--version", action="append", default=[], metavar="V", help="a software version that is not known "
                     f"({', '.join(sorted(VERSIONS))} are) and that somebody has looked at, such as XA60")
    sub = command("match", _match, "which session and series of a folder of DICOM it belongs to. Exit status: 0 all "
                  "matched, 1 not, 4 error", "match meas_MID00358.dat --dicom folder/", prints=True)
    sub.add_argument("raw", type=Path, nargs="+", metavar="RAW")
    sub.add_argument("--dicom", type=Path, required=True, metavar="FOLDER")
    sub.add_argument("--offset", type=float, default=0.0, metavar="SECONDS", help="DICOM's clock minus the imager's")
    sub = command("join", lambda options: join.run(options.folder, options.remove), "join files that came in pieces, "
                  "over there: relay_agent/kspace/join.py does the same alone. Exit status: 0 all joined, 1 not",
                  "join KSPACE/ --remove")
    sub.add_argument("folder", type=Path, help="the resource as it was downloaded, or in XNAT's archive")
    sub.add_argument("--remove", action="store_true", help="delete the pieces that were joined")


def _check(options: argparse.Namespace) -> int:
    rows, status = [], DONE
    for path in options.file:
        try:
            found = check(path)
            row = {"file": str(path), **_told(path, found)}
            status = max(status, _STATUS[found.verdict])
        except OSError as error:
            row = {"file": str(path), "error": error.strerror}
            status = ERROR
        rows.append(row)
    if options.json:
        print_json(rows)
    else:
        for row in rows:
            _print(row)
    return status


def _told(path: Path, found: Check) -> dict[str, Any]:
    """What can be said of a file without saying anything of the patient."""
    row: dict[str, Any] = {"verdict": found.verdict.value, "reason": found.reason, "size": found.size,
                           "sha256": found.sha256}
    if not found.measurements:
        return row
    try:
        told = facts.describe(path, found)
    except Unreadable as error:
        return row | {"reason": found.reason or str(error)}
    parts = [{"uid": one.uid, "offset": one.start, "bytes": one.end - one.start, "readouts": one.readouts,
              "syncdata_blocks": one.syncs, "end_of_acquisition": bool(one.acqend),
              "buffers": [buffer.name for buffer in one.buffers]} for one in found.measurements]
    return row | {"format": "multi-RAID" if found.multi else "VB", "version": told.version, "scanner": told.scanner,
                  "protocol": told.name, "measurements": parts}


def _print(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['file']}: {row['error']}")
        return
    print(f"{row['file']}: {row['verdict']}{': ' if row['reason'] else ''}{row['reason']}")
    print(f"  {row['size']:,} bytes, SHA-256 {row['sha256']}")
    if "measurements" not in row:
        return
    print(f"  {row['format']}, software {row['version'] or 'unknown'}, {row['scanner'] or 'scanner unknown'}, "
          f"protocol {row['protocol'] or 'unknown'}")
    for number, one in enumerate(row["measurements"], 1):
        print(f"  measurement {number}: MeasUID {one['uid']}, {one['readouts']:,} readouts, {one['bytes']:,} bytes, "
              f"{'ends' if one['end_of_acquisition'] else 'does not end'} with ACQEND")


def _scrub(options: argparse.Namespace) -> int:
    work = options.target.with_name(f".{options.target.name}.part")
    try:
        if not options.target.parent.is_dir():
            return _error(f"{options.target.parent}: no such folder")
        if options.target.exists():
            return _error(f"{options.target} exists already")
        key = options.key.read_bytes() if options.key else _TRIAL_KEY
        made = plan(options.source, UIDs(key, options.project), options.keep, VERSIONS.union(options.version),
                    options.known)
        done = scrub(options.source, made, work)
        work.rename(options.target)
    except NotTwix as error:
        _error(f"{options.source}: not TWIX: {error}")
        return NOT_TWIX
    except Held as error:
        return _error(f"{options.source}: {error}")
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}")
    if options.json:
        print_json({"verdict": done.check.verdict.value, "versions": made.versions, "original_sha256":
                    done.check.sha256, "sha256": done.sha256, "replaced": [
                        {"where": where, "what": kind, "count": count} for where, kind, count in made.report]})
    else:
        print(f"{done.check.verdict}, software {', '.join(sorted(set(made.versions)))}, SHA-256 {done.sha256}")
        for where, kind, count in made.report:
            print(f"  {where}: {kind}, {count} replaced")
        print("The head can still be reconstructed to a face, and readouts tell the time of day.")
    return DONE


def _match(options: argparse.Namespace) -> int:
    rows, status = [], DONE
    try:
        if not options.dicom.is_dir():
            return _error(f"{options.dicom}: no such folder")
        sessions = facts.sessions(sorted(path for path in options.dicom.rglob("*") if path.is_file()))
        if not sessions:
            _error(f"{options.dicom}: there is no DICOM in it")
        for path in options.raw:
            try:
                found = check(path)
                result = match(facts.raw(path, found), sessions, options.offset) if found.measurements else None
            except Unreadable as error:
                return _error(f"{path}: {error}")
            if result is None or result.state is not State.MATCHED:
                status = FINDINGS
            rows.append({"file": str(path), "verdict": found.verdict.value, "reason": found.reason,
                         **(_result(result) if result else {})})
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}")
    if options.json:
        print_json(rows)
    else:
        for row in rows:
            whole = f" ({row['verdict']}: {row['reason']})" if row["reason"] else ""
            print(f"{row['file']}: {row.get('state', 'unmatched')}{whole}")
            for one in row.get("candidates", ()):
                series = ", ".join(f"{each['number']}" for each in one["series"]) or "none, attach to the session"
                print(f"  {one['score']:4}  {one['session']}, series {series} ({', '.join(one['reasons'])})")
    return status


def _result(found: Match) -> dict[str, Any]:
    return {"state": found.state.value, "candidates": [
        {**asdict(one), "series": [{"uid": each.uid, "number": each.number} for each in one.series]}
        for one in found.candidates]}


def _error(text: str) -> int:
    print(text, file=sys.stderr)
    return ERROR
