"""The console script ``relay-agent``: two services, and what operators ask and decide."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress

from relay_agent import (
    __version__,
    check,
    cli_box,
    cli_kspace,
    cli_review,
    cli_scripts,
    config,
    dicom,
    log,
    preview,
    receipt,
    receive,
    report,
    review,
    stage,
)
from relay_agent.config import Config, ConfigError, Identify
from relay_agent.console import (
    DONE,
    FINDINGS,
    USAGE,
    actor,
    commands_of,
    load,
    open_ledger,
    print_json,
    said,
)
from relay_agent.deidentify.recipe import Unusable
from relay_agent.header import read_header
from relay_agent.identify import identify, needed_tags
from relay_agent.java_regex import RuleValueError
from relay_agent.kspace import pickup
from relay_agent.ledger import LedgerError, State
from relay_agent.route import known_project
from relay_agent.spool import Spool
from relay_agent.worker import Worker

_EPILOG = """examples:
  relay-agent example-config > config.toml      a commented configuration
  relay-agent check --config config.toml        is it right, and does everything answer?
  relay-agent run --config config.toml          receive and work on one machine
  relay-agent status                            where everything is
  relay-agent list --state held                 what waits for a person
  relay-agent assign 12 --project P1 --subject S1 --session S1_MR1
  relay-agent receipt 12                        proof of arrival
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 1 findings or not possible, 2 wrong use or configuration."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold any bytes
    try:
        return int(options.action(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    except (review.Refused, preview.NotAllowed, Unusable, LedgerError) as error:
        print(error, file=sys.stderr)
        return FINDINGS
    except PermissionError as error:
        print(f"{error.filename}: permission denied; run as the service's user", file=sys.stderr)
        return FINDINGS
    except BrokenPipeError:
        sys.stderr.close()
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relay-agent", description="Brings imaging sessions from scanners to a "
                                     "central archive and proves that they arrived.", epilog=_EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"relay-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands_of(commands)
    for name, action, text in (("receive", _receive, "the receiving service: Storage SCPs, no outbound connections"),
                               ("work", _work, "the working service: stage, route, ship, verify, purge"),
                               ("run", _run, "both services, for one machine")):
        sub = command(name, action, text, f"{name} --config config.toml")
        if name != "work":
            sub.add_argument("--ready", type=Path, metavar="FILE", help="write the ports to FILE once they listen")
    sub = command("check", _check, "check configuration, machine and destinations, and say what to do",
                  "check --config config.toml", prints=True)
    sub.add_argument("--offline", action="store_true", help="only what needs no network")
    command("status", _status, "where everything is, and whether the ledger balances", "status --json", prints=True)
    sub = command("list", _list, "list shipments, or what is in quarantine", "list --state held", prints=True)
    sub.add_argument("--state", action="append", choices=[s.value for s in State], help="only these states")
    sub.add_argument("--quarantined", action="store_true", help="list quarantined instances instead")
    sub.add_argument("--limit", type=int, default=100, help="at most so many, newest first (default: %(default)s)")
    sub = command("show", _show, "show a shipment: series, deliveries, conflicts, history", "show 12", prints=True)
    sub.add_argument("shipment", type=int)
    sub.add_argument("--changes", action="store_true", help="also what the scripts change, as 'review show' does")
    sub = command("assign", _assign, "give a held shipment labels or a route by hand, raw data their session",
                  "assign 12 --project P1 --subject S1 --session S1_MR1")
    sub.add_argument("shipment", type=int)
    for label in ("project", "subject", "session"):
        sub.add_argument(f"--{label}", metavar="LABEL", help=f"the {label} it belongs to; XNAT's label, not a title")
    sub.add_argument("--accession", metavar="TEXT", help="{accession} of the route's headers")
    sub.add_argument("--route", metavar="NAME", help="a route of the configuration, whatever its conditions")
    sub.add_argument("--to", type=int, metavar="SHIPMENT", help="raw data: the session that they belong to")
    sub.add_argument("--series", metavar="NUMBER", help="raw data: which of its series, number or UID (default: the "
                     "session as a whole)")
    sub = command("release", _release, "release a shipment that waits for review", "release 12")
    sub.add_argument("shipment", type=int)
    sub = command("reject", _reject, "decide that a shipment does not go; files are kept", 'reject 12 --reason "test"')
    sub.add_argument("shipment", type=int)
    sub.add_argument("--reason", required=True, help="why; goes into the audit trail")
    sub = command("retry", _retry, "try again now: a held, stopped, waiting or rejected shipment", "retry 12")
    sub.add_argument("shipment", type=int, help="number of the shipment (of the instance with --quarantined)")
    sub.add_argument("--quarantined", action="store_true", help="look at a quarantined instance again")
    sub = command("receipt", _receipt, "show a shipment's receipts, or verify all receipts of this box", "receipt 12",
                  prints=True)
    sub.add_argument("shipment", type=int, nargs="?")
    sub.add_argument("--verify", action="store_true", help="check that no receipt was removed or edited")
    sub = command("upload", _upload, "take in files or folders by hand, DICOM or raw k-space data",
                  "upload /media/cdrom", prints=True)
    sub.add_argument("path", type=Path, nargs="+")
    sub.add_argument("--receiver", metavar="AE", help="as if received by this receiver (default: the first)")
    sub.add_argument("--source", metavar="NAME", help="all of it is raw k-space data of this source (default: TWIX "
                     "files are, of the first source)")
    sub = command("identify", _identify, "what XNAT would make of files: project, subject, session, auto-archive",
                  "identify image.dcm", prints=True)
    sub.add_argument("file", type=Path, nargs="+")
    cli_review.add(commands)
    cli_scripts.add(commands)
    cli_kspace.add(commands)
    cli_box.add(commands)
    text = "print a commented configuration with every setting"
    sub = commands.add_parser("example-config", help=text, description=text[0].upper() + text[1:] + ".",
                              epilog="example:\n  relay-agent example-config > config.toml",
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.set_defaults(action=lambda _: print(config.example(), end="") or DONE)
    return parser


def _service(options: argparse.Namespace) -> Config:
    settings = load(options)
    log.setup(settings.log_level)
    return settings


def _receive(options: argparse.Namespace) -> int:
    return receive.serve(_service(options), options.ready)


def _work(options: argparse.Namespace) -> int:
    worker = Worker(_service(options))
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, worker.stop)
    status = worker.run()
    # Not waiting for uploads that hang: what arrived of them is found by looking at the next start.
    sys.stderr.flush()
    os._exit(status)


def _run(options: argparse.Namespace) -> int:
    """Both services as processes of their own; one that ends is started again."""
    _service(options)
    ready = ["--ready", str(options.ready)] if options.ready else []
    services = {name: [sys.executable, "-m", "relay_agent", name, "--config", str(options.config), *more]
                for name, more in (("receive", ready), ("work", []))}
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopping.append(n))
    running = {name: subprocess.Popen(command) for name, command in services.items()}
    started = dict.fromkeys(services, time.monotonic())
    while not stopping:
        time.sleep(0.1)
        for name, process in running.items():
            if process.poll() is None:
                continue
            if time.monotonic() - started[name] < 5:  # it cannot start: its own message said why
                stopping.append(process.returncode)
                break
            running[name], started[name] = subprocess.Popen(services[name]), time.monotonic()
    failed = any(process.poll() not in (None, 0) for process in running.values())
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()
    return FINDINGS if failed else DONE


def _check(options: argparse.Namespace) -> int:
    ok = True
    found = []
    console = report.console()
    for finding in check.run(load(options), offline=options.offline):
        ok = ok and finding.ok
        if options.json:
            found.append(asdict(finding))
            continue
        console.print("[green]ok[/]      " if finding.ok else "[red]finding[/] ", escape(finding.what), sep="",
                      soft_wrap=True)
        if not finding.ok and finding.remedy:
            console.print(f"        → {escape(finding.remedy)}", soft_wrap=True)
    if options.json:
        print_json(found)
    return DONE if ok else FINDINGS


def _status(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    found = report.status(settings, ledger)
    if options.json:
        print_json(found)
    else:
        report.print_status(report.console(), found)
    return DONE if found["balance"]["difference"] == 0 else FINDINGS


def _list(options: argparse.Namespace) -> int:
    _, ledger = open_ledger(options)
    if options.quarantined:
        rows = report.quarantined(ledger, options.limit)
    else:
        rows = report.shipments(ledger, options.state, options.limit)
    if options.json:
        print_json(rows)
    else:
        report.print_rows(report.console(), rows, "nothing to show")
    return DONE


def _show(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    found = report.shipment(ledger, options.shipment)
    if found is None:
        raise review.Refused(f"there is no shipment {options.shipment}; see relay-agent list")
    changes = preview.changes(settings, ledger, options.shipment) if options.changes and not found["raw"] else None
    if options.json:
        print_json(found | (cli_review.with_count(changes) if changes is not None else {}))
        return DONE
    report.print_shipment(report.console(), found, options.changes)
    if changes is not None:
        cli_review.print_changes(report.console(), changes)
    return DONE


def _assign(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    if options.to is not None:
        review.assign_raw(ledger, options.shipment, actor(), options.to, options.series)
        return said(f"shipment {options.shipment} belongs to shipment {options.to} now and goes after it")
    labels = {name: getattr(options, name) for name in ("project", "subject", "session", "accession", "route")}
    if not any(labels.values()):
        raise review.Refused("say what to assign: --project, --subject, --session, --accession or --route; of raw data "
                             "--to")
    review.assign(settings, ledger, options.shipment, actor(), **labels)
    return said(f"shipment {options.shipment} is assigned and will be routed again")


def _release(options: argparse.Namespace) -> int:
    review.release(open_ledger(options)[1], options.shipment, actor())
    return said(f"shipment {options.shipment} is released")


def _reject(options: argparse.Namespace) -> int:
    review.reject(open_ledger(options)[1], options.shipment, actor(), options.reason)
    return said(f"shipment {options.shipment} is rejected; its files are kept (relay-agent retry takes it back)")


def _retry(options: argparse.Namespace) -> int:
    ledger = open_ledger(options)[1]
    if options.quarantined:
        review.retry_quarantined(ledger, options.shipment, actor())
        return said(f"instance {options.shipment} will be looked at again")
    review.retry(ledger, options.shipment, actor())
    return said(f"shipment {options.shipment} will be tried again now")


def _receipt(options: argparse.Namespace) -> int:
    _, ledger = open_ledger(options)
    if options.verify:
        faults = list(receipt.faults(ledger))
        count = ledger.value("SELECT count(*) FROM receipt")
        if options.json:
            print_json({"receipts": count, "faults": faults})
        else:
            print("\n".join(faults) or f"{count} receipts, none removed or edited")
        return FINDINGS if faults else DONE
    if options.shipment is None:
        raise review.Refused("say which shipment, or --verify for the whole chain")
    if not ledger.value("SELECT 1 FROM shipment WHERE id = ?", options.shipment):
        raise review.Refused(f"there is no shipment {options.shipment}; see relay-agent list")
    found = [receipt.read(row) for row in ledger.all("SELECT * FROM receipt WHERE shipment = ? ORDER BY id",
                                                     options.shipment)]
    if options.json:
        print_json(found)
    else:
        report.print_receipts(report.console(), found)
    return DONE if found else FINDINGS


def _upload(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    title = options.receiver or settings.receiver[0].ae_title
    receiver = next((r for r in settings.receiver if r.ae_title == title), None)
    if receiver is None:
        raise review.Refused(f"there is no receiver {title}; the configuration has "
                             f"{', '.join(r.ae_title for r in settings.receiver)}")
    sources = {source.name: source for source in settings.kspace.source}
    if options.source is not None and options.source not in sources:
        raise review.Refused(f"there is no source {options.source}; the configuration has "
                             f"{', '.join(sources) or 'none (kspace.source)'}")
    spool = Spool(settings.spool, settings.receive.reserve)
    files = [(file, file.relative_to(path if path.is_dir() else path.parent)) for path in options.path
             for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not file.is_dir()]
    taken: int = 0
    problem: str | None
    problems: list[dict[str, str]] = []
    console = report.console(stderr=True)
    with Progress(console=console, transient=True, disable=options.json or not console.is_terminal) as progress:
        bar = progress.add_task("taking in", total=len(files))
        for file, below in files:
            try:
                raw = options.source or pickup.is_raw(file)
                if raw and not sources:
                    problem = "raw k-space data, and there is no source of them; add a [[kspace.source]]"
                elif raw:
                    source = sources[options.source or next(iter(sources))]
                    problem = pickup.upload(file, below, source, settings, ledger)
                else:
                    problem = stage.take_in(file, receiver.name, spool, ledger, "upload")
            except OSError as error:
                problem = f"cannot be taken in: {error.strerror}"
            taken += problem is None
            if problem:
                problems.append({"file": str(file), "problem": problem})
            progress.advance(bar)
    if options.json:
        print_json({"files": len(files), "taken": taken, "problems": problems})
    else:
        for entry in problems:
            print(f"{entry['file']}: {entry['problem']}")
        print(f"{taken} of {len(files)} files were taken in; they go on when their sessions are quiet")
    return DONE if taken == len(files) and files else FINDINGS


def _identify(options: argparse.Namespace) -> int:
    settings = load(options).identify if options.config.exists() else Identify()
    rules = settings.rules()
    found: list[dict[str, Any]] = []
    for file in options.file:
        try:
            identity = identify(read_header(file, needed_tags(rules)), rules, known_project(settings))
            found.append({"file": str(file), **asdict(identity)})
        except (dicom.NotDICOM, RuleValueError) as error:
            found.append({"file": str(file), "error": str(error)})
        except OSError as error:
            found.append({"file": str(file), "error": error.strerror})
    if options.json:
        print_json(found)
    else:
        report.print_rows(report.console(), [
            {**{key: value for key, value in row.items() if key != "sources"},
             **({"from": ", ".join(f"{name}: {source}" for name, source in row["sources"].items())}
                if "sources" in row else {})} for row in found], "no files")
    return FINDINGS if any("error" in row for row in found) else DONE
