"""What state disks, mirrors, pool and boot partitions are in, and what of it asks for a person."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay_disk import boot, box, pool
from relay_disk import key as keys
from relay_disk.disks import Disk, human, scan
from relay_disk.plan import candidates
from relay_disk.run import Failed, ask

_SCRUB_DAYS, _FULL = 45, 85


@dataclass(frozen=True)
class Leaf:
    """A device of the pool: its group (``vdevs``, ``logs``, ``l2cache``), ZFS's GUID, path and state."""

    group: str
    guid: str
    path: str
    state: str
    errors: int


def leaves(state: dict[str, Any]) -> list[Leaf]:
    """Every device of the pool."""
    found: list[Leaf] = []

    def walk(entry: dict[str, Any], group: str) -> None:
        inner = entry.get("vdevs") or {}
        for below in inner.values():
            walk(below, group)
        if not inner:
            errors = sum(int(entry.get(kind) or 0) for kind in ("read_errors", "write_errors", "checksum_errors"))
            found.append(Leaf(group, str(entry["guid"]), str(entry.get("path") or entry["name"]), str(entry["state"]),
                              errors))

    for group in ("vdevs", "logs", "l2cache"):
        for entry in (state.get(group) or {}).values():
            walk(entry, group)
    return found


@dataclass(frozen=True)
class Array:
    """A software mirror of the OS."""

    path: str
    wanted: int
    degraded: int
    doing: str


def arrays(disks: list[Disk]) -> list[Array]:
    """The arrays on these disks."""
    found = []
    for path in sorted({array for disk in disks for array in disk.arrays}):
        folder = Path("/sys/block") / Path(path).resolve().name / "md"
        degraded, wanted, doing = ((folder / name).read_text().strip()
                                   for name in ("degraded", "raid_disks", "sync_action"))
        found.append(Array(path, int(wanted), int(degraded), "" if doing == "idle" else doing))
    return found


def progress(state: dict[str, Any]) -> str:
    """What a scrub or resilver under way has done, in words."""
    scan_stats = state.get("scan_stats") or {}
    if scan_stats.get("state") != "SCANNING":
        return ""
    done, whole = int(scan_stats.get("issued") or 0), int(scan_stats.get("to_examine") or 0)
    return f"{str(scan_stats['function']).lower()} {100 * done // max(1, whole)} % of {human(whole)}"


def status() -> dict[str, Any]:
    """All of it, for programs; ``findings`` are sentences for people."""
    disks = scan()
    relay = box.own(disks)
    own = [disk for disk in disks if disk.relay == relay]
    told: dict[str, Any] = {"relay": relay, "disks": [_disk(disk) for disk in own], "findings": []}
    told["spare"] = [_disk(disk) for disk in candidates(disks) if disk not in own]
    told["arrays"] = [vars(array) for array in arrays(own)]
    told["boot"] = {disk.serial: boot.digest(part.path) for disk in own if (part := boot.esp(disk))}
    told["key"] = "open" if keys.OPEN_KEY.exists() else "sealed"
    told["secure_boot"] = keys.secure_boot()
    if pool.imported():
        state = pool.state()
        told["pool"] = {"state": state["state"], "locked": pool.locked(), "errors": int(state.get("error_count") or 0),
                        "doing": progress(state), "scrubbed": _scrubbed(state), "capacity": _capacity(),
                        "recovery": bool(pool.get(pool.RECOVERY)), "sealed": bool(pool.get(pool.SEALED)),
                        "devices": [vars(leaf) for leaf in leaves(state)]}
    told["findings"] = list(findings(told, time.time()))
    return told


def findings(told: dict[str, Any], now: float) -> Iterator[str]:
    """What asks for a person, each with what to do."""
    for array in told["arrays"]:
        if array["degraded"]:
            yield f"the mirror of the OS lacks {array['degraded']} SSD: put in a new one and run relay-disk replace"
    if len({digest for digest in told["boot"].values()}) > 1 or "" in told["boot"].values():
        yield "boot partitions differ: one SSD alone may not start the box; run relay-disk boot"
    if told["key"] == "open":
        yield "the key lies in the open on the OS disk: a stolen disk can be read"
    if "pool" in told:
        yield from _of_pool(told["pool"], now)
    else:
        yield "the pool is not here: see systemctl status relay-pool"


def _of_pool(here: dict[str, Any], now: float) -> Iterator[str]:
    if here["locked"]:
        yield "the pool is locked: relay-disk unlock"
    for leaf in here["devices"]:
        if leaf["state"] != "ONLINE":
            yield f"{leaf['path']} is {leaf['state']}: put in a new disk and run relay-disk replace"
        elif leaf["errors"]:
            yield f"{leaf['path']} had {leaf['errors']} errors: look at SMART, replace it if they grow"
    if here["state"] != "ONLINE" and all(leaf["state"] == "ONLINE" for leaf in here["devices"]):
        yield f"the pool is {here['state']}: zpool status -v"
    if here["errors"]:
        yield f"{here['errors']} files or blocks of the pool are damaged: zpool status -v names them"
    if here["scrubbed"] is not None and now - here["scrubbed"] > _SCRUB_DAYS * 86400:
        days = (now - here["scrubbed"]) / 86400
        yield f"the last scrub was {days:.0f} days ago: is zfs-scrub-monthly@relay.timer enabled?"
    if here["capacity"] >= _FULL:
        yield f"the pool is {here['capacity']} % full"
    if not here["recovery"]:
        yield "there is no recovery key: if this machine fails, its data are lost"


def _disk(disk: Disk) -> dict[str, Any]:
    return {"serial": disk.serial, "model": disk.model, "size": disk.size, "kind": disk.kind, "path": disk.path,
            "roles": [part.role for part in disk.parts if part.role], "holds": disk.holds}


def _scrubbed(state: dict[str, Any]) -> int | None:
    """When the last scrub ended, seconds since 1970; None when there was none yet."""
    stats = state.get("scan_stats") or {}
    if stats.get("function") == "SCRUB" and stats.get("state") == "FINISHED":
        return int(stats["end_time"])
    return None


def _capacity() -> int:
    return int(ask("zpool", "list", "-Hpo", "capacity", pool.POOL))


def text(told: dict[str, Any]) -> str:
    """For people."""
    lines = [f"relay {told['relay']}"]
    for group, disks in (("disk", told["disks"]), ("not in use", told["spare"])):
        lines += [f"  {group}: {disk['kind']} {human(disk['size'])}, {disk['model']}, serial number {disk['serial']}: "
                  f"{', '.join(disk['roles']) or disk['holds']}" for disk in disks]
    lines += [f"  mirror of the OS: {array['wanted'] - array['degraded']} of {array['wanted']} SSDs"
              + (f", {array['doing']}" if array["doing"] else "") for array in told["arrays"]]
    here = told.get("pool")
    if here:
        words = [here["state"], "locked" if here["locked"] else "open", f"{here['capacity']} % full", here["doing"]]
        lines.append("  pool: " + ", ".join(word for word in words if word))
    sealed = "sealed to the TPM, Secure Boot " + ("on" if told["secure_boot"] else "off")
    lines.append("  key: " + ("in the open on the OS disk" if told["key"] == "open" else sealed))
    lines += [f"  ! {finding}" for finding in told["findings"]] or ["  nothing to do"]
    return "\n".join(lines)


def check_own() -> list[Disk]:
    """The disks of the relay that this system runs from."""
    disks = scan()
    relay = box.own(disks)
    found = [disk for disk in disks if disk.relay == relay]
    if not found:
        raise Failed("no disk of this relay is here")
    return found
