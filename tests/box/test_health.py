from __future__ import annotations

import json
import re

import pytest

alone = pytest.mark.usefixtures("alone")
KEYS = {"box", "time", "findings", "disks", "drives", "pools", "temperatures", "memory", "bmc", "clock", "mail",
        "agent", "services", "failed", "certificates", "reboot_needed"}


@pytest.fixture
def health(host):
    """Ask the box."""
    def ask():
        return json.loads(host.run("box-health --json").stdout)
    return ask


def findings(found):
    return {each["name"]: each["text"] for each in found["findings"]}


@alone
def test_all_is_well(host, health):
    """What it finds on a box that is as it should be is either wrong or has to be mended now."""
    found = health()
    assert found["findings"] == []
    assert set(found) == KEYS
    assert found["box"] == host.check_output("hostname")
    assert set(found["services"].values()) == {"active"}
    assert abs(found["clock"]["offset_seconds"]) < 1
    assert found["agent"]["release"] in host.check_output("readlink /opt/relay-agent/current")


def test_looks_by_itself(host):
    """A status that nobody asks for is of no use; what is new is mailed."""
    assert host.service("box-health.timer").is_running
    assert host.service("box-health.timer").is_enabled


@pytest.mark.parametrize("unit", ["box-health", "box-drives", "box-console", "relay-share"])
def test_sandbox(host, unit):
    """What runs as root, or is reached from a network, must not be able to do more than it has to."""
    if not host.file(f"/etc/systemd/system/{unit}.service").exists:
        pytest.skip(f"{unit} is on boxes that share raw data by SMB, and this one does not")
    shown = host.check_output(f"systemd-analyze security --no-pager {unit}.service")
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)[1]) <= 2.0


@pytest.fixture
def full_disk(host, peer):
    """A small file system that somebody fills."""
    peer("central")
    host.check_output("mkdir -p /mnt/full && mount -t tmpfs -o size=1M full /mnt/full && "
                      "head -c 1000k /dev/zero > /mnt/full/x")
    yield "disk /mnt/full"
    host.run("umount /mnt/full; rmdir /mnt/full")


@alone
def test_full_disk_is_told_once(host, peer, health, full_disk, wait_for):
    """It is in the status, and mailed: once, not every quarter of an hour, and once more when it is well again."""
    name = host.check_output("hostname")

    def mails():
        return int(peer("central").check_output(f"grep -hr '^{full_disk}' /var/lib/mail/new | wc -l"))
    before = mails()
    assert "% full" in findings(health())[full_disk]
    host.check_output("systemctl start box-health")
    assert wait_for(lambda: mails() == before + 1, 30)
    host.check_output("systemctl start box-health && umount /mnt/full && systemctl start box-health")
    assert wait_for(lambda: mails() == before + 2, 30)
    mail = peer("central").check_output(f"grep -lr '^Subject: {name}: .*{full_disk}' /var/lib/mail/new").split()[0]
    assert "X-MailFrom: relay@hospital.example.org" in peer("central").file(mail).content_string
    assert full_disk not in findings(health())


@alone
def test_wrong_clock_is_told(peer, health):
    """Time stamps prove deliveries; a clock that is wrong together with its log proves the contrary."""
    central = peer("central")
    central.check_output("systemctl stop clock && systemd-run --unit=wrong-clock --working-directory=/srv/relay "
                         "/usr/bin/python3 molecule/lab/clock.py 3600")
    try:
        found = health()
        assert found["clock"]["offset_seconds"] == pytest.approx(3600, abs=60)
        assert "behind its servers" in findings(found)["clock"]
    finally:
        central.check_output("systemctl stop wrong-clock; systemctl start clock")


def test_no_time_server_is_told(host, peer, health):
    """As in a hospital whose firewall lets no time through."""
    peer("central")
    host.check_output("nft insert rule inet box output udp dport 123 drop")
    try:
        assert "time servers" in findings(health())
    finally:
        host.check_output("nft -f /etc/nftables.conf")


@alone
def test_mail_that_cannot_leave_is_in_the_status(host, peer, health, wait_for):
    """The message that says so is in the same queue; nothing of it is lost when the mail server is back."""
    central = peer("central")
    marker = f"waiting-{host.check_output('cat /proc/sys/kernel/random/uuid')}"
    central.check_output("systemctl stop mail")
    try:
        host.check_output("sed -i 's/\"mail_hours\": [0-9]*/\"mail_hours\": 0/' /etc/box-health.json")
        host.check_output(f"printf 'Subject: {marker}\\n\\n' | sendmail root")
        assert wait_for(lambda: "refused" in findings(health()).get("mail", ""), 30)
    finally:
        host.check_output("sed -i 's/\"mail_hours\": 0/\"mail_hours\": 4/' /etc/box-health.json")
        central.check_output("systemctl start mail")

    def arrived():  # the server takes a moment to start
        host.check_output("postqueue -f")
        return central.run(f"grep -r {marker} /var/lib/mail/new").succeeded
    assert wait_for(arrived)
    assert wait_for(lambda: health()["mail"]["queued"] == 0, 30)


def test_what_failed_is_named(host, peer, health):
    """Any unit: one that nobody thought of is the one that is forgotten."""
    peer("central")
    host.run("systemd-run --wait --unit=it-fails false")
    assert "unit it-fails.service" in findings(health())
    host.check_output("systemctl reset-failed it-fails.service")
