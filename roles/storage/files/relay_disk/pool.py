"""The pool ``relay``: made, opened, its datasets and what each may take.

It describes itself: unencrypted properties of its root hold the sealed key and the recovery key, so a system that is
installed anew, or a rescue system, needs nothing else.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay_disk import key as keys
from relay_disk.conf import Conf
from relay_disk.destroy import destroy
from relay_disk.disks import Disk, scan
from relay_disk.plan import Plan
from relay_disk.run import Failed, ask, do, hidden, tried

POOL = "relay"
SEALED, RECOVERY, BOX = "relay:sealed", "relay:recovery", "relay:box"
_BY_ID = "/dev/disk/by-id"
_PATIENCE = 30  # seconds that rotating disks may take to show up


@dataclass(frozen=True)
class Dataset:
    """A dataset, where it is mounted, and its ZFS properties."""

    name: str
    place: Path
    options: tuple[str, ...] = ()


# In the order in which they are mounted.
DATASETS = (
    Dataset("data", Path("/var/lib/relay-agent")),
    Dataset("kspace", Path("/var/lib/relay-agent/kspace"), ("recordsize=1M",)),
    Dataset("journal", Path("/var/log/journal")),
    Dataset("secrets", Path("/etc/relay-agent/credentials")),
)
_JOURNAL, _SECRETS = 4 * 2**30, 64 * 2**20


def create(plan: Plan, key: bytes) -> None:
    """Make pool and datasets on the partitions of the plan."""
    create_options = [f"-o{option}" for option in ("ashift=12", "autotrim=on", "cachefile=none")]
    options = ["compression=zstd", "atime=off", "xattr=sa", "acltype=posix", "mountpoint=none", "devices=off",
               "setuid=off", "encryption=aes-256-gcm", "keyformat=raw", "keylocation=prompt", f"{BOX}={plan.relay}"]
    destroy(plan.disks, "zpool", "create", "-f", *create_options, *(f"-O{option}" for option in options), POOL,
            *plan.vdevs, given=key)
    for dataset in DATASETS:
        do("zfs", "create", *(f"-o{option}" for option in ("mountpoint=legacy", *dataset.options)),
           f"{POOL}/{dataset.name}")
    budget(plan.conf.data_share, plan.conf.kspace_share)


def shares(size: int, data_share: int, kspace_share: int) -> dict[str, dict[str, int]]:
    """What each dataset may take (quota) and is sure of (reservation), in bytes, of a pool of this size.

    Raw data can never take what DICOM is sure of, nor can the journal, nor the other way about.
    """
    journal = min(_JOURNAL, size // 50)
    return {"data": {"reservation": size * data_share // 100},
            "kspace": {"quota": size * kspace_share // 100},
            "journal": {"quota": journal, "reservation": journal},
            "secrets": {"quota": _SECRETS, "reservation": _SECRETS}}


def budget(data_share: int = Conf.data_share, kspace_share: int = Conf.kspace_share) -> bool:
    """Set quotas and reservations; whether anything changed."""
    size = sum(int(number) for number in ask("zfs", "get", "-Hpo", "value", "used,available", POOL).split())
    size -= size % 2**28  # what is written meanwhile moves the sum a little
    changed = False
    for name, limits in shares(size, data_share, kspace_share).items():
        for limit, value in limits.items():
            if int(ask("zfs", "get", "-Hpo", "value", limit, f"{POOL}/{name}")) != value:
                do("zfs", "set", f"{limit}={value}", f"{POOL}/{name}")
                changed = True
    return changed


def get(name: str) -> str:
    """A property of the pool's root; empty when it has none."""
    value = ask("zfs", "get", "-Ho", "value", name, POOL).strip()
    return "" if value == "-" else value


def put(name: str, value: str) -> None:
    """Set a property of the pool's root; its value is not shown."""
    hidden(f"zfs set {name}=… {POOL}", "zfs", "set", f"{name}={value}", POOL)


def imported() -> bool:
    """Whether the pool is here."""
    return POOL in ask("zpool", "list", "-Ho", "name").split()


def find(relay: str = "") -> str:
    """The GUID of the pool of this relay, or of the only relay there is, when all its disks had time to show up."""
    end = time.monotonic() + _PATIENCE
    while True:
        disks = [disk for disk in scan(look_inside=False) if disk.relay and relay in ("", disk.relay)]
        relays = {disk.relay for disk in disks}
        pools = {part.uuid for disk in disks if (part := disk.part("pool")) and part.content == "zfs_member"}
        if len(relays) > 1:
            raise Failed(f"disks of several relays are here: {', '.join(sorted(relays))}; say which is meant")
        if len(pools) == 1 and (complete(disks) or time.monotonic() > end):
            return pools.pop()
        if time.monotonic() > end:
            raise Failed("no disk with the pool of a relay is here" if not pools else "disks of more than one pool")
        time.sleep(1)


def complete(disks: list[Disk]) -> bool:
    """Whether as many disks are here as an installation has: one, or two and four."""
    counts = [sum(disk.part(role) is not None for disk in disks) for role in ("root", "pool")]
    return counts in ([1, 1], [2, 4])


def bring(guid: str, *options: str) -> None:
    """Import the pool, nothing mounted, key not loaded."""
    do("zpool", "import", "-N", "-d", _BY_ID, "-o", "cachefile=none", *options, guid)


def locked() -> bool:
    """Whether the key is not loaded."""
    return get("keystatus") != "available"


def load(key: bytes) -> None:
    """Give the pool its key; :class:`Failed` when it is not the one."""
    do("zfs", "load-key", POOL, given=key)


def own_key() -> bytes:
    """The key as this machine has it: from its TPM, or from the OS disk of a box that needs none."""
    if keys.OPEN_KEY.exists():
        return keys.OPEN_KEY.read_bytes()
    sealed = get(SEALED)
    if not sealed:
        raise Failed("the pool has no sealed key")
    return keys.unseal(sealed)


def mount(below: Path, *options: str) -> None:
    """Mount all datasets below a folder."""
    for dataset in DATASETS:
        place = below / dataset.place.relative_to("/")
        place.mkdir(parents=True, exist_ok=True)
        do("mount", "-t", "zfs", *(["-o", ",".join(options)] if options else []), f"{POOL}/{dataset.name}", str(place))


def unmount(below: Path) -> None:
    """The reverse."""
    for dataset in reversed(DATASETS):
        tried("umount", str(below / dataset.place.relative_to("/")))


def export() -> None:
    """Let the pool go."""
    do("zpool", "export", POOL)


def state() -> dict[str, Any]:
    """The pool as ``zpool status`` tells it to programs."""
    told: dict[str, Any] = json.loads(ask("zpool", "status", "-j", "--json-int", "-p", POOL))
    return told["pools"][POOL]  # type: ignore[no-any-return]
