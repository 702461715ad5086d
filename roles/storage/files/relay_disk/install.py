"""Installation from the stick: the system that runs from it is unpacked onto the machine's own disks.

Until its last step the boot partitions have a name that says "under way" and hold nothing that starts. A start of the
stick after a power cut therefore either begins again, or finds a box that is installed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from relay_disk import boot, conf, pool
from relay_disk import key as keys
from relay_disk.destroy import destroy
from relay_disk.disks import STICK, scan
from relay_disk.plan import Plan, choose, decide, slices, table
from relay_disk.run import Failed, Refused, ask, consoles, do, log, tell, tried

TARGET = Path("/run/relay-disk/target")
ASSEMBLY = Path("/run/udev/rules.d/64-md-raid-assembly.rules")
FOLDER = "relay"  # on the stick's boot partition: what the box starts from, install.conf, site/, logs, recovery keys
IMAGE = "box.efi"


@dataclass(frozen=True)
class Stick:
    """What this machine was started from: the partition with the system, and the folder that people can write to."""

    image: str
    folder: Path

    @property
    def conf(self) -> conf.Conf:
        """What it was told."""
        path = self.folder / "install.conf"
        return conf.read(path.read_text(errors="replace") if path.exists() else "")

    @property
    def boxes(self) -> dict[str, str]:
        """The boxes that it has settings for, and their profiles."""
        told = [json.loads(path.read_text()) for path in sorted(self.folder.glob("site/*.json"))]
        return {entry["box"]: entry["profile"] for entry in told}


@contextmanager
def stick() -> Iterator[Stick]:
    """The stick, its boot partition mounted for the log."""
    listing = json.loads(ask("lsblk", "--json", "--output", "PATH,PARTLABEL,MOUNTPOINTS,PKNAME"))
    entries = [child for entry in listing["blockdevices"] for child in [entry, *entry.get("children", [])]]
    root = next((entry for entry in entries if entry["partlabel"] == STICK and any(entry["mountpoints"])), None)
    if root is None:
        raise Refused("this is not the stick: only the system that was started from it installs")
    esp = next((entry["path"] for entry in entries
                if entry["partlabel"] == "relay-stick" and entry["pkname"] == root["pkname"]), None)
    if esp is None:
        raise Refused("the stick has no boot partition named relay-stick")
    with boot.mounted(esp) as place:
        yield Stick(root["path"], place / FOLDER)


def install(source: Stick) -> None:
    """The whole of it; every step is told."""
    told = source.conf
    if not told.recovery:
        raise Refused("no disk was changed: install.conf has no recovery = age1..., so nobody could ever open a box "
                      "whose TPM fails. Make a key pair at the coordinating site: age-keygen; or say recovery = none")
    if not os.access(source.folder, os.W_OK):
        raise Refused("no disk was changed: nothing can be written to the stick, where the box's recovery key and the "
                      "log are left. Take off its write protection, or flash another one")
    image = source.folder / IMAGE
    if not image.exists():
        raise Refused(f"no disk was changed: the stick has no {FOLDER}/{IMAGE}")
    _step("looking at the disks")
    _own_arrays()
    plan = decide(scan(), told, lambda: secrets.token_hex(4))
    for line in str(plan).splitlines():
        log.info("%s", line)
    box = choose(source.boxes, plan)
    if told.tpm:
        _step("trying the TPM")
        keys.prove_tpm()
    key = _known_key(plan, source) if plan.kept else keys.new()
    if plan.kept:
        _unboot(plan)
    else:
        _partition(plan)
    root = _root(plan)
    if not plan.kept:
        _step("pool")
        pool.create(plan, key)
        _recovery(plan, key, source)
    _seal(key, told)
    try:
        _unpack(plan, root, key, source, box)
    finally:
        _leave()
    _bootable(plan, image)
    _step(f"DONE. Relay {plan.relay} is installed. The key is bound to {_bound(told)}.")


def _step(words: str) -> None:
    log.info("== %s", words)


def _own_arrays() -> None:
    """Arrays are the installer's alone from now on.

    udev puts together what it finds: disks of an earlier installation, which that would hold; and later the one that is
    being made, in which it then fails a member because the table around it was written to.
    """
    ASSEMBLY.parent.mkdir(parents=True, exist_ok=True)
    ASSEMBLY.touch()  # an empty file of that name in /run stands for the system's
    do("udevadm", "control", "--reload")
    do("udevadm", "settle")
    _release_arrays()


def _release_arrays() -> None:
    """Stop the arrays of disks that nothing else uses."""
    for array in sorted({array for disk in scan(look_inside=False) if not disk.used for array in disk.arrays}):
        do("mdadm", "--stop", array)


def _partition(plan: Plan) -> None:
    """System disks first: from then on every disk with this id belongs to an installation that was not finished."""
    _step("partitions")
    for disk in plan.disks:
        for part in disk.parts:
            if part.content == "zfs_member":
                destroy((disk,), "zpool", "labelclear", "-f", part.path)
        # A table of ours is written over by the new one: no moment without one, in which the disk would be nobody's.
        wipe = "never" if disk.relay else "always"
        destroy((disk,), "sfdisk", "--quiet", f"--wipe={wipe}", "--wipe-partitions=always", disk.id,
                given=table(plan.relay, slices(plan, disk)).encode())
    do("udevadm", "settle")


def _unboot(plan: Plan) -> None:
    """A relay that is installed anew does not start until that is finished."""
    for disk in plan.system:
        part = boot.esp(disk)
        if part is None:
            raise Failed(f"{disk} has no boot partition")
        boot.mark(disk, part.number, plan.relay, "keeping")
    do("udevadm", "settle")


def _root(plan: Plan) -> str:
    """The OS file system, and empty boot partitions; path of the file system's device."""
    _step("file system of the OS")
    for disk in plan.system:
        boot.make(disk, plan.partition(disk, "esp"))
    parts = [plan.partition(disk, "root") for disk in plan.system]
    root = parts[0]
    if len(parts) > 1:
        root = "/dev/md/relay-root"
        for disk, part in zip(plan.system, parts, strict=True):
            tried("mdadm", "--zero-superblock", part)
            destroy((disk,), "wipefs", "--quiet", "--all", part)
        destroy(plan.system, "mdadm", "--create", root, "--run", "--metadata=1.2", "--homehost=any", "--level=1",
                "--name=relay-root", f"--raid-devices={len(parts)}", "--bitmap=internal", "--assume-clean", *parts)
        do("udevadm", "settle")
    destroy(plan.system, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "relay-root", root)
    return root


