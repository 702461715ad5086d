from __future__ import annotations

import json

import pytest


@pytest.fixture
def pool(host):
    """What relay-disk says of a box with disks of its own; the lab's containers have none."""
    if host.run("systemctl is-enabled relay-pool.service").rc:
        pytest.skip("this box has no pool of disks: its data are in a folder (storage_layout)")
    return json.loads(host.run("relay-disk status --json").stdout)


def test_disks_are_sound(pool):
    """What relay-disk finds is told to people; a new box has nothing of it."""
    assert pool["findings"] == []


def test_patients_data_are_encrypted(host, pool):
    """Everything that can hold them: data of the agent, raw data, the journal; and what opens destinations."""
    mounted = host.check_output("findmnt --list --noheadings --types zfs --output TARGET").split()
    assert {"/var/lib/relay-agent", "/var/lib/relay-agent/kspace", "/var/log/journal",
            "/etc/relay-agent/credentials"} <= set(mounted)
    assert host.check_output("zfs get -Ho value encryption relay") == "aes-256-gcm"


def test_raw_data_never_starve_dicom(host, pool):
    """What raw data may take and what DICOM is sure of is not more than there is."""
    def size(limit, dataset):
        return int(host.check_output(f"zfs get -Hpo value {limit} relay/{dataset}"))
    whole = sum(int(number) for number in host.check_output("zfs get -Hpo value used,available relay").split())
    assert 0 < size("quota", "kspace") + size("reservation", "data") < whole


def test_ledger_is_copied(host):
    """A copy can be made now, is whole, and nobody but the agent reads it."""
    host.check_output("systemctl start ledger-snapshot.service")
    copies = host.check_output("ls /var/lib/relay-agent/ledger-snapshots").split()
    assert copies and not [name for name in copies if not name.endswith(".sqlite")]
    copy = host.file(f"/var/lib/relay-agent/ledger-snapshots/{copies[-1]}")
    assert (copy.user, copy.group, copy.mode & 0o007) == ("relay-work", "relay-agent", 0)
    assert host.service("ledger-snapshot.timer").is_enabled
    assert host.service("ledger-snapshot.timer").is_running


def test_the_tool_refuses_what_is_no_box_of_ours(host):
    """Wherever it runs, it says why and changes nothing."""
    done = host.run("relay-disk plan --wipe NOT-A-DISK")
    assert done.rc == 3
    assert "NOT-A-DISK" in done.stderr
    assert "no disk was changed" in done.stderr
