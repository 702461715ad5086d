"""Disks as the tests want them, and what lsblk says of real ones."""

from __future__ import annotations

from relay_disk.disks import Disk, Part

GIB = 2**30
ROLES = {"nuc": ("esp", "root", "pool"), "supermicro": ("esp", "root", "log", "cache"), "data": ("pool",)}


def disk(serial, *, rotating=False, size=500 * GIB, empty=True, parts=(), **more):
    path = f"/dev/{serial.lower()}"
    more = {"model": "Model", "transport": "sata", "table": "gpt" if parts else ""} | more
    return Disk(path=path, id=f"/dev/disk/by-id/ata-Model_{serial}" if serial else "", serial=serial, size=size,
                rotating=rotating, empty=empty and not parts, parts=tuple(parts), **more)


def of_relay(serial, relay, kind, *, boot="esp", **more):
    """A disk with our partitions; ``kind``: nuc, supermicro (an SSD of it) or data."""
    content = {"esp": "vfat", "root": "ext4" if kind == "nuc" else "linux_raid_member"}
    parts = [Part(n, f"/dev/{serial.lower()}{n}", f"relay-{relay}-{boot if role == 'esp' else role}", GIB,
                  content.get(role, "zfs_member"), "4711") for n, role in enumerate(ROLES[kind], 1)]
    return disk(serial, rotating=kind == "data", parts=parts, **more)


def foreign(serial, content="ntfs", **more):
    part = Part(1, f"/dev/{serial.lower()}1", "Basic data partition", GIB, content)
    return disk(serial, parts=[part], **more)


def nuc(**more):
    return [disk("NVME1", transport="nvme", **more)]


def supermicro():
    return [disk("SSD1"), disk("SSD2"), *(disk(f"HDD{n}", rotating=True, size=4000 * GIB) for n in range(1, 5))]


def relay_supermicro(relay, boot=("esp", "esp")):
    return [*(of_relay(f"SSD{n}", relay, "supermicro", boot=b) for n, b in enumerate(boot, 1)),
            *(of_relay(f"HDD{n}", relay, "data") for n in range(1, 5))]
