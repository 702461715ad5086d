"""The one way to destroy what is on a disk."""

from __future__ import annotations

import shlex

from relay_disk.disks import Disk, scan
from relay_disk.run import Failed, do


def destroy(disks: tuple[Disk, ...], *command: str, given: bytes | None = None) -> str:
    """Run a command that destroys what is on these disks: the one way to do so.

    What was planned a moment or minutes ago must still be so: same serial number and size behind the same identity, and
    nobody uses it. Disks may have been pulled and put in meanwhile, and then names mean something else.
    """
    now = {disk.id: disk for disk in scan(look_inside=False) if disk.id}
    for disk in disks:
        found = now.get(disk.id)
        if found is None or (found.serial, found.size) != (disk.serial, disk.size):
            raise Failed(f"the disk with serial number {disk.serial} is not there any more, or changed; nothing was "
                         f"done to what is in its place ({shlex.join(command)})")
        if found.used:
            raise Failed(f"the disk with serial number {disk.serial} is in use: {', '.join(found.used)}")
    return do(*command, given=given)
