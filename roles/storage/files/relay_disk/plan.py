"""Which disks become what. Nothing in here changes anything, and nothing of it depends on the machine.

The rule above all: what we did not put there is never destroyed without an explicit word. Free are disks that read as
blank, disks of an installation that never finished, and disks of relays that are listed as retired; for anything else
``wipe`` has to name the serial number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from relay_disk.conf import PROFILES, Conf
from relay_disk.disks import STICK, Disk, human
from relay_disk.run import Refused

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
RAID = "A19D880F-05FC-4D3B-A006-743F0F84911E"
ZFS = "6A898CC3-1DD2-11B2-99A6-080020736631"
_TYPES = {"esp": ESP, "log": ZFS, "cache": ZFS, "pool": ZFS}
_LEAST_REST = 2**30
_LEAST_DISK = 2**30
_NEEDS = {"nuc": "one SSD or NVMe SSD and no other disk", "supermicro": "two SSDs and four rotating disks"}
_COUNTS = {(1, 0): "nuc", (2, 4): "supermicro"}


@dataclass(frozen=True)
class Plan:
    """``system`` disks carry boot and OS, ``data`` disks the pool alone; ``why`` each may be used, by serial number.

    With ``kept``, partitions and pool are there and stay; only OS and boot partitions are made anew.
    """

    profile: str
    relay: str
    system: tuple[Disk, ...]
    data: tuple[Disk, ...]
    why: dict[str, str]
    conf: Conf
    kept: bool = False

    @property
    def disks(self) -> tuple[Disk, ...]:
        """All."""
        return self.system + self.data

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the partitions of a system disk, in order."""
        return ("esp", "root", "pool") if self.profile == "nuc" else ("esp", "root", "log", "cache")

    def partition(self, disk: Disk, role: str) -> str:
        """Path of the partition of one of these disks that has this role."""
        return disk.partition(self.roles.index(role) + 1 if disk in self.system else 1)

    @property
    def vdevs(self) -> list[str]:
        """The pool as arguments of ``zpool create``."""
        if self.profile == "nuc":
            return [self.partition(self.system[0], "pool")]
        pool = [self.partition(disk, "pool") for disk in self.data]
        log, cache = ([self.partition(disk, role) for disk in self.system] for role in ("log", "cache"))
        return ["mirror", *pool[:2], "mirror", *pool[2:], "log", "mirror", *log, "cache", *cache]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        def entry(disk: Disk, parts: Iterable[str]) -> dict[str, Any]:
            return {"serial": disk.serial, "model": disk.model, "size": disk.size, "id": disk.id, "kind": disk.kind,
                    "holds": disk.holds, "why": self.why[disk.serial], "partitions": list(parts)}
        return {"profile": self.profile, "relay": self.relay, "kept": self.kept,
                "disks": [*(entry(disk, self.roles) for disk in self.system),
                          *(entry(disk, ["pool"]) for disk in self.data)]}

    def __str__(self) -> str:
        """A line for each disk."""
        lines = [f"{self.profile}, relay {self.relay}" + (", its pool is kept" if self.kept else "")]
        for disk in self.disks:
            roles = self.roles if disk in self.system else ("pool",)
            lines.append(f"  {disk}: {disk.holds}, {self.why[disk.serial]} → {', '.join(roles)}")
        return "\n".join(lines)


def candidates(disks: Iterable[Disk]) -> list[Disk]:
    """Disks built into the machine: not the stick, no other stick of ours, nothing on USB or removable."""
    return [disk for disk in disks
            if disk.transport != "usb" and not disk.removable and not disk.read_only and disk.size >= _LEAST_DISK
            and not any(part.name == STICK for part in disk.parts)]


def decide(disks: Iterable[Disk], conf: Conf, new_id: Callable[[], str]) -> Plan:
    """The plan for these disks, or :class:`Refused` with every reason why there is none."""
    disks = list(disks)
    found = candidates(disks)
    faults = _faults(found)
    ssds = sorted((disk for disk in found if not disk.rotating), key=lambda disk: disk.serial)
    # By size, so that the two halves of a mirror are alike.
    hdds = sorted((disk for disk in found if disk.rotating), key=lambda disk: (disk.size, disk.serial))
    profile = _COUNTS.get((len(ssds), len(hdds)), "")
    if not profile:
        faults.append(f"this machine has {_count(len(ssds), 'SSD')} and {_count(len(hdds), 'rotating disk')}; a relay "
                      f"needs " + ", or ".join(f"{_NEEDS[name]} ({name})" for name in PROFILES))
    elif conf.profile not in ("", profile):
        faults.append(f"this stick was built for {conf.profile} ({_NEEDS[conf.profile]}); this machine is {profile}")
    for serial in sorted(conf.wipe - {disk.serial for disk in found}):
        faults.append(f"wipe names the serial number {serial}, which no disk here has")
    if faults:
        raise Refused(_refusal(faults, found))

    if conf.keep:
        plan = _kept(profile, ssds, hdds, conf)
    else:
        whys = {disk.serial: _why(disk, found, conf) for disk in found}
        faults += [_wont(disk, found) for disk in found if not whys[disk.serial]]
        if faults:
            raise Refused(_refusal(faults, found))
        # One that was begun goes on under its own id, or disks not yet written anew would seem to be of another.
        relay = min(unfinished(found), default="") or new_id()
        plan = Plan(profile, relay, tuple(ssds), tuple(hdds), whys, conf)
    faults += _too_small(plan)
    if faults:
        raise Refused(_refusal(faults, found))
    return plan


