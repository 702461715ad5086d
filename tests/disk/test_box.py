from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from relay_disk import box, key, pool, replace, rescue, status
from relay_disk.run import Failed, Refused

from tests.disk.machines import GIB, disk, foreign, nuc, of_relay, relay_supermicro

ROLE = Path(__file__).resolve().parents[2] / "roles/storage"
RELAY = "0123abcd"
DAY = 86400


def leaf(path, group="vdevs", state="ONLINE"):
    return status.Leaf(group, f"guid of {path}", path, state, 0)


def running(disks):
    """The same disks as a box has them that runs from them."""
    return [type(one)(**vars(one) | {"used": ("/",), "arrays": ("/dev/md127",)}) if one.part("root") else one
            for one in disks]


def test_own():
    assert box.own(running(relay_supermicro(RELAY))) == RELAY
    for others in (nuc(), relay_supermicro(RELAY), [foreign("D", used=("/",))]):
        with pytest.raises(Failed):
            box.own(others)


def test_replace_a_data_disk():
    disks = [*running(relay_supermicro(RELAY))[:5], disk("NEW", rotating=True)]
    swap, = replace.decide(disks, RELAY, [leaf("HDD4", state="UNAVAIL")], 0)
    assert (swap.disk.serial, swap.system, swap.lost[0].path) == ("NEW", False, "HDD4")
    assert swap.parts[0][:2] == ("pool", 1024), "as large as those of the others"


def test_replace_an_ssd():
    disks = [*running(relay_supermicro(RELAY))[1:], disk("NEW")]
    lost = [leaf("l", "logs", "UNAVAIL"), leaf("c", "l2cache", "UNAVAIL")]
    swap, = replace.decide(disks, RELAY, lost, 1)
    assert (swap.disk.serial, swap.system) == ("NEW", True)
    assert [part[:2] for part in swap.parts] == [("esp", 1024), ("root", 1024), ("log", 1024), ("cache", 0)]
    assert list(swap.lost) == lost


def test_replace_both_kinds_at_once():
    disks = [*running(relay_supermicro(RELAY))[1:5], disk("S"), disk("H", rotating=True)]
    lost = [leaf("l", "logs", "UNAVAIL"), leaf("c", "l2cache", "UNAVAIL"), leaf("HDD4", state="REMOVED")]
    assert [(swap.disk.serial, swap.system) for swap in replace.decide(disks, RELAY, lost, 1)] == [
        ("S", True), ("H", False)]


@pytest.mark.parametrize("new, words", [
    ([], "no other disk is built in"), ([foreign("N", rotating=True)], "--wipe N"),
    ([of_relay("N", "feedbeef", "data")], "--wipe N"), ([of_relay("N", RELAY, "data")], "no other disk"),
    ([disk("N")], "no other disk"), ([disk("N", rotating=True, size=GIB)], "no other disk"),
    ([disk("N", rotating=True, transport="usb")], "no other disk")])
def test_replace_by_what_does_not_fit(new, words):
    """Somebody's data, one of this box's own disks, an SSD, one that is too small, a stick."""
    with pytest.raises(Refused, match=words):
        replace.decide([*running(relay_supermicro(RELAY))[:5], *new], RELAY, [leaf("HDD4", state="UNAVAIL")], 0)


def test_replace_by_a_used_disk_that_is_named():
    disks = [*running(relay_supermicro(RELAY))[:5], foreign("N", rotating=True)]
    assert replace.decide(disks, RELAY, [leaf("HDD4", state="UNAVAIL")], 0, ["N"])[0].disk.serial == "N"


def test_nothing_to_replace():
    with pytest.raises(Refused, match="no disk of this box failed"):
        replace.decide([*running(relay_supermicro(RELAY)), disk("N", rotating=True)], RELAY, [], 0)


def test_a_disk_of_the_box_is_never_the_new_one():
    disks = running(relay_supermicro(RELAY))
    with pytest.raises(Refused):
        replace.decide(disks, RELAY, [leaf("HDD4", state="FAULTED")], 1)


STATE = {"state": "DEGRADED", "vdevs": {"relay": {"name": "relay", "guid": 1, "state": "DEGRADED", "vdevs": {
    "mirror-0": {"name": "mirror-0", "guid": 2, "state": "DEGRADED", "vdevs": {
        "a": {"name": "a", "guid": 3, "path": "/dev/a", "state": "ONLINE", "read_errors": 1, "checksum_errors": 2},
        "b": {"name": "b", "guid": 4, "state": "UNAVAIL"}}}}}},
    "logs": {"mirror-2": {"name": "mirror-2", "guid": 5, "state": "ONLINE", "vdevs": {
        "c": {"name": "c", "guid": 6, "path": "/dev/c", "state": "ONLINE"}}}},
    "l2cache": {"d": {"name": "d", "guid": 7, "path": "/dev/d", "state": "UNAVAIL"}}}


