"""What disks there are, known by serial number, size, transport and rotation; never by the name of the day."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relay_disk.run import ask

# Names of our partitions: relay-<id of the installation>-<role>. While it is being installed, the role of the EFI
# system partition is "installing"; "keeping" when the pool that is there stays.
NAME = re.compile(r"relay-([0-9a-f]{8})-(esp|installing|keeping|root|log|cache|pool)")
STICK = "relay-image"
# Only with NAME does lsblk put partitions below their disks.
_COLUMNS = "NAME,PATH,TYPE,SIZE,ROTA,TRAN,SERIAL,MODEL,RM,RO,PTTYPE,FSTYPE,UUID,PARTLABEL,MOUNTPOINTS"
_EDGE = 16 * 2**20
_TABLE = 24 * 2**10  # at both ends of the disk: a GPT, also one with sectors of 4096 bytes
_SAMPLES = 1024
# The first that a disk has; all of them but the last hold model and serial number, which people can compare.
_PREFERRED = ("ata-", "nvme-", "scsi-S", "virtio-", "usb-", "wwn-")


@dataclass(frozen=True)
class Part:
    """A partition: number, GPT name, bytes, and what is in it (``content``, ``uuid`` as blkid says)."""

    number: int
    path: str
    name: str
    size: int
    content: str
    uuid: str = ""

    @property
    def relay(self) -> str:
        """Id of the installation it belongs to; empty when it is not ours."""
        found = NAME.fullmatch(self.name)
        return found[1] if found else ""

    @property
    def role(self) -> str:
        """What it is to that installation."""
        found = NAME.fullmatch(self.name)
        return found[2] if found else ""


@dataclass(frozen=True)
class Disk:
    """A whole disk; ``id`` is its path below ``/dev/disk/by-id``, ``used`` who has it open now (mounts, arrays)."""

    path: str
    id: str
    serial: str
    model: str
    size: int
    rotating: bool
    transport: str
    removable: bool = False
    read_only: bool = False
    table: str = ""
    content: str = ""
    parts: tuple[Part, ...] = ()
    used: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()
    empty: bool = False

    @property
    def relay(self) -> str:
        """Id of the installation that it belongs to; empty when none or more than one."""
        found = {part.relay for part in self.parts}
        return found.pop() if len(found) == 1 else ""

    def part(self, role: str) -> Part | None:
        """Our partition with that role."""
        return next((part for part in self.parts if part.role == role), None)

    def partition(self, number: int) -> str:
        """Stable path of a partition, whether or not it is there yet."""
        return f"{self.id}-part{number}"

    @property
    def kind(self) -> str:
        """In words."""
        return "disk" if self.rotating else "NVMe SSD" if self.transport == "nvme" else "SSD"

    @property
    def holds(self) -> str:
        """What is on it, in words for people."""
        if self.empty:
            return "blank"
        if self.relay:
            roles = {part.role for part in self.parts}
            state = "installation not finished" if roles & {"installing", "keeping"} else "relay"
            return f"{state} {self.relay}"
        inside = ", ".join(sorted({part.content for part in self.parts if part.content}))
        if self.parts:
            return f"{len(self.parts)} partition{'s'[:len(self.parts) > 1]}" + (f" ({inside})" if inside else "")
        return self.content or (f"an empty {self.table} table" if self.table else "data without a known form")

    def __str__(self) -> str:
        """As people compare it with the label on the disk."""
        return f"{self.kind} {human(self.size)}, {self.model or 'no model'}, serial number {self.serial or 'none'}"


def human(size: int) -> str:
    """Bytes as makers of disks count them."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def scan(look_inside: bool = True) -> list[Disk]:
    """The disks of this machine; ``look_inside`` reads those without a known content to see whether they are blank."""
    listing = json.loads(ask("lsblk", "--json", "--bytes", "--output", _COLUMNS))
    found = parse(listing, _identities())
    if not look_inside:
        return found
    return [_read(disk) if unknown(disk) else disk for disk in found]


