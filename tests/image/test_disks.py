"""Disks of both profiles in real machines: installed, cut off, broken, replaced, stolen, rescued."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import time

import pytest

from tests.image.boxes import MARK, NUC, SUPERMICRO, Person, Stick, disks, install, installed, orders, status
from tests.image.vm import PATIENCE, VM, Disk, run, wait

pytestmark = [pytest.mark.full, pytest.mark.apart, pytest.mark.timeout(3600)]
RELAY = re.compile(r"Relay ([0-9a-f]{8}) is installed")
FILES = 100
WRITE = (f"for n in $(seq {FILES}); do dd if=/dev/urandom of=$n bs=1M count=1 conv=fsync status=none; "
         "sha256sum $n >> sums; sleep 0.2; done")


@pytest.fixture(scope="module")
def person(keys):
    return Person(keys / "keys/recovery.key", (keys / "keys/recovery.pub").read_text().strip())


@pytest.fixture(scope="module")
def words(fast):
    return orders(fast)


@pytest.fixture(scope="module")
def key(keys):
    return keys / "first-contact"


@pytest.fixture(scope="module")
def nuc(once, fast):
    return once("nuc", lambda folder: installed(folder, NUC, fast))


@pytest.fixture(scope="module")
def supermicro(once, fast):
    return once("supermicro", lambda folder: installed(folder, SUPERMICRO, fast))


def assert_nothing_failed(machine, key):
    machine.ssh("systemctl is-system-running --wait", key=key, check=False)
    assert machine.ssh("systemctl --failed --plain --no-legend", key=key).stdout == ""


def write(machine, key, text=MARK):
    """As if received; durable."""
    machine.ssh(f"echo '{text}' | sudo tee /var/lib/relay-agent/mark /etc/relay-agent/credentials/mark; sudo sync",
                key=key)


def read(machine, key):
    return machine.ssh("sudo cat /var/lib/relay-agent/mark", key=key).stdout.strip()


def assert_all_in_use(machine, key):
    """Each dataset is where it belongs, and the journal is on its own."""
    where = machine.ssh("findmnt --list -no SOURCE,TARGET -t zfs", key=key).stdout.split()
    assert dict(zip(where[1::2], where[::2], strict=True)) == {
        "/var/lib/relay-agent": "relay/data", "/var/lib/relay-agent/kspace": "relay/kspace",
        "/var/log/journal": "relay/journal", "/etc/relay-agent/credentials": "relay/secrets"}
    assert machine.ssh("sudo journalctl --header | grep -c 'File path: /var/log/journal'", key=key).stdout != "0\n"


def raw(disk, folder):
    """The bytes of a disk, as whoever pulls it out can read them."""
    path = folder / f"{disk.serial}.raw"
    run("qemu-img", "convert", "-U", "-O", "raw", disk.path, path)
    return path


def digest(disk):
    return hashlib.sha256(run("qemu-img", "map", "-U", "--output=json", disk.path).encode()
                          + disk.path.read_bytes()).hexdigest()


def test_nuc(nuc, key, tmp_path, person):
    """Everything that can hold patients' data is on the encrypted pool, which opens by itself, at every start."""
    recovery = person.decrypt(nuc.stick.recovery)
    assert re.fullmatch(r"([0-9a-f]{8}-){7}[0-9a-f]{8}", recovery)
    log = nuc.stick.get("relay/install.log").read_text()
    assert RELAY.search(log) and "BEGIN AGE ENCRYPTED FILE" in log and recovery not in log
    with nuc.copy(tmp_path) as machine:
        machine.wait_ssh(key=key)
        told = status(machine, key)
        assert told["findings"] == []
        assert told["pool"]["state"] == "ONLINE" and not told["pool"]["locked"]
        assert_all_in_use(machine, key)
        assert_nothing_failed(machine, key)
        assert "firewall" not in machine.log(), "what it drops runs over what the screen shows"
        write(machine, key)
        machine.ssh(f"logger {MARK}", key=key)
        machine.ssh("sudo journalctl --sync; sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
        machine.start()
        machine.wait_ssh(key=key)
        assert read(machine, key) == MARK
        machine.ssh("sudo sync", key=key)
        machine.cut()
        for disk in machine.disks:
            found = run("sh", "-c", f"grep -c --binary-files=text -F '{MARK}' {raw(disk, tmp_path)} || true")
            assert found.strip() == "0", "a disk that is pulled out tells what it has"


def test_another_machine_opens_nothing(nuc, key, tmp_path, person):
    """The disks in another board: locked, with words; the agent's folders stay empty; the recovery key opens them."""
    with nuc.copy(tmp_path / "own") as machine:
        machine.wait_ssh(key=key)
        write(machine, key)
        machine.ssh("sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
    stolen = VM(tmp_path / "other", [disk.overlay(tmp_path) for disk in machine.disks])
    with stolen:
        stolen.wait_for("LOCKED: the data of this box", seconds=180)
        stolen.wait_for("sudo relay-disk unlock", seconds=30)
        stolen.wait_ssh(key=key)
        assert stolen.ssh("sudo ls -A /var/lib/relay-agent /etc/relay-agent/credentials /var/log/journal | grep -v :",
                          key=key, check=False).stdout.strip() == ""
        refused = stolen.ssh("sudo touch /var/lib/relay-agent/x", key=key, check=False)
        assert "not permitted" in refused.stderr, "written in the open"
        assert "the pool is locked: relay-disk unlock" in status(stolen, key)["findings"]
        wrong = stolen.ssh(f"echo {'0' * 64} | sudo relay-disk unlock", key=key, check=False)
        assert wrong.returncode == 1
        recovery = person.decrypt(nuc.stick.recovery)
        stolen.ssh(f"echo {recovery} | sudo relay-disk unlock", key=key)
        assert_all_in_use(stolen, key)
        assert read(stolen, key) == MARK
        stolen.ssh(f"echo {recovery} | sudo relay-disk seal", key=key)
        stolen.ssh("sudo systemctl reboot", key=key, check=False)
        stolen.wait_for("Linux version", seconds=120)
        stolen.wait_ssh(key=key)
        assert read(stolen, key) == MARK, "a new main board is a new home, once a person with the key said so"


def test_locked_out_tpm(nuc, key, tmp_path):
    """A TPM counts power cuts as guesses, and the third is too many for this one; nobody has to come for that."""
    with nuc.copy(tmp_path) as machine:
        machine.wait_ssh(key=key)
        said = ""
        for _ in range(3):
            machine.cut()
            machine.start()
            machine.wait_ssh(key=key)
            said += machine.ssh("sudo journalctl -b -u relay-pool", key=key).stdout
        assert status(machine, key)["findings"] == []
        assert "the TPM is locked out" in said


def test_supermicro(supermicro, key, tmp_path):
    with supermicro.copy(tmp_path) as machine:
        machine.wait_ssh(key=key)
        told = status(machine, key)
        assert told["findings"] == []
        assert_nothing_failed(machine, key)
        assert [array["degraded"] for array in told["arrays"]] == [0]
        assert sorted(leaf["group"] for leaf in told["pool"]["devices"]) == [
            *["l2cache"] * 2, *["logs"] * 2, *["vdevs"] * 4]
        assert len(set(told["boot"].values())) == 1 and len(told["boot"]) == 2
        assert {disk["serial"]: disk["kind"] for disk in told["disks"]} == {
            serial: "disk" if kind == "hdd" else "SSD" for kind, serial, _ in SUPERMICRO}


@pytest.mark.parametrize("lost", ["SSD1", "SSD2"])
def test_each_ssd_starts_the_box_alone_and_is_replaced(supermicro, key, tmp_path, lost):
    """Also with firmware that knows nothing of the box; then a new SSD takes the place, and starts it alone too."""
    new = Disk.blank(tmp_path, "ssd", "NEW", "7G")
    with supermicro.copy(tmp_path, without=(lost,), extra=(new,)) as machine:
        machine.wait_ssh(key=key, seconds=240)
        findings = status(machine, key)["findings"]
        assert any("lacks 1 SSD" in finding for finding in findings), findings
        write(machine, key)
        assert "NEW" in machine.ssh("sudo relay-disk replace --plan", key=key).stderr
        machine.ssh("sudo relay-disk replace --wait", key=key, seconds=300)
        assert status(machine, key)["findings"] == []
        machine.ssh("sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
    left = [disk for disk in machine.disks if disk.kind == "hdd" or disk.serial == "NEW"]
    with VM(tmp_path, left) as alone:
        alone.wait_ssh(key=key, seconds=240)
        assert read(alone, key) == MARK


def test_data_disk_is_pulled_and_replaced(supermicro, key, tmp_path):
    """Pulled while the box runs and writes; nothing is lost; the new one is in step again."""
    new = Disk.blank(tmp_path, "hdd", "NEW", "2100M")
    with supermicro.copy(tmp_path, extra=(new,)) as machine:
        machine.wait_ssh(key=key, seconds=240)
        machine.ssh(f"sudo systemd-run --unit=writer --expand-environment=no --working-directory=/var/lib/relay-agent "
                    f"sh -euc '{WRITE}'", key=key)
        written = "sudo cat /var/lib/relay-agent/sums | wc -l"
        wait(lambda: int(machine.ssh(written, key=key).stdout) > 5, 60 * PATIENCE, "writing")
        machine.ssh("echo 1 | sudo tee /sys/block/$(lsblk -ndo NAME,SERIAL | sed -n 's/ *HDD2$//p')/device/delete",
                    key=key)
        assert int(machine.ssh(written, key=key).stdout) < FILES, "pulled too late"
        wait(lambda: machine.ssh("systemctl is-active writer", key=key, check=False).returncode, 120 * PATIENCE, "end")
        assert int(machine.ssh(written, key=key).stdout) == FILES, "the box stopped writing"
        told = status(machine, key)
        assert told["pool"]["state"] == "DEGRADED" and any("put in a new disk" in one for one in told["findings"])
        machine.ssh("sudo relay-disk replace --wait", key=key, seconds=300)
        assert status(machine, key)["findings"] == []
        machine.ssh("sudo zpool scrub -w relay", key=key, seconds=120)
        assert "with 0 errors" in machine.ssh("sudo zpool status relay", key=key).stdout
        machine.ssh("sudo sh -c 'cd /var/lib/relay-agent && sha256sum --check --quiet sums'", key=key)


def test_failing_disks_are_replaced(supermicro, key, tmp_path):
    """They are there and answer with errors, as most that fail: the box goes on, says so, and takes new ones."""
    new = Disk.blank(tmp_path, "ssd", "NEW1", "7G"), Disk.blank(tmp_path, "hdd", "NEW2", "2100M")
    with supermicro.copy(tmp_path, failing=("SSD1", "HDD2"), extra=new) as machine:
        machine.wait_ssh(key=key, seconds=400)
        told = status(machine, key)
        assert any("lacks 1 SSD" in one for one in told["findings"])
        assert any("put in a new disk" in one for one in told["findings"])
        assert {disk["holds"] for disk in told["spare"]} == {"blank", "cannot be read (Input/output error)"}
        write(machine, key)
        machine.ssh("sudo relay-disk replace --wait", key=key, seconds=400)
        assert status(machine, key)["findings"] == []
        assert read(machine, key) == MARK


def test_foreign_disk_is_left_alone(fast, words, tmp_path):
    """What has a table, a file system, or only data: refused, and not one byte is changed."""
    own = disks(tmp_path, SUPERMICRO)
    for disk, content in ((own[0], b"somebody's data, without any form" * 1000), (own[2], b"more" * 100000)):
        image = tmp_path / "content"
        with image.open("wb") as file:
            file.truncate(2 * 2**30)
            file.seek(700 * 2**20)
            file.write(content * 200)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, disk.path)
    before = [digest(disk) for disk in own]
    stick = Stick(fast, tmp_path / "stick", words)
    machine = VM(tmp_path, [stick.disk, *own])
    assert install(machine) == "REFUSED"
    shown = machine.log()
    assert "wipe = SSD1" in shown and "wipe = HDD1" in shown and "wipe = HDD2" not in shown
    assert [digest(disk) for disk in own] == before


def test_stick_for_another_profile(fast, words, tmp_path):
    own = disks(tmp_path, NUC)
    before = [digest(disk) for disk in own]
    machine = VM(tmp_path, [Stick(fast, tmp_path / "stick", f"{words}profile = supermicro\n").disk, *own])
    assert install(machine) == "REFUSED"
    assert "this stick was built for supermicro" in machine.log()
    assert [digest(disk) for disk in own] == before


def test_no_tpm(fast, words, tmp_path, key):
    """Refused; where the site allows it, the key lies in the open, and the box says so."""
    own = disks(tmp_path, NUC)
    before = [digest(disk) for disk in own]
    stick = Stick(fast, tmp_path / "stick", words)
    machine = VM(tmp_path, [stick.disk, *own], tpm=False)
    assert install(machine) == "REFUSED"
    assert "no TPM 2.0 that works" in machine.log()
    assert [digest(disk) for disk in own] == before
    stick.say(f"{words}tpm = optional\n")
    assert install(machine) == "DONE"
    with VM(tmp_path, own, tpm=False) as box:
        box.wait_ssh(key=key)
        assert status(box, key)["findings"] == ["the key lies in the open on the OS disk: a stolen disk can be read"]


@pytest.mark.parametrize("kinds", [NUC, SUPERMICRO], ids=["nuc", "supermicro"])
def test_power_cuts_during_installation(fast, words, key, tmp_path, kinds):
    """At each step and somewhere in it: the stick begins again by itself, until the box is there.

    Also when a cut left the stick's own file system half written.
    """
    chance = random.Random(4711)
    own = disks(tmp_path, kinds)
    stick = Stick(fast, tmp_path / "stick", words)
    stick.wound()
    machine = VM(tmp_path, [stick.disk, *own])
    steps = ["== partitions", "== file system", "== pool", "== unpacking", "== making it bootable"]
    for moment in steps:
        with machine:
            seen = machine.wait_for(moment, "== REFUSED", "== FAILED", seconds=400)
            assert seen == moment, machine.log()[-3000:]
            time.sleep(chance.uniform(0, 3))
    with machine:
        end = machine.wait_for("== DONE", "take the stick out", "== FAILED", seconds=400)
        assert end != "== FAILED", machine.log()[-3000:]
    assert stick.recovery.read_text().startswith("-----BEGIN AGE")
    with VM(tmp_path, own) as box:
        box.wait_ssh(key=key, seconds=240)
        assert status(box, key)["findings"] == []


def test_installed_box_is_not_installed_again(nuc, tmp_path, key):
    """A stick that was forgotten in the machine."""
    machine = nuc.copy(tmp_path, extra=(nuc.stick.disk.overlay(tmp_path),))
    assert install(machine) == "REFUSED"
    assert "take the stick out and start again" in machine.log()


def test_installed_anew_with_its_data(nuc, words, fast, tmp_path, key):
    """Also when that is cut off: the data stay, and no start of the stick takes them for nobody's."""
    with nuc.copy(tmp_path) as machine:
        machine.wait_ssh(key=key)
        write(machine, key)
        machine.ssh("echo old | sudo tee /etc/old; sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
    relay = RELAY.search(nuc.stick.get("relay/install.log").read_text())[1]
    stick = Stick(fast, tmp_path / "stick", f"{words}keep = {relay}\n")
    again = VM(tmp_path, [stick.disk, *machine.disks])
    with again:
        again.wait_for("== unpacking", seconds=300)
    stick.say(words)
    assert install(again) == "REFUSED", "without the word it is the box of somebody"
    stick.say(f"{words}keep = {relay}\n")
    assert install(again) == "DONE", again.log()[-3000:]
    with VM(tmp_path, machine.disks) as box:
        box.wait_ssh(key=key)
        assert read(box, key) == MARK
        assert box.ssh("test -e /etc/old", key=key, check=False).returncode == 1
        assert status(box, key)["findings"] == []


def test_rescue(nuc, words, fast, tmp_path, key, person):
    """From the stick, in another machine: shown, checked, opened read-only, brought away encrypted."""
    with nuc.copy(tmp_path / "own") as machine:
        machine.wait_ssh(key=key)
        write(machine, key)
        machine.ssh("sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
    before = [digest(disk) for disk in machine.disks]
    stick = Stick(fast, tmp_path / "stick", words, entry="rescue")
    away = Disk(tmp_path / "away.img", "usb", "AWAY")
    run("truncate", "-s", "64M", away.path)
    run("mformat", "-i", away.path, "-F", "::")
    recovery = person.decrypt(nuc.stick.recovery)
    with VM(tmp_path / "other", [stick.disk, away, *machine.disks]) as rescue:
        rescue.wait_for("Nothing on the disks of this machine was opened", seconds=240)
        for command, answer in (
                ("relay-disk show", "relay "), ("relay-disk check", "no fault found"),
                (f"echo {recovery} | relay-disk unlock --read-only", "open below /run/relay-rescue, read-only"),
                ("touch /run/relay-rescue/var/lib/relay-agent/x", "Read-only file system"),
                ("mount /dev/disk/by-id/usb-*AWAY-0:0 /mnt && mountpoint /mnt", "is a mountpoint"),
                (f"relay-disk copy /mnt --recipient {person.recipient}", ".tar.age: "),
                ("relay-disk close; umount /mnt; poweroff", "Power")):
            rescue.type(f"{command}\n")
            rescue.wait_for(answer, seconds=60)
        rescue.wait_off(60)
    assert [digest(disk) for disk in machine.disks] == before, "rescue changes nothing"
    run("mcopy", "-i", away.path, "::*.age", tmp_path)
    file = next(tmp_path.glob("*.tar.age"))
    run("sh", "-c", f"age --decrypt --identity {person.identity} {file} | tar -x -C {tmp_path} ./mark")
    assert (tmp_path / "mark").read_text().strip() == MARK


def test_retired(nuc, words, fast, tmp_path, key):
    """Not under another's name; then there is no pool, and the disks may be installed upon again."""
    relay = RELAY.search(nuc.stick.get("relay/install.log").read_text())[1]
    with nuc.copy(tmp_path) as machine:
        machine.wait_ssh(key=key)
        write(machine, key)
        machine.ssh("sudo systemctl stop relay-receive relay-work || true", key=key)
        other = machine.ssh("sudo relay-disk retire 00000000", key=key, check=False)
        assert other.returncode == 3 and f"this is relay {relay}" in other.stderr
        assert read(machine, key) == MARK
        assert "pool, " in machine.ssh(f"sudo relay-disk retire {relay}", key=key).stdout
        assert "no pools available" in machine.ssh("sudo zpool import 2>&1", key=key, check=False).stdout
        machine.ssh("sudo systemctl poweroff", key=key, check=False)
        machine.wait_off()
    stick = Stick(fast, tmp_path / "stick", f"{words}retired = {relay}\n")
    again = VM(tmp_path, [stick.disk, *machine.disks])
    assert install(again) == "DONE", again.log()[-3000:]


def section(program, name):
    """The content of a section of an EFI program (PE format, section headers)."""
    start, = struct.unpack_from("<I", program, 0x3C)
    count, size = struct.unpack_from("<H12xH", program, start + 6)
    for place in range(start + 24 + size, start + 24 + size + 40 * count, 40):
        found, length, at = struct.unpack_from("<8sI8xI", program, place)
        if found.rstrip(b"\0") == name:
            return program[at:at + length]
    raise LookupError(name)


def test_rescue_gets_no_key_from_the_tpm(nuc, words, fast, tmp_path):
    """Whoever has the box and its stick has a shell; the key is for boxes and installers alone (PCR 11, signed).

    Not even who takes the box's own signature along gets it: this is not what was signed.
    """
    stick = Stick(fast, tmp_path / "stick", words, entry="rescue")
    stick.put(section(stick.get("relay/box.efi").read_bytes(), b".pcrsig").decode(), "relay/signature")
    with nuc.copy(tmp_path, extra=(stick.disk,)) as rescue:
        rescue.wait_for("Nothing on the disks of this machine was opened", seconds=240)
        for command, answer in (
                ("relay-disk check", "no fault found"),
                ("mount -r PARTLABEL=relay-stick /mnt && mountpoint /mnt", "is a mountpoint"),
                ("zfs get -Ho value relay:sealed relay > sealed; wc -w sealed", "1 sealed"),
                ("systemd-creds decrypt --name=relay-pool --tpm2-signature=/mnt/relay/signature sealed key", "unseal"),
                ("ls key", "No such file")):
            rescue.type(f"{command}\n")
            rescue.wait_for(answer, seconds=60)
