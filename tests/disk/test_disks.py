from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace

import pytest
from relay_disk import boot, destroy, disks, run
from relay_disk.disks import Part, human, identity, parse, reads_blank, unknown

from tests.disk.machines import GIB, disk, foreign, of_relay


def entry(path, **more):
    return {"path": path, "type": "disk", "size": 500 * GIB, "rota": False, "tran": "sata", "serial": "S", "model": "M",
            "rm": False, "ro": False, "pttype": None, "fstype": None, "uuid": None,
            "partlabel": None, "mountpoints": [None]} | more


def part(path, name, **more):
    return entry(path, type="part", partlabel=name, pttype="gpt", **more)


def test_parse():
    """A box that runs: mirror of the OS mounted, pool on the rest."""
    mirror = entry("/dev/md127", type="raid1", fstype="ext4", mountpoints=["/"])
    listing = {"blockdevices": [
        entry("/dev/sdb", pttype="gpt", serial=" S1 ", children=[
            part("/dev/sdb1", "relay-0123abcd-esp", fstype="vfat"),
            part("/dev/sdb2", "relay-0123abcd-root", fstype="linux_raid_member", children=[mirror]),
            part("/dev/nvme0n1p4", "relay-0123abcd-cache")]),
        entry("/dev/loop0", type="loop"), entry("/dev/sr0", type="rom"),
        entry("/dev/sdc", rota=True, fstype="zfs_member")]}
    first, second = parse(listing, {"/dev/sdb": "/dev/disk/by-id/ata-M_S1"})
    assert (first.serial, first.id, first.relay) == ("S1", "/dev/disk/by-id/ata-M_S1", "0123abcd")
    assert [(one.number, one.role) for one in first.parts] == [(1, "esp"), (2, "root"), (4, "cache")]
    assert (first.used, first.arrays) == (("/",), ("/dev/md127",))
    assert first.partition(3) == "/dev/disk/by-id/ata-M_S1-part3"
    assert (second.rotating, second.content, second.id, second.relay) == (True, "zfs_member", "", "")
    assert not unknown(first) and not unknown(second)


def test_volumes_and_mappings_are_use():
    """Also what is not mounted: a container that is open, a volume group."""
    child = part("/dev/sdb1", "", fstype="crypto_LUKS", children=[entry("/dev/mapper/x", type="crypt")])
    found, = parse({"blockdevices": [entry("/dev/sdb", pttype="gpt", children=[child])]}, {})
    assert found.used == ("/dev/mapper/x",)


def test_this_machine():
    """Real lsblk, whatever it has."""
    assert disks._COLUMNS.startswith("NAME,"), "without it lsblk lists partitions beside their disks, not below"
    for one in disks.scan(look_inside=False):
        assert one.path.startswith("/dev/") and one.size >= 0


@pytest.mark.parametrize("name, relay, role", [
    ("relay-0123abcd-esp", "0123abcd", "esp"), ("relay-0123abcd-installing", "0123abcd", "installing"),
    ("relay-0123abcd-pool2", "", ""), ("relay-0123ABCD-esp", "", ""), ("relay-image", "", ""), ("", "", "")])
def test_names_of_partitions(name, relay, role):
    one = Part(1, "/dev/x1", name, GIB, "")
    assert (one.relay, one.role) == (relay, role)


def test_disk_of_two_relays_belongs_to_none():
    mixed = [*of_relay("D", "0123abcd", "nuc").parts, *of_relay("D", "feedbeef", "nuc").parts]
    assert disk("D", parts=mixed).relay == ""


@pytest.mark.parametrize("names, best", [
    (["wwn-0x5000", "ata-Samsung_SSD_870_S5Y"], "ata-Samsung_SSD_870_S5Y"),
    (["nvme-eui.0025385", "nvme-Samsung_SSD_990_S7_1", "nvme-Samsung_SSD_990_S7"], "nvme-Samsung_SSD_990_S7"),
    (["nvme-eui.0025385"], "nvme-eui.0025385"), (["scsi-35000", "scsi-SSEAGATE_X_1", "wwn-0x5"], "scsi-SSEAGATE_X_1"),
    (["lvm-pv-uuid-1"], None), ([], None)])
def test_identity(names, best):
    for order in (names, names[::-1]):
        assert identity(order) == best


@pytest.mark.parametrize("size, words", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (500107862016, "500 GB"),
                                         (4000787030016, "4 TB"), (12 * 10**15, "12000 TB")])
def test_human(size, words):
    assert human(size) == words


