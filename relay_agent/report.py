"""What the ledger says, as data for ``--json`` and as tables for people."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from relay_agent import __version__
from relay_agent.config import Config
from relay_agent.destinations import tokens
from relay_agent.kspace import account
from relay_agent.ledger import Ledger, State, balance
from relay_agent.units import show_duration, show_size


def status(config: Config, ledger: Ledger) -> dict[str, Any]:
    """The balance, what waits where, and what an operator should look at."""
    sums = balance(ledger)
    now = time.time()
    disk = shutil.disk_usage(config.data)
    newest = ledger.one("SELECT arrived FROM instance ORDER BY id DESC LIMIT 1")
    return {
        "box": config.name, "agent": __version__, "at": when(now),
        "balance": {**asdict(sums), "difference": sums.difference},
        "repeated": ledger.value("SELECT value FROM tally WHERE name = 'repeated'"),
        "conflicts": ledger.value("SELECT count(*) FROM instance WHERE conflict IS NOT NULL"),
        "last_received": when(newest["arrived"]) if newest else None,
        "last_delivered": when(ledger.value("SELECT at FROM receipt ORDER BY id DESC LIMIT 1")),
        "associations": [dict(row) for row in ledger.all(
            "SELECT receiver, calling_ae, count(*) AS open FROM association WHERE closed IS NULL "
            "GROUP BY receiver, calling_ae")],
        "shipments": {row["state"]: {"shipments": row["n"], "instances": row["i"], "bytes": row["b"]}
                      for row in ledger.all("SELECT state, count(*) AS n, sum(instances) AS i, sum(bytes) AS b "
                                            "FROM shipment WHERE kind = 'session' GROUP BY state")},
        "kspace": account.status(config, ledger, now),
        "destinations": [_destination(config, ledger, destination.name, now) for destination in config.destination],
        "alerts": [{**dict(row), "since": when(row["since"])} for row in ledger.all(
            "SELECT condition, subject, since, text FROM alert ORDER BY since")],
        "disk": {"free": disk.free, "total": disk.total, "reserve": config.receive.reserve},
    }


def _destination(config: Config, ledger: Ledger, name: str, now: float) -> dict[str, Any]:
    counts = {row["state"]: row["n"] for row in ledger.all(
        "SELECT d.state, count(*) AS n FROM delivery d WHERE d.destination = ? GROUP BY d.state", name)}
    worst = ledger.one("SELECT error, failing_since FROM delivery WHERE destination = ? AND state <> 'verified' AND "
                       "error IS NOT NULL ORDER BY changed DESC LIMIT 1", name)
    oldest = ledger.value("SELECT min(s.opened) FROM delivery d JOIN shipment s ON s.id = d.shipment "
                          "WHERE d.destination = ? AND d.state IN ('waiting', 'arrived', 'stopped')", name)
    return {"name": name, **{state: counts.get(state, 0) for state in ("waiting", "arrived", "stopped", "verified")},
            "oldest_undelivered_seconds": round(now - oldest) if oldest else None,
            "token_expires": when(tokens.expiry(config.data, name)),
            "failing_since": when(worst["failing_since"]) if worst and worst["failing_since"] else None,
            "error": worst["error"] if worst else None}


def shipments(ledger: Ledger, states: Sequence[str] | None, limit: int) -> list[dict[str, Any]]:
    """Shipments, newest first."""
    states = states or list(State)
    rows = ledger.all(f"SELECT * FROM shipment WHERE state IN ({', '.join('?' * len(states))}) "
                      "ORDER BY id DESC LIMIT ?", *states, limit)
    return [{"shipment": row["id"], "kind": row["kind"], "state": row["state"], "receiver": row["receiver"],
             "supplement": row["supplement"], "instances": row["instances"], "bytes": row["bytes"],
             "project": row["project"], "subject": row["subject"], "session": row["session"],
             "last_arrival": when(row["last_arrival"]), "reason": row["reason"]} for row in rows]


def quarantined(ledger: Ledger, limit: int) -> list[dict[str, Any]]:
    """Quarantined instances and files, newest first."""
    rows = ledger.all("SELECT * FROM instance WHERE problem IS NOT NULL ORDER BY id DESC LIMIT ?", limit)
    return [{"instance": row["id"], "receiver": row["receiver"], "from": row["calling_ae"] or row["via"],
             "arrived": when(row["arrived"]), "bytes": row["size"], "reason": row["problem"], "file": row["path"]}
            for row in rows]


def shipment(ledger: Ledger, number: int) -> dict[str, Any] | None:
    """Everything about one shipment; None when there is none of that number."""
    row = ledger.one("SELECT * FROM shipment WHERE id = ?", number)
    if row is None:
        return None
    series = ledger.all(
        "SELECT series_uid, series_number, modality, count(*) AS instances, sum(size) AS bytes, sum(copies - 1) AS "
        "repeated, group_concat(DISTINCT calling_ae) AS calling_ae, group_concat(DISTINCT via) AS via "
        "FROM instance WHERE shipment = ? GROUP BY series_uid ORDER BY min(id)", number)
    conflicts = ledger.all(
        "SELECT i.id AS instance, i.sop_instance, i.conflict AS older_instance, o.shipment AS older_shipment FROM "
        "instance i JOIN instance o ON o.id = i.conflict WHERE i.shipment = ?", number)
    related = ledger.all("SELECT id AS shipment, supplement, state, instances FROM shipment WHERE study_uid = ? AND "
                         "receiver = ? AND id <> ? ORDER BY supplement", row["study_uid"], row["receiver"], number)
    return {
        "shipment": number, "kind": row["kind"], "state": row["state"], "reason": row["reason"],
        "study": row["study_uid"] if row["kind"] == "session" else None,
        "receiver": row["receiver"], "supplement": row["supplement"], "route": row["route"],
        "project": row["project"], "subject": row["subject"], "session": row["session"],
        "auto_archive": None if row["auto_archive"] is None else bool(row["auto_archive"]),
        "sources": json.loads(row["sources"] or "{}"), "instances": row["instances"], "bytes": row["bytes"],
        "opened": when(row["opened"]), "last_arrival": when(row["last_arrival"]),
        "raw": account.raw(ledger, number),
        "series": [dict(part) for part in series if part["series_uid"]],
        "deliveries": [{**dict(part), "changed": when(part["changed"]), "due": when(part["due"]),
                        "failing_since": when(part["failing_since"])}
                       for part in ledger.all("SELECT * FROM delivery WHERE shipment = ?", number)],
        "conflicts": [dict(part) for part in conflicts],
        "related": [dict(part) for part in related],
        "history": [{"at": when(part["at"]), "actor": part["actor"], "what": part["what"]} for part in
                    ledger.all("SELECT * FROM event WHERE shipment = ? ORDER BY id", number)],
    }


def when(seconds: float | None) -> str | None:
    """A moment for people and for JSON (ISO 8601, local time); None for never."""
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def console(stderr: bool = False) -> Console:
    """A console; wide where nobody is looking, so that tables stay whole in files and pipes."""
    found = Console(highlight=False, stderr=stderr)
    if not found.is_terminal:
        found.width = 160
    return found


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]], nothing: str, title: str | None = None) -> None:
    """A table with a column for each key."""
    if not rows:
        console.print(nothing)
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold",
                         justify="right" if all(isinstance(row.get(column), int | None) for row in rows) else "left")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    console.print(table)


def told(value: str | None) -> str:
    """A value of an element for people: one that is absent is not the same as one that is empty."""
    return "(absent)" if value is None else value


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("bytes", "sent", "sent_size"):
        return show_size(value)
    return escape(str(value))


def print_status(console: Console, found: Mapping[str, Any]) -> None:
    """The status as a page."""
    sums = found["balance"]
    console.print(f"[bold]{found['box']}[/], agent {found['agent']}, {found['at']}; last received: "
                  f"{found['last_received'] or 'never'}")
    equation = (f"received {sums['received']} = delivered {sums['delivered']} + held {sums['held']} + quarantined "
                f"{sums['quarantined']} + rejected {sums['rejected']} + on its way {sums['on_its_way']}")
    if sums["difference"]:
        console.print(f"[red]ALARM: the ledger does not balance, {sums['difference']} instances are unaccounted for: "
                      f"{equation}[/]", soft_wrap=True)
    else:
        console.print(f"{equation}  [green]balances[/]", soft_wrap=True)
    console.print(f"received again with the same bytes: {found['repeated']}; conflicts (same UID, other bytes): "
                  f"{found['conflicts']}; free space: {show_size(found['disk']['free'])}")
    print_rows(console, [{"state": state, **counts} for state, counts in found["shipments"].items()],
               "no shipments", "\nshipments")
    if found["kspace"]:
        _print_kspace(console, found["kspace"])
    rows = [{**row, "oldest_undelivered_seconds": None} | {
        "oldest": show_duration(row["oldest_undelivered_seconds"]) if row["oldest_undelivered_seconds"] else None}
        for row in found["destinations"]]
    print_rows(console, [{k: v for k, v in row.items() if k != "oldest_undelivered_seconds"} for row in rows],
               "no destinations", "\ndestinations")
    if found["associations"]:
        print_rows(console, found["associations"], "", "\nopen associations")
    for alarm in found["alerts"]:
        console.print(f"[yellow]{alarm['condition']} ({alarm['subject']}) since {alarm['since']}:[/] {alarm['text']}",
                      soft_wrap=True)


def _print_kspace(console: Console, found: Mapping[str, Any]) -> None:
    """Raw data, apart from the sessions."""
    print_rows(console, [{"state": state, **counts} for state, counts in found["states"].items()], "\nno raw data",
               "\nraw data")
    console.print(f"room for raw data: {show_size(found['room'])}; produced {show_size(found['a_day'])} a day, "
                  f"{show_size(found['expected'])} expected before they can leave", soft_wrap=True)
    print_rows(console, [{
        "source": row["name"], "in_landing": row["in_landing"], "not raw by name": row["not_raw_by_name"],
        "not_fetched": row["not_fetched"], "bytes": row["not_fetched_bytes"],
        "oldest": _lasting(row["oldest_not_fetched_seconds"]),
        "overwritten in": _lasting(row["overwritten_in_seconds"]),
    } for row in found["sources"]], "no sources")
    for row in found["clocks"]:
        console.print(f"clock of scanner {row['scanner']}: DICOM is {row['offset_seconds']:+.1f} s against raw data, "
                      f"from {row['pairs']} pairs (spread {row['spread_seconds']:.1f} s)")


def _lasting(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return show_duration(seconds) if seconds > 0 else "overdue"


def print_raw(console: Console, found: Mapping[str, Any], replaced: bool = False) -> None:
    """What is known of raw data; with ``replaced`` also where what was replaced."""
    console.print(f"{'raw data':>13}: {found['file']}, {found['verdict']}"
                  + (f" ({found['problem']})" if found["problem"] else "")
                  + (", an adjustment of the scanner" if found["adjustment"] else ""), soft_wrap=True)
    to = f"shipment {found['session_shipment']}, " + (f"series {found['series']}" if found["series"] else
                                                      "the session as a whole") if found["session_shipment"] else "none"
    console.print(f"{'belongs to':>13}: {to} ({found['match'] or 'not matched yet'}"
                  + (f", score {found['score']}" if found["score"] is not None else "") + ")", soft_wrap=True)
    report = found["report"]
    if report is not None:
        done = (f"scrubbed, {sum(part['count'] for part in report['replaced'])} values replaced; {report['protocol']}, "
                f"software {report['version']}" if report["scrubbed"] else "as it came: nothing was de-identified")
        console.print(f"{'leaves':>13}: {escape(done)}", soft_wrap=True)
    if replaced and report is not None:
        print_rows(console, report.get("replaced", ()), "nothing was replaced", "\nreplaced")
    if found["candidates"]:
        print_rows(console, [{"shipment": one["shipment"], "score": one["score"], "why": ", ".join(one["reasons"]),
                              "series": ", ".join(str(each["number"]) for each in one["series"])}
                             for one in found["candidates"]], "", "\ncandidates")


def print_shipment(console: Console, found: Mapping[str, Any], replaced: bool = False) -> None:
    """One shipment as a page; see :func:`print_raw`."""
    for key in ("shipment", "kind", "state", "reason", "study", "receiver", "supplement", "route", "project", "subject",
                "session", "auto_archive", "instances", "opened", "last_arrival"):
        if found[key] is not None:
            source = found["sources"].get(key)
            console.print(f"{key.replace('_', ' '):>13}: {_cell(key, found[key])}" + (f"  (from {source})" if source
                                                                                      else ""), soft_wrap=True)
    if found["raw"]:
        print_raw(console, found["raw"], replaced)
        if found["state"] == State.WAITING and not found["raw"]["session_shipment"]:
            console.print(f"{'waits until':>13}: {when(found['raw']['deadline'])}, then for a person")
    deliveries = [{key: value for key, value in row.items() if key != "shipment"} for row in found["deliveries"]]
    for key, rows in (("series", found["series"]), ("deliveries", deliveries), ("conflicts", found["conflicts"]),
                      ("related", found["related"]), ("history", found["history"])):
        if rows:
            print_rows(console, rows, "", f"\n{key}")


def print_receipts(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """Receipts as pages."""
    if not found:
        console.print("no receipt yet: nothing of this shipment is verified")
    for page in found:
        console.print(f"[bold]receipt {page['receipt']}[/] shipment {page['shipment']} at {page['destination']}, "
                      f"verified {when(page['verified_at'])}, agent {page['agent']}")
        console.print(f"  study {page['study']}\n  {page['location']}\n  hash {page['hash']}\n  follows "
                      f"{page['previous']}", soft_wrap=True)
        ways = [instance["proved_by"] for instance in page["instances"]]
        counted = ", ".join(f"{ways.count(way)} by {way}" for way in dict.fromkeys(ways))
        console.print(f"  {len(ways)} instances proved: {counted}")
        rows = [{"SOP Instance UID, or file": i["sop_instance"], "sent SHA-256": i["sent_sha256"][:16] + "…",
                 "sent_size": i["sent_size"], "proved_by": i["proved_by"]} for i in page["instances"][:10]]
        print_rows(console, rows, "")
        if len(ways) > 10:
            console.print(f"  … and {len(ways) - 10} more; --json shows all")
