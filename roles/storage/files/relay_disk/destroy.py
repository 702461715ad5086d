"""The one way to destroy what is on a disk, or on one of its partitions."""

from __future__ import annotations

import shlex

from relay_disk.disks import Disk, Part, scan
from relay_disk.run import Failed, do, tried

_EDGE = 64  # MiB; labels of ZFS lie in the first and the last of them


def destroy(disks: tuple[Disk, ...], *command: str, given: bytes | None = None) -> str:
    """Run a command that destroys what is on these disks: the one way to do so.

    What was planned a moment or minutes ago must still be so: same serial number and size behind the same identity, and
    nobody uses it. Disks may have been pulled and put in meanwhile, and then names mean something else.
    """
    now = {disk.id: disk for disk in scan(look_inside=False) if disk.id}
    for disk in disks:
        if used := _found(disk, now, shlex.join(command)).used:
            raise Failed(f"the disk with serial number {disk.serial} is in use: {', '.join(used)}")
    return do(*command, given=given)


def erase(disk: Disk, part: Part) -> str:
    """Destroy what is on a partition of ours that nobody uses any more, on a disk that may run the system; how."""
    now = {disk.id: disk for disk in scan(look_inside=False) if disk.id}
    if part.name not in {each.name for each in _found(disk, now, f"erase {part.name}").parts}:
        raise Failed(f"the disk with serial number {disk.serial} has no partition {part.name} any more")
    path = disk.partition(part.number)
    if tried("blkdiscard", "--force", path):
        return "all of it discarded"
    for seek in (0, part.size // 2**20 - _EDGE):
        command = ("dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={_EDGE}", f"seek={seek}", "conv=fsync")
        do(*command)
    return "labels overwritten; the rest is encrypted by a key that is gone"


def _found(disk: Disk, now: dict[str, Disk], command: str) -> Disk:
    found = now.get(disk.id)
    if found is None or (found.serial, found.size) != (disk.serial, disk.size):
        raise Failed(f"the disk with serial number {disk.serial} is not there any more, or changed; nothing was "
                     f"done to what is in its place ({command})")
    return found