def _faults(found: list[Disk]) -> list[str]:
    """What makes disks unusable whatever is on them."""
    faults = [f"{disk.path} ({disk}) has no serial number or identity; it cannot be told from others"
              for disk in found if not disk.serial or not disk.id]
    for serial, count in Counter(disk.serial for disk in found if disk.serial).items():
        if count > 1:
            faults.append(f"{count} disks have the serial number {serial}; they cannot be told apart")
    faults += [f"{disk} is in use: {', '.join(disk.used)}" for disk in found if disk.used]
    return faults


def unfinished(disks: Iterable[Disk]) -> set[str]:
    """Ids of installations of which no disk says that it was finished: nothing was ever received there.

    One boot partition that is done is enough for a box to start and to take data.
    """
    roles: dict[str, set[str]] = {}
    for disk in disks:
        for part in disk.parts:
            roles.setdefault(part.relay, set()).add(part.role)
    return {relay for relay, found in roles.items()
            if relay and "installing" in found and not found & {"esp", "keeping"}}


def _why(disk: Disk, found: list[Disk], conf: Conf) -> str:
    """Why a disk may be used; empty when it may not."""
    if disk.empty:
        return "free"
    if disk.serial in conf.wipe:
        return "wipe names it"
    if disk.relay in unfinished(found):
        return "begun and not finished"
    if disk.relay in conf.retired:
        return "listed as retired"
    return ""


def _wont(disk: Disk, found: list[Disk]) -> str:
    if disk.relay and disk.relay not in unfinished(found):
        return (f"{disk} belongs to relay {disk.relay}. If that is this box and it works: take the stick out and start "
                f"again. To install it anew and keep its data: keep = {disk.relay}. If it was retired: "
                f"retired = {disk.relay}")
    return (f"{disk} is not blank: {disk.holds}. If nobody needs what is on it: wipe = {disk.serial}")


def _kept(profile: str, ssds: list[Disk], hdds: list[Disk], conf: Conf) -> Plan:
    faults = []
    for disk in [*ssds, *hdds]:
        roles = [part.role for part in disk.parts if part.relay == conf.keep]
        want = ["pool"] if disk.rotating else ["root", "pool"] if profile == "nuc" else ["root", "log", "cache"]
        if [role for role in roles if role in ("root", "pool", "log", "cache")] != want or disk.relay != conf.keep:
            faults.append(f"keep = {conf.keep}: {disk} is not a disk of that relay, or not whole: {disk.holds}")
    if conf.keep in unfinished([*ssds, *hdds]):
        faults.append(f"keep = {conf.keep}: that installation was never finished, so it has no data; leave keep out")
    if faults:
        raise Refused(_refusal(faults, [*ssds, *hdds]))
    return Plan(profile, conf.keep, tuple(ssds), tuple(hdds),
                {disk.serial: "kept" for disk in [*ssds, *hdds]}, conf, kept=True)


def _too_small(plan: Plan) -> list[str]:
    if plan.kept:
        return []
    conf = plan.conf
    need = conf.esp + conf.root + (0 if plan.profile == "nuc" else conf.log) + _LEAST_REST
    return [f"{disk} is too small: {human(need)} are needed" for disk in plan.system if disk.size < need]


def choose(boxes: dict[str, str], plan: Plan) -> str:
    """Which of the boxes that the stick has settings for this machine becomes: name → profile, empty for any."""
    if plan.conf.box:
        if plan.conf.box not in boxes:
            raise Refused(f"no disk was changed: box = {plan.conf.box}, but the stick has {', '.join(boxes) or 'none'}")
        boxes = {plan.conf.box: boxes[plan.conf.box]}
    fits = [box for box, profile in boxes.items() if profile in ("", plan.profile)]
    if len(fits) > 1:
        raise Refused(f"no disk was changed: the stick has settings for {', '.join(fits)}; say which: box = {fits[0]}")
    if boxes and not fits:
        built = ", ".join(f"{box} ({profile}: {_NEEDS[profile]})" for box, profile in boxes.items())
        raise Refused(f"no disk was changed: this stick was built for {built}; this machine is {plan.profile}")
    return fits[0] if fits else ""


def slices(plan: Plan, disk: Disk) -> list[tuple[str, int, str]]:
    """Partitions of a disk: role, MiB (0: the rest), GPT type.

    A data partition does not fill its disk, so that another disk of the same nominal size fits in its place.
    """
    if disk not in plan.system:
        return [("pool", rounded(min(other.size for other in plan.data)), ZFS)]
    conf = plan.conf
    sizes = {"esp": conf.esp, "root": conf.root, "log": conf.log}
    return [("installing" if role == "esp" else role, sizes.get(role, 0) >> 20,
             _TYPES.get(role) or (LINUX if plan.profile == "nuc" else RAID)) for role in plan.roles]


def rounded(size: int) -> int:
    """MiB of a partition that leaves 1 to 2 GiB free, or on a small disk some MiB."""
    room = size >> 20
    return room // 1024 * 1024 - 1024 if room > 64 * 1024 else room // 16 * 16 - 16


def table(relay: str, parts: Iterable[tuple[str, int, str]]) -> str:
    """Input of sfdisk for a new GPT."""
    lines = ["label: gpt"]
    for role, size, kind in parts:
        lines.append((f"size={size}MiB, " if size else "") + f'type={kind}, name="relay-{relay}-{role}"')
    return "\n".join(lines) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s'[:number != 1]}"


def _refusal(faults: list[str], found: list[Disk]) -> str:
    seen = [f"  {disk}: {disk.holds}" for disk in found] or ["  none"]
    return "\n".join(["no disk was changed:", *(f"  - {fault}" for fault in faults), "disks of this machine:", *seen])
