"""``relay-disk``: the one tool that knows the disks of a relay box."""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import os
import secrets
import sys
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from relay_disk import box, conf, install, pool, replace, rescue, retire, status
from relay_disk.disks import scan
from relay_disk.plan import decide
from relay_disk.run import Failed, Refused, log


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 findings or failed, 2 wrong use, 3 refused and nothing changed."""
    parsed = _parser().parse_args(arguments)
    log.setLevel(logging.DEBUG)
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.DEBUG if parsed.verbose else logging.INFO)
    shown.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(shown)
    if os.geteuid():
        print("relay-disk: only root sees disks; use sudo", file=sys.stderr)
        return 2
    try:
        return int(parsed.run(parsed) or 0)
    except Refused as refusal:
        print(f"relay-disk: refused: {refusal}", file=sys.stderr)
        return 3
    except Failed as error:
        print(f"relay-disk: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relay-disk", description=__doc__, allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="show every command, also those that only ask")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    plan = verb("plan", _plan, "show what an installation would do; changes nothing")
    plan.add_argument("--conf", type=Path, help="an install.conf; without it, the profile follows the disks")
    plan.add_argument("--wipe", default="", help="serial numbers whose content may go, with commas")
    plan.add_argument("--json", action="store_true")
    verb("install", lambda _: install.unattended(), "install onto this machine; only from the stick")
    verb("open", lambda _: box.open_pool(), "open the pool, as the box does at its start")
    unlock = verb("unlock", _unlock, "open the pool with the recovery key, given on standard input")
    unlock.add_argument("--read-only", action="store_true", help=f"for rescue: below {rescue.PLACE}, changes nothing")
    unlock.add_argument("--relay", default="", help="which one, when disks of several are here")
    verb("seal", lambda _: box.seal(_key()), "seal the key to this machine's TPM as it is now; needs the recovery key")
    verb("recovery", lambda _: print(box.recovery(), end=""), "show the recovery key, encrypted by age")
    told = verb("status", _status, "disks, mirrors, pool, boot partitions, key; status 1: something is to be done")
    told.add_argument("--json", action="store_true")
    swap = verb("replace", _replace, "put a new disk in the place of one that failed")
    swap.add_argument("--wipe", default="", help="serial numbers whose content may go, with commas")
    swap.add_argument("--plan", action="store_true", help="only show")
    swap.add_argument("--wait", action="store_true", help="show progress until the new disk is in step")
    verb("boot", _boot, "bring all boot partitions to the state of one").add_argument(
        "image", type=Path, nargs="?", help="a new image for all of them")
    quota = verb("budget", _budget, "set what DICOM and raw data may take of the pool")
    quota.add_argument("--data-share", type=int, default=conf.Conf.data_share, help="per cent that DICOM is sure of")
    quota.add_argument("--kspace-share", type=int, default=conf.Conf.kspace_share, help="per cent for raw data at most")
    end = verb("retire", _retire, "the end of this box: destroy its key and its pool; nothing brings them back")
    end.add_argument("relay", help="the id of this box, as relay-disk status shows it")
    verb("show", lambda _: print(rescue.show()), "rescue: every disk and what is on it")
    check = verb("check", _check, "rescue: look for faults; changes nothing and needs no key")
    check.add_argument("--relay", default="")
    copy = verb("copy", _copy, "rescue: bring away, encrypted, what was not delivered")
    copy.add_argument("target", type=Path, help="a folder on another disk")
    copy.add_argument("--recipient", action="append", default=[], help="age public key of the coordinating site")
    copy.add_argument("--all", action="store_true", help="also what was delivered")
    verb("close", lambda _: rescue.close(), "rescue: let the pool go")
    return parser


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in text.split(",") if word)


def _key() -> str:
    return getpass.getpass("recovery key: ") if sys.stdin.isatty() else sys.stdin.read()


def _plan(parsed: argparse.Namespace) -> None:
    told = conf.read(parsed.conf.read_text()) if parsed.conf else conf.Conf()
    told = changed(told, wipe=told.wipe | _words(parsed.wipe))
    plan = decide(scan(), told, lambda: secrets.token_hex(4))
    print(json.dumps(plan.as_json(), indent=2) if parsed.json else plan)


def _unlock(parsed: argparse.Namespace) -> None:
    if parsed.read_only:
        print(f"open below {rescue.unlock(_key(), parsed.relay)}, read-only; afterwards: relay-disk close")
    else:
        box.unlock(_key())


def _status(parsed: argparse.Namespace) -> int:
    told = status.status()
    print(json.dumps(told, indent=2) if parsed.json else status.text(told))
    return int(bool(told["findings"]))


def _replace(parsed: argparse.Namespace) -> None:
    replace.replace(_words(parsed.wipe), not parsed.plan)
    if parsed.wait and not parsed.plan:
        replace.wait()


def _boot(parsed: argparse.Namespace) -> None:
    replace.level(status.check_own(), image=parsed.image)


def _budget(parsed: argparse.Namespace) -> None:
    print("changed" if pool.budget(parsed.data_share, parsed.kspace_share) else "as it was")


def _retire(parsed: argparse.Namespace) -> None:
    print("\n".join(retire.retire(parsed.relay)))


def _check(parsed: argparse.Namespace) -> int:
    faults = rescue.check(parsed.relay)
    print("\n".join(faults) or "no fault found")
    return int(bool(faults))


def _copy(parsed: argparse.Namespace) -> None:
    below = rescue.PLACE if rescue.PLACE.exists() else Path("/")
    path = rescue.copy(below, parsed.target, parsed.recipient, parsed.all)
    print(f"{path}: {path.stat().st_size} bytes")
