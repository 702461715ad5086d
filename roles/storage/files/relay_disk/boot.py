"""EFI system partitions: one on each system disk, all alike, each able to start the box alone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relay_disk.destroy import destroy
from relay_disk.disks import Disk, Part
from relay_disk.run import Failed, ask, do, log, tried

IMAGE = Path("EFI/BOOT/BOOTX64.EFI")  # the one name that every firmware looks for by itself
_MARKS = ("installing", "keeping")


@contextmanager
def mounted(device: str, *options: str) -> Iterator[Path]:
    """A partition mounted for a moment.

    One to be written to is repaired first: a power cut may have left FAT half written, and a kernel that stumbles over
    that writes no more. Clusters that belong to no file would be kept as files, and fill it.
    """
    place = Path("/run/relay-disk") / re.sub(r"\W", "_", device)
    place.mkdir(parents=True, exist_ok=True)
    writable = "ro" not in options
    if writable and not tried("findmnt", "--source", device):
        tried("fsck.fat", "-a", "-w", device)
    ask("mount", "-o", ",".join(("nodev", "nosuid", "noexec", *options)), device, str(place))
    try:
        for stray in place.glob("FSCK*.REC") if writable else ():
            stray.unlink()
        yield place
    finally:
        ask("umount", str(place))
        place.rmdir()


def esp(disk: Disk) -> Part | None:
    """The disk's boot partition, finished or not."""
    return next((part for part in disk.parts if part.role in ("esp", *_MARKS)), None)


def make(disk: Disk, partition: str) -> None:
    """A new, empty file system for a boot partition."""
    destroy((disk,), "mkfs.vfat", "-F", "32", "-n", "RELAY-ESP", partition)


def put(image: Path, partition: str) -> None:
    """Write the image as a whole or not at all."""
    with mounted(partition) as place:
        target = place / IMAGE
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".NEW")
        log.info("copying %s to %s", image, partition)
        with image.open("rb") as source, part.open("wb") as file:
            while piece := source.read(2**20):
                file.write(piece)
            os.fsync(file.fileno())
        do("sync", "--file-system", str(place))
        part.replace(target)
        do("sync", "--file-system", str(place))


def digest(partition: str) -> str:
    """SHA-256 of what it starts; empty when there is nothing, or nothing that can be read."""
    try:
        with mounted(partition, "ro") as place:
            path = place / IMAGE
            return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    except (Failed, OSError) as error:
        log.warning("%s cannot be read: %s", partition, error)
        return ""


def mark(disk: Disk, number: int, relay: str, role: str) -> None:
    """Name the boot partition: its name says whether the installation was finished."""
    do("sfdisk", "--quiet", "--no-reread", "--part-label", disk.id, str(number), f"relay-{relay}-{role}")


def finish(disks: list[Disk]) -> bool:
    """Finish what the installer could not: a power cut between the first disk that starts the box and its last step.

    The box did start, so from now on it takes data, and no stick may believe that the installation never finished.
    """
    own = [(disk, part) for disk in disks if (part := esp(disk))]
    marked = [(disk, part) for disk, part in own if part.role in _MARKS]
    if not marked:
        return False
    good = next((part for _, part in own if digest(part.path)), None)
    if good is None:
        raise Failed("no boot partition of this box can start it")
    for disk, part in marked:
        if part is not good and not digest(part.path):
            with mounted(good.path, "ro") as place:
                put(place / IMAGE, part.path)
        mark(disk, part.number, part.relay, "esp")
    return True


def register(disks: list[tuple[Disk, int]]) -> None:
    """Tell the firmware; one that forgets or refuses still finds the image by its name."""
    if not Path("/sys/firmware/efi/efivars").is_dir():
        return
    try:
        entries = ask("efibootmgr")
    except Failed as error:
        log.info("the firmware's boot entries cannot be read (%s); it will look for the system by itself", error)
        return
    for number in re.findall(r"^Boot([0-9A-F]{4})\*? Relay SSD", entries, re.MULTILINE):
        tried("efibootmgr", "--quiet", "--delete-bootnum", "--bootnum", number)
    for place, (disk, number) in reversed(list(enumerate(disks, 1))):
        if not tried("efibootmgr", "--quiet", "--create", "--disk", disk.path, "--part", str(number), "--label",
                     f"Relay SSD {place}", "--loader", "\\" + str(IMAGE).replace("/", "\\")):
            log.info("the firmware took no boot entry for %s; it will look for the system by itself", disk)