def test_leaves():
    assert [(one.group, one.guid, one.path, one.state, one.errors) for one in status.leaves(STATE)] == [
        ("vdevs", "3", "/dev/a", "ONLINE", 3), ("vdevs", "4", "b", "UNAVAIL", 0), ("logs", "6", "/dev/c", "ONLINE", 0),
        ("l2cache", "7", "/dev/d", "UNAVAIL", 0)]


def healthy():
    mirror = {"path": "/dev/md127", "wanted": 2, "degraded": 0, "doing": ""}
    return {"relay": RELAY, "disks": [], "spare": [], "arrays": [mirror],
            "boot": {"S1": "aa", "S2": "aa"}, "key": "sealed", "secure_boot": True, "pool": {
                "state": "ONLINE", "locked": False, "errors": 0, "doing": "", "scrubbed": None, "capacity": 10,
                "recovery": True, "sealed": True, "devices": [vars(leaf("/dev/a"))]}}


def test_healthy_box_has_no_findings():
    assert list(status.findings(healthy(), 100 * DAY)) == []
    assert "nothing to do" in status.text(healthy() | {"findings": []})


@pytest.mark.parametrize("change, words", [
    ({"arrays": [{"path": "/dev/md127", "wanted": 2, "degraded": 1, "doing": ""}]}, "lacks 1 SSD"),
    ({"boot": {"S1": "aa", "S2": "bb"}}, "boot partitions differ"),
    ({"boot": {"S1": "aa", "S2": ""}}, "relay-disk boot"),
    ({"key": "open"}, "in the open")])
def test_findings(change, words):
    found = list(status.findings(healthy() | change, 100 * DAY))
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("change, words", [
    ({"locked": True}, "relay-disk unlock"), ({"errors": 3}, "3 files or blocks"),
    ({"scrubbed": 10 * DAY}, "90 days ago"),
    ({"capacity": 86}, "86 % full"), ({"recovery": False}, "no recovery key"), ({"state": "SUSPENDED"}, "SUSPENDED"),
    ({"devices": [vars(leaf("/dev/a", state="FAULTED"))]}, "/dev/a is FAULTED: put in a new disk"),
    ({"devices": [vars(leaf("/dev/a")) | {"errors": 2}]}, "had 2 errors")])
def test_findings_of_the_pool(change, words):
    told = healthy()
    told["pool"] |= change
    found = list(status.findings(told, 100 * DAY))
    assert len(found) == 1 and words in found[0]


def test_pool_that_is_not_there():
    told = healthy()
    del told["pool"]
    assert list(status.findings(told, 0)) == ["the pool is not here: see systemctl status relay-pool"]


def test_key_as_people_type_it():
    secret = key.new()
    assert key.parse(key.words(secret)) == secret
    assert key.parse(f"  {key.words(secret).upper().replace('-', ' ')}\n") == secret
    assert len(key.words(secret)) == 71


@pytest.mark.parametrize("text", ["", "abcd", "x" * 64, "0" * 63, "0" * 66])
def test_no_key(text):
    with pytest.raises(Failed, match="64 hexadecimal digits"):
        key.parse(text)


