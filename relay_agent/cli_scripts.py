"""``relay-agent deidentify`` and ``relay-agent script``: for authors of scripts, without a box or a configuration."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from relay_agent import report
from relay_agent.charset import Undecodable
from relay_agent.console import DONE, FINDINGS, commands_of, print_json
from relay_agent.dataset import Broken, show
from relay_agent.deidentify import tools
from relay_agent.deidentify.make import apply, context, some
from relay_agent.deidentify.profile.table import EDITION, attributes
from relay_agent.deidentify.recipe import Recipe, Step, Unusable, load, parse, read_step
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.instance import File

REJECTED, ERROR = 3, 4
_LABELS = ("project", "subject", "session")
_TRIAL_KEY = b"relay-agent: trial runs of scripts, not a secret"


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    command = commands_of(commands, configured=False)
    sub = command("deidentify", _deidentify, "run scripts over a file or a folder, as the relay would; UIDs are mapped "
                  "with a trial key. Exit status: 0 done, 3 rejected by the script, 4 error, nothing written",
                  "deidentify --script site.das --script p1.das --project P1 --subject S1 --session S1_MR1 in/ out/")
    sub.add_argument("--script", action="append", nargs="+", required=True, metavar="FILE",
                     help='scripts, in order: DicomEdit 6, CTP, or "ps3.15 …" for the DICOM profile')
    sub.add_argument("--lookup", type=Path, metavar="FILE", help="lookup table of the scripts")
    for label in _LABELS:
        sub.add_argument(f"--{label}", metavar="LABEL", help=f"the variable {label}")
    sub.add_argument("--strict", action="store_true", help="as in the relay: identifiers that are left are an error")
    sub.add_argument("paths", nargs="*", type=Path, metavar="IN OUT", help="file or folder, and where the result goes")
    script = commands.add_parser("script", help="tools for authors of scripts: check, diff, coverage",
                                 description="Tools for authors of anonymisation scripts.",
                                 epilog="example:\n  relay-agent script check site.das",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    command = commands_of(script.add_subparsers(required=True, metavar="COMMAND"), "script ", configured=False)
    sub = command("check", _check, "parse scripts and say what their author should know", "check site.das", prints=True)
    sub.add_argument("file", nargs="+")
    sub.add_argument("--lookup", type=Path, metavar="FILE", help="lookup table of the scripts")
    sub = command("diff", _diff, "what changed between two files, or the files of two folders, tag by tag",
                  "diff in.dcm out.dcm", prints=True)
    sub.add_argument("before", type=Path, metavar="IN")
    sub.add_argument("after", type=Path, metavar="OUT")
    sub = command("coverage", _coverage, "which identifying attributes of PS3.15, and which identifiers of the data, "
                  "would survive scripts on a folder of samples", "coverage site.das --data samples/", prints=True)
    sub.add_argument("file", nargs="+")
    sub.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="sample files, or one file")
    sub.add_argument("--lookup", type=Path, metavar="FILE", help="lookup table of the scripts")
    sub.add_argument("--planted", action="append", default=[], metavar="TEXT", help="a text that is known to be in the "
                     "samples and must not survive")
    for label in _LABELS:
        sub.add_argument(f"--{label}", metavar="LABEL", default=label.upper(),
                         help=f"the variable {label} (default: %(default)s)")


def _deidentify(options: argparse.Namespace) -> int:
    scripts = [name for names in options.script for name in names]
    paths = list(options.paths)
    while len(paths) < 2 and len(scripts) > 1:  # "--script FILE… IN OUT": the list took what follows it
        paths.insert(0, Path(scripts.pop()))
    if len(paths) != 2:
        return _error("say which file or folder goes in, and where the result goes: IN OUT")
    source, target = paths
    try:
        steps = tuple(read_step(name, options.lookup) for name in scripts)
        for step in steps:
            load(step)
    except Unusable as error:
        return _error(str(error))
    recipe = _recipe(steps, options)
    if not source.exists():
        return _error(f"{source} is not there")
    if target.is_dir() and not source.is_dir():
        target /= source.name
    if source.resolve() == target.resolve():
        return _error("the result cannot go where the data come from")
    return _run(recipe, source, target, options.strict)


def _recipe(steps: tuple[Step, ...], options: argparse.Namespace) -> Recipe:
    return Recipe(steps, (), options.project, options.subject, options.session, (), ())


def _told(recipe: Recipe, now: datetime) -> Context:
    told = context(recipe, _TRIAL_KEY, now)
    told.number = _numbers
    return told


def _run(recipe: Recipe, source: Path, target: Path, strict: bool) -> int:
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # all or nothing
    missing = [folder for folder in target.parents if not folder.exists()]
    file, now = source, datetime.now()
    counts = Counter[str]()
    try:
        for file in _files(source):
            result = work / file.relative_to(source) if source.is_dir() else work
            result.parent.mkdir(parents=True, exist_ok=True)
            try:
                _one(recipe, now, file, result, strict)
                counts["done"] += 1
            except Rejected as error:
                counts["rejected"] += 1
                print(f"{file}: {error}", file=sys.stderr)
        if not counts:
            return _error(f"{source} holds no files")
        _publish(work, target)
    except (Failed, Broken, Undecodable) as error:
        return _error(f"{file}: {error}")
    except (MemoryError, RecursionError) as error:
        return _error(f"{file}: too large, or nested too deeply ({type(error).__name__})")
    except OSError as error:
        name = error.filename  # None when the disk is full
        return _error(f"{name if name and str(work) not in str(name) else target}: {error.strerror}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            work.unlink()
        for folder in missing:  # those that hold nothing
            with suppress(OSError):
                folder.rmdir()
    print(f"{counts['done']} de-identified, {counts['rejected']} rejected by the scripts")
    return REJECTED if counts["rejected"] else DONE


def _files(source: Path) -> list[Path]:
    """A file, or all files of a folder but the index of a medium, which is no object."""
    if not source.is_dir():
        return [source]
    return sorted(path for path in source.rglob("*") if path.is_file() and path.name != "DICOMDIR")


def _one(recipe: Recipe, now: datetime, source: Path, target: Path, strict: bool) -> None:
    file = File.read(source)
    left, risks = apply(recipe, file, _told(recipe, now))
    if left and strict:
        raise Failed(some(left))
    if left:
        print(f"{source}: the relay would hold this: {some(left)}", file=sys.stderr)
    if risks:
        kinds = ", ".join(sorted({risk.kind for risk in risks}))
        print(f"{source}: the relay would ask a person, unless the route allows it: {kinds}", file=sys.stderr)
    file.write(target)


@cache
def _numbers(kind: str, value: str) -> int:
    """Running numbers for a trial."""
    _counts[kind] += 1
    return _counts[kind]


_counts: Counter[str] = Counter()


def _publish(work: Path, target: Path) -> None:
    if not work.is_dir():
        if work.exists():
            work.replace(target)
        return
    for path in _files(work):
        result = target / path.relative_to(work)
        result.parent.mkdir(parents=True, exist_ok=True)
        path.replace(result)


def _error(text: str) -> int:
    print(text, file=sys.stderr)
    return ERROR


def _check(options: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    scripts = []
    for name in options.file:
        try:
            script = parse(read_step(name, options.lookup))
            scripts.append(script)
            found.append({"script": name, "language": script.language,
                          "findings": [asdict(finding) for finding in script.findings()]})
        except (ScriptError, Unusable) as error:
            found.append({"script": name, "language": None, "findings": [
                {"text": str(error), "line": getattr(error, "line", 0), "grave": True}]})
    left = tools.untouched(scripts) if scripts else []
    if options.json:
        print_json({"scripts": found, "profile": f"PS3.15 {EDITION}", "untouched": [
            {"tag": show(tag), "keyword": tools.keyword(tag), "action": attributes()[tag].basic} for tag in left]})
    else:
        for row in found:
            print(f"{row['script']}: {row['language'] or 'cannot be used'}")
            for finding in row["findings"]:
                where = f"line {finding['line']}: " if finding["line"] and row["language"] else ""
                print(f"  {'ERROR  ' if finding['grave'] else 'remark '} {where}{finding['text']}")
        if left:
            print(f"{len(left)} attributes that PS3.15 {EDITION} changes and that no script here touches, by group "
                  "(script coverage tells which of them are in your data):")
        for group, tags in groupby(left, lambda tag: tag >> 16):
            print(f"  {group:04x}: {', '.join(map(tools.keyword, tags))}")
    return FINDINGS if any(finding["grave"] for row in found for finding in row["findings"]) else DONE


def _diff(options: argparse.Namespace) -> int:
    before, after = options.before, options.after
    rows: list[dict[str, Any]] = []
    file = before
    try:
        for path in _files(before):
            file = path
            name = path.relative_to(before) if before.is_dir() else path.name
            other = after / name if before.is_dir() else after
            if before.is_dir() and after.is_dir() and not other.exists():
                print(f"{name}: not in {after}", file=sys.stderr)
                continue
            old = File.read(path).dataset
            file = other
            rows += [{"file": str(name), **asdict(change), "tag": show(change.tag)}
                     for change in tools.difference(old, File.read(other).dataset)]
    except Broken as error:
        return _error(f"{file}: not readable as DICOM: {error}")
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}")
    if options.json:
        print_json(rows)
    else:
        columns = (*(["file"] if before.is_dir() else []), "path", "keyword")
        report.print_rows(report.console(), [
            {key: row[key] for key in columns} | {key: report.told(row[key]) for key in ("before", "after")}
            for row in rows], "no difference")
    return DONE


def _coverage(options: argparse.Namespace) -> int:
    files = _files(options.data)
    try:
        steps = tuple(read_step(name, options.lookup) for name in options.file)
        told = partial(_told, _recipe(steps, options), datetime.now())
        found = tools.coverage([load(step) for step in steps], files, options.planted, told)
    except Unusable as error:
        return _error(str(error))
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}")
    if not files:
        return _error(f"{options.data} holds no files")
    survivors = [row for row in (*found.attributes, found.private) if row.survived]
    if options.json:
        print_json(asdict(found) | {
            "failures": [{"file": name, "reason": reason} for name, reason in found.failures],
            "attributes": [asdict(row) | {"tag": show(row.tag)} for row in found.attributes],
            "leaks": [asdict(leak) | {"source": show(leak.source) if leak.source else None} for leak in found.leaks],
            "private": {"present": found.private.present, "survived": found.private.survived},
            "planted": [{"text": text, "files": count}
                        for text, count in zip(options.planted, found.planted, strict=True)]})
    else:
        print(f"{found.files} files: {found.done} de-identified, {found.rejected} rejected by the scripts, "
              f"{len(found.failures)} failed")
        for name, reason in found.failures:
            print(f"  {name}: {reason}")
        if not found.done:
            return FINDINGS
        console = report.console()
        report.print_rows(console, [{"tag": show(row.tag) if row.tag else "", "attribute": row.keyword, "PS3.15":
                                     row.action, "in files": row.present, "survived in": row.survived}
                                    for row in survivors], "no attribute that PS3.15 would change survives",
                          "\nattributes that PS3.15 would change and that survive")
        report.print_rows(console, [{"path": leak.path, "value of": show(leak.source) if leak.source else "undecodable",
                                     "files": leak.files} for leak in found.leaks],
                          "no identifier of the data survives", "\nidentifiers of the data that survive")
        for text, count in zip(options.planted, found.planted, strict=True):
            print(f"planted {text!r}: left in {count} of {found.done}")
    return FINDINGS if survivors or found.leaks or found.failures or any(found.planted) else DONE
