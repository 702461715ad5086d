"""Machines that were installed from a stick, as sets of frozen disks with the board (TPM, firmware) they belong to."""

from __future__ import annotations

import json
import mmap
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.image.vm import VM, Disk, run

# Small disks; a real box has the defaults.
SIZES = "root = 4 GiB\nesp = 192 MiB\nlog = 256 MiB\n"
NUC = (("nvme", "NVME1", "8G"),)
SUPERMICRO = (*(("ssd", f"SSD{n}", "7G") for n in (1, 2)), *(("hdd", f"HDD{n}", "2G") for n in range(1, 5)))
MARK = "Mustermann^Petra^4711"  # as if of a patient


@dataclass(frozen=True)
class Person:
    """Somebody at the coordinating site, who has the key that decrypts recovery keys."""

    identity: Path
    recipient: str

    def decrypt(self, file: Path) -> str:
        """What was encrypted to them."""
        return run("age", "--decrypt", "--identity", self.identity, file).strip()


def disks(folder: Path, kinds) -> list[Disk]:
    """New, blank disks."""
    folder.mkdir(parents=True, exist_ok=True)
    return [Disk.blank(folder, *kind) for kind in kinds]


class Stick:
    """A stick of its own for a test, with words in its ``install.conf``."""

    def __init__(self, image: Path, folder: Path, words: str, entry: str = "install") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "stick.img"
        run("cp", "--sparse=always", image, self.path)
        self.say(words)
        if entry != "install":
            self.put(f"timeout 0\ndefault {entry}.conf\n", "loader/loader.conf")

    def say(self, words: str) -> None:
        """Change what it says."""
        self.put(words, "relay/install.conf")

    def put(self, text: str, path: str) -> None:
        """Write a file to it, as people do with any computer."""
        (self.folder / "file").write_text(text)
        run("mcopy", "-o", "-i", f"{self.path}@@1M", self.folder / "file", f"::{path}")

    def get(self, path: str) -> Path:
        """A copy of a file of it."""
        run("mcopy", "-o", "-n", "-i", f"{self.path}@@1M", f"::{path}", self.folder)
        return self.folder / Path(path).name

    def wound(self) -> None:
        """Leave its log as a power cut may: more clusters than its size says; a kernel that goes on there stops."""
        self.put("x" * 100_000, "relay/install.log")
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
            entry = image.find(b"INSTALL LOG")
            assert entry > 0, "its log is not where it was put"
            image[entry + 28:entry + 32] = (60_000).to_bytes(4, "little")  # the size: FAT specification 1.03, section 6

    @property
    def disk(self) -> Disk:
        """As the machine sees it."""
        return Disk(self.path, "usb", "STICK")

    @property
    def recovery(self) -> Path:
        """The recovery key that the installer left."""
        names = run("mdir", "-b", "-i", f"{self.path}@@1M", "::relay/").split()
        return self.get(next(name for name in names if "recovery-" in name).removeprefix("::"))


def install(machine: VM) -> str:
    """Start the installer and wait for its end: ``DONE``, ``REFUSED`` or ``FAILED``."""
    with machine:
        end = machine.wait_for("== DONE", "== REFUSED", "== FAILED", seconds=400)
        if end == "== DONE":
            machine.wait_off(60)
            assert "Disk failure" not in machine.log(), "a mirror was put together and broken behind the installer"
        else:
            machine.wait_for("stick again", seconds=20)
    return end.removeprefix("== ")


@dataclass(frozen=True)
class Box:
    """An installed box, switched off; every test starts a copy of its own."""

    folder: Path
    disks: tuple[Disk, ...]
    stick: Stick

    def copy(self, folder: Path, *, without: tuple[str, ...] = (), failing: tuple[str, ...] = (),
             extra: tuple[Disk, ...] = (), board: bool = True, **more) -> VM:
        """The same box, disks as overlays; ``without`` some of them; another board (TPM) if not ``board``.

        Of those that are ``failing`` nothing can be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if board:
            shutil.copy(self.folder / "variables.fd", folder)
            shutil.copytree(self.folder / "tpm", folder / "tpm")
        own = [replace(disk.overlay(folder), failing=disk.serial in failing)
               for disk in self.disks if disk.serial not in without]
        return VM(folder, [*extra, *own], **more)


def orders(image: Path) -> str:
    """What a stick says as it was built, and smaller sizes."""
    return run("mtype", "-i", f"{image}@@1M", "::relay/install.conf") + SIZES


def installed(folder: Path, kinds, image: Path) -> Box:
    """A box from blank disks; what is on them is from now on left alone."""
    stick, own = Stick(image, folder / "stick", orders(image)), disks(folder, kinds)
    machine = VM(folder, [stick.disk, *own])
    begin = time.monotonic()
    assert install(machine) == "DONE", machine.log()[-3000:]
    print(f"installed in {time.monotonic() - begin:.0f} s")
    return Box(folder, tuple(own), stick)


def status(machine: VM, key: Path) -> dict:
    """What relay-disk says of itself."""
    done = machine.ssh("sudo relay-disk status --json", key=key, check=False)
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return json.loads(done.stdout)
