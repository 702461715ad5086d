"""A new disk in the place of one that failed: its partitions, its part of the mirrors, its boot partition."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relay_disk import boot, box, pool
from relay_disk.destroy import destroy
from relay_disk.disks import Disk, human, scan
from relay_disk.plan import ESP, RAID, ZFS, candidates, table
from relay_disk.run import Refused, do, log
from relay_disk.status import Leaf, arrays, leaves, progress

_TYPES = {"esp": ESP, "root": RAID}


@dataclass(frozen=True)
class Swap:
    """A new disk, what it becomes (partitions as role, MiB, type) and which devices of the pool it stands in for."""

    disk: Disk
    system: bool
    parts: tuple[tuple[str, int, str], ...]
    lost: tuple[Leaf, ...]


def decide(disks: Iterable[Disk], relay: str, lost: list[Leaf], lacking: int, wipe: Iterable[str] = ()) -> list[Swap]:
    """Which new disk stands in for what; ``lacking`` SSDs miss in the mirror of the OS. :class:`Refused`: why not."""
    disks = list(disks)
    own = [disk for disk in disks if disk.relay == relay and disk.serial not in wipe]
    new = [disk for disk in candidates(disks) if disk not in own]
    refused = [f"{disk} is not blank: {disk.holds}. If nobody needs what is on it: --wipe {disk.serial}"
               for disk in new if not disk.empty and disk.serial not in wipe]
    free = [disk for disk in new if (disk.empty or disk.serial in wipe) and disk.serial and disk.id]
    # The mirror of the log is mirror-N too, so only devices right below the pool count as data.
    data = [leaf for leaf in lost if leaf.group == "vdevs"]
    swaps = [*_system(free, own, lost, lacking), *_data(free, own, data)]
    needed = lacking + len(data)
    if not needed:
        raise Refused("no disk of this box failed; to replace one that is about to, pull it out first")
    if not swaps:
        raise Refused("\n".join(["no disk is here that could take the place of the one that failed:",
                                 *(f"  {words}" for words in refused or ["no other disk is built in"])]))
    return swaps


def _system(free: list[Disk], own: list[Disk], lost: list[Leaf], lacking: int) -> list[Swap]:
    like = next((disk for disk in own if disk.part("root") and disk.arrays), None)
    if not lacking or like is None:
        return []
    parts = tuple((part.role, 0 if part.role == "cache" else part.size >> 20, _TYPES.get(part.role, ZFS))
                  for part in like.parts)
    need = sum(size for _, size, _ in parts) + 1024 << 20
    gone = tuple(leaf for leaf in lost if leaf.group != "vdevs")
    return [Swap(disk, True, parts, gone) for disk in free if not disk.rotating and disk.size >= need][:lacking]


def _data(free: list[Disk], own: list[Disk], lost: list[Leaf]) -> list[Swap]:
    sizes = [part.size for disk in own if not disk.part("root") and (part := disk.part("pool"))]
    if not sizes:
        return []
    size = min(sizes)
    fits = [disk for disk in free if disk.rotating and disk.size >= size + 2 * 2**20]
    return [Swap(disk, False, (("pool", size >> 20, ZFS),), (leaf,)) for disk, leaf in zip(fits, lost, strict=False)]


def replace(wipe: Iterable[str], really: bool) -> list[Swap]:
    """Find what failed and put the new disk in its place; without ``really`` only tell."""
    disks = scan()
    relay = box.own(disks)
    own = [disk for disk in disks if disk.relay == relay]
    lost = [leaf for leaf in leaves(pool.state()) if leaf.state != "ONLINE"]
    mirrors = arrays(own)
    swaps = decide(disks, relay, lost, sum(array.degraded for array in mirrors), wipe)
    for swap in swaps:
        log.info("%s takes the place of %s", swap.disk, "the SSD that failed" if swap.system else swap.lost[0].path)
        if really:
            _put_in(swap, relay, mirrors[0].path if mirrors else "", own)
    return swaps


def _put_in(swap: Swap, relay: str, mirror: str, own: list[Disk]) -> None:
    disk = swap.disk
    destroy((disk,), "sfdisk", "--quiet", "--wipe=always", "--wipe-partitions=always", disk.id,
            given=table(relay, swap.parts).encode())
    do("udevadm", "settle")
    number = {role: place for place, (role, _, _) in enumerate(swap.parts, 1)}
    if not swap.system:
        do("zpool", "replace", pool.POOL, swap.lost[0].guid, disk.partition(number["pool"]))
        return
    boot.make(disk, disk.partition(number["esp"]))
    level([*own, disk], disk.partition(number["esp"]))
    for leaf in swap.lost:
        if leaf.group == "l2cache":
            do("zpool", "remove", pool.POOL, leaf.guid)
            do("zpool", "add", pool.POOL, "cache", disk.partition(number["cache"]))
        else:
            do("zpool", "replace", pool.POOL, leaf.guid, disk.partition(number["log"]))
    # Last: from then on the system runs from this disk as well, and nothing on it may be formatted any more.
    do("mdadm", "--manage", mirror, "--fail", "detached", "--remove", "detached")
    do("mdadm", "--manage", mirror, "--add", disk.partition(number["root"]))


def level(disks: list[Disk], *targets: str, image: Path | None = None) -> None:
    """Bring boot partitions to the state of one that is good, or to an image; those that differ when none is named."""
    own = [(disk, part) for disk in disks if (part := boot.esp(disk))]
    digests = {part.path: boot.digest(part.path) for _, part in own}
    if image:
        for path in digests:
            boot.put(image, path)
    else:
        good = next((path for path, digest in digests.items() if digest), None)
        if good is None:
            raise Refused("no boot partition of this box holds anything that starts it")
        for path in targets or [path for path, digest in digests.items() if digest != digests[good]]:
            with boot.mounted(good, "ro") as place:
                boot.put(place / boot.IMAGE, path)
    boot.register([(disk, part.number) for disk, part in own])


def wait() -> None:
    """Tell how far the new disk is until it is in step."""
    while True:
        state = pool.state()
        mirrors = [array for array in arrays(scan(look_inside=False)) if array.doing in ("recover", "resync")]
        words = [progress(state), *(_synced(array.path) for array in mirrors)]
        if not any(words):
            break
        log.info("%s", ", ".join(word for word in words if word))
        time.sleep(5)
    left = [leaf for leaf in leaves(pool.state()) if leaf.state != "ONLINE"]
    log.info("done" if not left else "still not sound: " + ", ".join(leaf.path for leaf in left))


def _synced(path: str) -> str:
    text = (Path("/sys/block") / Path(path).resolve().name / "md/sync_completed").read_text()
    done, _, whole = (part.strip() for part in text.partition("/"))
    if not (done.isdigit() and whole.isdigit()):
        return "mirror of the OS begins"
    return f"mirror of the OS {100 * int(done) // max(1, int(whole))} % of {human(int(whole) * 512)}"