def _read(disk: Disk) -> Disk:
    """With whether it is blank. One that fails is told as such: what is asked may be what takes its place."""
    try:
        return replace(disk, empty=reads_blank(disk.path, disk.size))
    except OSError as error:
        return replace(disk, content=f"cannot be read ({error.strerror})")


def unknown(disk: Disk) -> bool:
    """Nothing is known to be on it: only reading it tells whether it is blank."""
    return not (disk.parts or disk.table or disk.content or disk.used) and disk.size > 0


def parse(listing: dict[str, Any], identities: dict[str, str]) -> list[Disk]:
    """Disks from what ``lsblk --json`` said; ``identities`` maps device paths to paths below ``by-id``."""
    return [_disk(entry, identities) for entry in listing["blockdevices"] if entry["type"] == "disk"]


def _disk(entry: dict[str, Any], identities: dict[str, str]) -> Disk:
    children = entry.get("children") or []
    inner = list(_below(children))
    parts = {child["path"]: Part(_number(child["path"]), child["path"], child.get("partlabel") or "",
                                 int(child["size"]), child.get("fstype") or "", child.get("uuid") or "")
             for child in children if child["type"] == "part"}
    # Whatever stands on the disk or on a partition of it: arrays, volumes, mappings.
    held = [child for child in inner if child["path"] not in parts]
    mounts = [place for child in [entry, *inner] for place in child.get("mountpoints") or [] if place]
    arrays = tuple(sorted({child["path"] for child in held if child["type"].startswith("raid")}))
    others = [child["path"] for child in held if child["path"] not in arrays]
    return Disk(entry["path"], identities.get(entry["path"], ""), (entry.get("serial") or "").strip(),
                (entry.get("model") or "").strip(), int(entry["size"] or 0), bool(entry["rota"]),
                entry.get("tran") or "", bool(entry.get("rm")), bool(entry.get("ro")), entry.get("pttype") or "",
                "" if entry.get("pttype") else entry.get("fstype") or "", tuple(parts.values()),
                tuple(sorted({*mounts, *others})), arrays)


def _number(path: str) -> int:
    """The number of a partition: the digits at the end of its name."""
    found = re.search(r"\d+$", path)
    return int(found[0]) if found else 0


def _below(children: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for child in children:
        yield child
        yield from _below(child.get("children") or [])


def _identities() -> dict[str, str]:
    """Device path → its path below by-id."""
    folder = Path("/dev/disk/by-id")
    links: dict[str, list[str]] = {}
    for link in folder.iterdir() if folder.is_dir() else ():
        links.setdefault(str(link.resolve()), []).append(link.name)
    return {path: str(folder / best) for path, names in links.items() if (best := identity(names))}


def identity(names: list[str]) -> str | None:
    """The best of a disk's names below by-id: one that shows the serial number, the shortest of those."""
    ranked = [(rank, len(name), name) for name in names for rank, start in enumerate(_PREFERRED)
              if name.startswith(start) and not name.startswith(("nvme-eui.", "nvme-nvme."))]
    ranked += [(len(_PREFERRED), len(name), name) for name in names if name.startswith(("nvme-eui.", "scsi-"))]
    return min(ranked)[2] if ranked else None


def reads_blank(path: str, size: int) -> bool:
    """Whether both ends of the disk and a thousand places between read as zeros, or as an erased flash does.

    A disk whose table alone was removed still holds somebody's data; no list of signatures tells that. Where a table
    itself lies does not count: one that was cut off while it was written is none.
    """
    start, end = min(_TABLE, size), max(0, size - _TABLE)
    places = [*((place, 2**20) for place in range(start, min(_EDGE, end), 2**20)),
              *((place, 2**20) for place in range(max(start, size - _EDGE), end, 2**20)),
              *((max(start, size * n // _SAMPLES // 4096 * 4096), 4096) for n in range(_SAMPLES))]
    with open(path, "rb", buffering=0) as device:
        for place, length in places:
            data = os.pread(device.fileno(), min(length, end - place), place)
            if data.count(0) != len(data) and data.count(0xFF) != len(data):
                return False
    return True