def _recovery(plan: Plan, key: bytes, source: Stick) -> None:
    """The recovery key: on the stick, in the pool, and once on the console."""
    if plan.conf.recovery == ("none",):
        log.info("no recovery key was made, as the stick says: if this machine's TPM fails, its data are lost")
        return
    text = keys.recovery(key, plan.conf.recovery)
    pool.put(pool.RECOVERY, keys.packed(text))
    path = source.folder / f"recovery-{plan.relay}.age"
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    log.info("recovery key of relay %s, for the coordinating site alone to decrypt; also on the stick, as %s:",
             plan.relay, path.name)
    for line in text.splitlines():
        log.info("%s", line)


def _seal(key: bytes, told: conf.Conf) -> None:
    if told.tpm:
        pool.put(pool.SEALED, keys.seal(key))


def _bound(told: conf.Conf) -> str:
    return keys.binding() if told.tpm else "nothing: it lies in the open on the OS disk, as the stick allows"


def _known_key(plan: Plan, source: Stick) -> bytes:
    """Open the pool that stays, before anything is changed."""
    _step("opening the pool that is kept")
    pool.bring(pool.find(plan.relay))
    given = source.folder / "unlock.key"
    if given.exists():
        key = keys.parse(given.read_text(errors="replace"))
    else:
        try:
            key = keys.unseal(pool.get(pool.SEALED))
        except Failed as error:
            pool.export()
            raise Refused("no disk was changed: the TPM does not give the pool's key to this stick. Have the "
                          "coordinating site decrypt the recovery key and put it on the stick as "
                          f"{FOLDER}/unlock.key ({error})") from None
    try:
        pool.load(key)
    except Failed as error:
        pool.export()
        raise Refused(f"no disk was changed: the key does not open the pool: {error}") from None
    return key


def _unpack(plan: Plan, root: str, key: bytes, source: Stick, box: str) -> None:
    _step("unpacking the system")
    TARGET.mkdir(parents=True, exist_ok=True)
    do("mount", root, str(TARGET))
    # Nothing may ever be written below the places of the datasets while the pool is locked.
    places = [TARGET / dataset.place.relative_to("/") for dataset in pool.DATASETS]
    outer = [place for place in places if not any(place.is_relative_to(other) for other in places if other != place)]
    for place in outer:
        place.mkdir(parents=True)
        do("chattr", "+i", str(place))
    if plan.kept:
        for place in outer:  # what is in the pool stays as it is
            do("mount", "-t", "tmpfs", "tmpfs", str(place))
    else:
        pool.mount(TARGET)
    do("unsquashfs", "-no-progress", "-quiet", "-force", "-dest", str(TARGET), source.image)
    if box:
        _step(f"settings of {box}")
        do("tar", "--extract", "--preserve-permissions", "--numeric-owner", "--xattrs", "--directory", str(TARGET),
           "--file", str(source.folder / f"site/{box}.tar"))
        gone = [str(TARGET / name) for name in json.loads((source.folder / f"site/{box}.json").read_text())["gone"]]
        if gone:
            do("rm", "--force", "--dir", *gone)
    if not plan.conf.tpm:
        place = TARGET / keys.OPEN_KEY.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch(0o600)
        place.write_bytes(key)


def _leave() -> None:
    """Let go of everything, so that the next step finds it on the disks."""
    pool.unmount(TARGET)
    if pool.imported():
        pool.export()
    tried("umount", str(TARGET))
    _release_arrays()


def _bootable(plan: Plan, image: Path) -> None:
    """The last step. Whatever the power does in it, the stick begins again, or the box starts and finishes it."""
    _step("making it bootable")
    do("sync")
    for disk in plan.system:
        boot.put(image, plan.partition(disk, "esp"))
    boot.register([(disk, 1) for disk in plan.system])
    for disk in plan.system:
        boot.mark(disk, 1, plan.relay, "esp")
    do("sync")


def unattended() -> int:
    """As the stick's unit runs it: everything on every console and on the stick, a clear end."""
    tell(*consoles())
    try:
        with stick() as source:
            tell(source.folder / "install.log", level=logging.DEBUG)
            try:
                install(source)
            except Refused as refusal:
                _end("REFUSED", refusal)
                return 3
            except Exception as error:  # whatever it is, the screen says how it ended
                _end("FAILED", error)
                return 1
    except Exception as error:
        _end("FAILED", error)
        return 1
    return 0


def _end(state: str, error: Exception) -> None:
    known = isinstance(error, Failed)
    if not known:
        log.debug("nobody thought of this", exc_info=error)
    for line in (str(error) if known else f"{type(error).__name__}: {error}").splitlines():
        log.error("%s", line)
    words = "put right what is said above and start the stick again" if state == "REFUSED" else (
        "the installation is not finished; start the stick again, and send relay/install.log from the stick to the "
        "coordinating site if that does not help")
    log.error("== %s: %s", state, words)