@pytest.fixture
def tpm(monkeypatch, tmp_path):
    """Stands for the programs that ask a TPM, with the words of a real lock-out; ``asked`` is what was called."""
    for name, script in (
            ("systemd-creds", """[ -e cleared ] && printf 4b && exit; cat words >&2; exit 1"""),
            ("tpm2_dictionarylockout", """[ "$1" = --clear-lockout ] && touch cleared""")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncd {tmp_path}; echo {name} >> asked; {script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "words").write_text("ERROR:esys:src/tss2-esys/api/Esys_Load.c:112:Esys_Load() Esys Finish ErrorCode "
                                    "(0x00000921) \nFailed to unseal secret using TPM2: No locks available\n")
    return tmp_path


def test_power_cuts_do_not_lock_the_tpm_out(tpm):
    """It counts each as a guess, and after a few gives nobody anything; nothing here has a password to guess."""
    assert key.unseal("sealed") == b"K"
    assert (tpm / "asked").read_text().split() == ["systemd-creds", "tpm2_dictionarylockout", "systemd-creds"]


def test_another_tpm_is_no_lock_out(tpm):
    (tpm / "words").write_text("Failed to unseal secret using TPM2: Operation not permitted\n")
    with pytest.raises(Failed, match="not permitted"):
        key.unseal("sealed")
    assert (tpm / "asked").read_text().split() == ["systemd-creds"]


@pytest.mark.parametrize("size", [10 * GIB, 900 * GIB, 20000 * GIB])
def test_shares(size):
    """What is sure for one can be taken by no other."""
    limits = pool.shares(size, 50, 40)
    sure = sum(limit.get("reservation", 0) for limit in limits.values())
    assert limits["kspace"]["quota"] + sure <= size
    assert "quota" not in limits["data"], "DICOM may take all that nothing else has"
    assert limits["journal"]["quota"] == limits["journal"]["reservation"]


@pytest.mark.parametrize("disks, whole", [
    (relay_supermicro(RELAY), True), (relay_supermicro(RELAY)[:5], False), (relay_supermicro(RELAY)[1:], False),
    ([of_relay("D", RELAY, "nuc")], True), ([], False)])
def test_all_disks_are_there(disks, whole):
    assert pool.complete(disks) is whole


def test_only_what_was_delivered_is_left_behind(tmp_path):
    """From a ledger as the agent makes it, in the middle of its work."""
    from relay_agent.ledger import Ledger

    ledger = Ledger(tmp_path / "ledger.sqlite")
    with ledger.write() as connection:
        for number, state in enumerate(["gathering", "held", "ready", "delivered", "purged", "rejected"], 1):
            connection.execute("INSERT INTO shipment (id, study_uid, receiver, supplement, state, opened, "
                               "last_arrival, changed) VALUES (?, ?, 'r', 0, ?, 0, 0, 0)",
                               (number, f"1.{number}", state))
            connection.execute("INSERT INTO instance (receiver, sop_instance, sop_class, transfer_syntax, digest, "
                               "size, path, via, calling_ae, arrived, shipment) "
                               "VALUES ('r', '1', '1', '1', ?, 1, ?, 'dicom', 'AE', 0, ?)",
                               (bytes([number]), f"r/{state}.dcm", number))
    assert (tmp_path / "ledger.sqlite-wal").stat().st_size, "what is told lies in the log alone"
    assert rescue.settled(tmp_path / "ledger.sqlite") == ["r/delivered.dcm", "r/purged.dcm"]
    sqlite3.connect(tmp_path / "other.sqlite").executescript("CREATE TABLE t (x)")
    with pytest.raises(Failed, match="--all"):
        rescue.settled(tmp_path / "other.sqlite")


def test_the_role_mounts_what_the_tool_makes():
    datasets = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__storage_datasets"]
    assert [(one["name"], one["path"]) for one in datasets] == [(one.name, str(one.place)) for one in pool.DATASETS]
    for one in datasets:
        escaped = one["path"][1:].replace("-", r"\x2d").replace("/", "-")
        assert one["unit"] == f"{escaped}.mount", "systemd takes no other name"


def test_snapshot_of_a_ledger_in_use(tmp_path):
    """While it is written to; whole, in a file of its own, and old ones go only when a new one is there."""
    from relay_agent.ledger import Ledger

    def snapshot():
        command = [sys.executable, ROLE / "files/ledger-snapshot", tmp_path, "14"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ledger = Ledger(tmp_path / "ledger.sqlite")
    with ledger.write() as connection:
        connection.execute("INSERT INTO event (at, actor, what) VALUES (0, 'test', 'before')")
    folder = tmp_path / "ledger-snapshots"
    folder.mkdir()
    for days in (3, 20):
        old = folder / f"ledger-{days}.sqlite"
        old.touch()
        os.utime(old, (time.time() - days * DAY,) * 2)
    with ledger.write() as connection:
        connection.execute("INSERT INTO event (at, actor, what) VALUES (0, 'test', 'not yet committed')")
        assert snapshot().returncode == 0
    assert not (folder / "ledger-20.sqlite").exists() and (folder / "ledger-3.sqlite").exists()
    copy, = [path for path in folder.iterdir() if path.stat().st_size]
    assert copy.name.startswith("ledger-2") and copy.suffix == ".sqlite"
    assert sqlite3.connect(copy).execute("SELECT what FROM event").fetchall() == [("before",)]

    (tmp_path / "ledger.sqlite-wal").unlink()
    (tmp_path / "ledger.sqlite").write_bytes(b"no ledger" * 1000)
    (folder / "ledger-3.sqlite").touch()
    assert snapshot().returncode
    assert copy.exists() and (folder / "ledger-3.sqlite").exists()
