"""The end of a box: without its key, what is left on its disks is noise."""

from __future__ import annotations

from pathlib import Path

from relay_disk import key as keys
from relay_disk import pool
from relay_disk.box import own
from relay_disk.destroy import erase
from relay_disk.disks import scan
from relay_disk.run import Refused, do, log, tried

_ROLES = ("pool", "log", "cache")


def retire(relay: str) -> list[str]:
    """Destroy the key of this box, its pool and what is on the pool's partitions; a line for each of these.

    ``relay`` is the id of the box, said by who means this one; :class:`Refused` when it is another one. Given again
    after a power cut, it goes on. The agent has to be stopped.
    """
    disks = scan(look_inside=False)
    if own(disks) != relay:
        raise Refused(f"this is relay {own(disks)}, not {relay}")
    if pool.imported():
        _forget_key()
        tried("journalctl", "--relinquish-var")  # the journal lies on the pool, too
        pool.unmount(Path("/"))
        do("zpool", "destroy", "-f", pool.POOL)
    if keys.OPEN_KEY.exists():
        do("shred", "--remove", str(keys.OPEN_KEY))
    return [f"{disk}: {role}, {erase(disk, part)}" for disk in disks if disk.relay == relay
            for role in _ROLES if (part := disk.part(role))]


def _forget_key() -> None:
    """First of all: wrapped by a key that nobody has, the pool is opened by no TPM and by no recovery key any more."""
    if pool.locked():
        log.warning("the pool is locked, so its key cannot be changed; destroy the recovery key as well")
    else:
        do("zfs", "change-key", "-o", "keyformat=raw", "-o", "keylocation=prompt", pool.POOL, given=keys.new())
    for name in (pool.SEALED, pool.RECOVERY):
        do("zfs", "inherit", name, pool.POOL)
    do("zpool", "sync", pool.POOL)
