"""``relay-agent backup``, ``restore`` and ``self-test``: what an update of the box needs, and its retirement."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from relay_agent import selftest, snapshot
from relay_agent.console import DONE, FINDINGS, commands_of, load, open_ledger, said


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    command = commands_of(commands)
    sub = command("backup", _backup, "write a whole copy of the ledger, while it is in use",
                  "backup /var/lib/relay-agent/ledger.before")
    sub.add_argument("file", type=Path)
    sub = command("restore", _restore, "put a copy in the place of a ledger that this release cannot read",
                  "restore /var/lib/relay-agent/ledger.before")
    sub.add_argument("file", type=Path)
    sub = command("self-test", _self_test, "send an invented image through this box and wait for the proof of arrival",
                  "self-test --patience 120")
    sub.add_argument("--patience", type=float, default=300.0, metavar="SECONDS",
                     help="how long delivery may take once the session is complete (default: %(default).0f)")


def _backup(options: argparse.Namespace) -> int:
    snapshot.take(load(options).ledger, options.file)
    return said(f"the ledger was written to {options.file}")


def _restore(options: argparse.Namespace) -> int:
    kept = snapshot.restore(load(options).ledger, options.file)
    if kept is None:
        return said("nothing to restore: this release can read the ledger")
    return said(f"the ledger is that of {options.file}; the one before is kept as {kept}. What was received since is "
                "entered again from the files when the receiver starts")


def _self_test(options: argparse.Namespace) -> int:
    settings, ledger = open_ledger(options)
    try:
        where = selftest.deliver(settings, ledger, options.patience)
    except selftest.Failed as failed:
        print(failed)
        return FINDINGS
    print(f"delivered and proved: {where}")
    return DONE