@pytest.mark.parametrize("places, blank", [
    ((), True), ((0, 510, 23 * 1024, -1, -24 * 1024), True), ((24 * 1024,), False), ((2**20,), False),
    ((16 * 2**20 - 1,), False), ((-24 * 1024 - 1,), False), ((-8 * 2**20,), False)])
def test_blank(tmp_path, places, blank):
    """One byte at either end is enough, but where a table lies: one cut off while it was written is none."""
    path = tmp_path / "disk"
    size = 256 * 2**20
    with path.open("wb") as file:
        file.truncate(size)
        for place in places:
            file.seek(place % size)
            file.write(b"x")
    assert reads_blank(str(path), size) is blank


def test_data_in_the_middle(tmp_path):
    """A file system whose ends were wiped."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1024 * 2**20)
        file.seek(400 * 2**20)
        file.write(os.urandom(8 * 2**20))
    assert not reads_blank(str(path), path.stat().st_size)


def test_erased_flash(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * 40 * 2**20)
    assert reads_blank(str(path), 40 * 2**20)


def test_disk_that_fails_is_told_as_such(monkeypatch):
    """It is why people ask, so asking must not end with it; nor is it anything that may be written to."""
    listing = {"blockdevices": [entry("/proc/self/mem", size=GIB, serial="FAILS")]}  # where nothing can be read
    monkeypatch.setattr(disks, "ask", lambda *_: json.dumps(listing))
    found, = disks.scan()
    assert not found.empty
    assert found.holds == "cannot be read (Input/output error)"


def test_boot_partition_that_cannot_be_read():
    """As that of an SSD that is about to fail: it is nothing to start from, and no end of the question either."""
    assert boot.digest("/dev/no-such-disk-part1") == ""


@pytest.mark.parametrize("now, words", [
    ([], "not there any more"), ([disk("OTHER")], "not there any more"),
    ([disk("D", size=GIB)], "not there any more"),
    ([disk("D", used=("/srv",))], "in use: /srv")])
def test_destroy_looks_again(monkeypatch, now, words, tmp_path):
    """What was pulled, swapped or mounted since the plan is left alone."""
    monkeypatch.setattr(destroy, "scan", lambda look_inside: now)
    with pytest.raises(run.Failed, match=words):
        destroy.destroy((disk("D"),), "touch", str(tmp_path / "done"))
    assert not (tmp_path / "done").exists()


def test_destroy(monkeypatch, tmp_path):
    monkeypatch.setattr(destroy, "scan", lambda look_inside: [disk("D"), foreign("E")])
    destroy.destroy((disk("D"),), "touch", str(tmp_path / "done"))
    assert (tmp_path / "done").exists()


def test_erase(monkeypatch):
    """A partition of ours, also on the disk that the system runs from; not what was put in its place."""
    calls = []
    ssd = of_relay("S", "0123abcd", "nuc")
    monkeypatch.setattr(destroy, "tried", lambda *command: bool(calls.append(command)))
    monkeypatch.setattr(destroy, "do", lambda *command: calls.append(command))
    monkeypatch.setattr(destroy, "scan", lambda look_inside: [replace(ssd, used=("/",))])
    assert "overwritten" in destroy.erase(ssd, ssd.part("pool"))
    assert [command[0] for command in calls] == ["blkdiscard", "dd", "dd"]
    monkeypatch.setattr(destroy, "scan", lambda look_inside: [replace(ssd, parts=())])
    with pytest.raises(run.Failed, match="has no partition"):
        destroy.erase(ssd, ssd.part("pool"))
    monkeypatch.setattr(destroy, "scan", lambda look_inside: [replace(ssd, serial="OTHER")])
    with pytest.raises(run.Failed, match="not there any more"):
        destroy.erase(ssd, ssd.part("pool"))
    assert len(calls) == 3


def test_nothing_else_destroys():
    """Every program that can erase a disk is called by way of destroy() alone."""
    folder = os.path.dirname(disks.__file__)
    found = subprocess.run(["grep", "-nE", r'(do|ask|tried)\("(sfdisk|wipefs|mk[a-z0-9.]*fs[a-z0-9.]*|mke2fs|dd)"|'
                            r'(do|ask|tried)\("zpool", "(create|labelclear)|"mdadm", "--create', "-r", folder,
                            "--include=*.py"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in found.splitlines() if "destroy(" not in line]
    assert [line for line in lines if "--part-label" not in line] == []


def test_failed_command_says_which():
    with pytest.raises(run.Failed, match=r"false failed \(1\)"):
        run.do("false")
    with pytest.raises(run.Failed, match="no-such-program is not installed"):
        run.ask("no-such-program")
