from __future__ import annotations

import pytest


def test_nothing_failed(host):
    """A unit that failed is a fault somebody has to look at, whichever it is."""
    assert host.check_output("systemctl --failed --quiet --plain") == ""


def test_name(host, inventory):
    """Mails, receipts and logs name the box as the inventory does, or nobody finds the one that is meant."""
    assert host.check_output("hostname") in inventory["relays"].get("hosts", inventory["_meta"]["hostvars"])


def test_nothing_is_swapped(host):
    """Memory holds patients' data and the disk may not be encrypted."""
    assert host.check_output("systemctl show --property=LoadState swap.target") == "LoadState=masked"


def test_no_core_files(host):
    """A core file is memory on the disk."""
    assert host.check_output("systemctl show --property=DefaultLimitCORE") == "DefaultLimitCORE=0"


def test_journal_outlives_a_reboot(host):
    """What happened before a crash is what one wants to read after it."""
    assert host.file("/var/log/journal").is_directory
    assert "SystemMaxUse=" in host.file("/etc/systemd/journald.conf.d/box.conf").content_string


def test_security_updates(host):
    """They come by themselves, nothing else does, and the reboot waits for its hours and for the data."""
    settings = host.check_output("apt-config dump")
    assert 'APT::Periodic::Unattended-Upgrade "1";' in settings
    assert 'Unattended-Upgrade::Automatic-Reboot "false";' in settings
    origins = [line for line in settings.splitlines() if line.startswith("Unattended-Upgrade::Origins-Pattern::")]
    assert origins
    assert all("-security" in line for line in origins)
    assert host.service("box-reboot.timer").is_running


@pytest.mark.parametrize("file", ["/etc/sudoers.d/first-contact", "/etc/apt/sources.list"])
def test_no_left_overs(host, file):
    """Rights of the account the box was shipped with, and sources that nobody chose, end with the first set-up."""
    assert not host.file(file).exists


def test_time(host):
    """Time stamps prove deliveries and TLS depends on them; nobody may ask the box for the time, though."""
    assert host.service("chrony.service").is_enabled
    assert "port 0" in host.file("/etc/chrony/chrony.conf").content_string


def test_console_tells_what_plugging_in_needs(host, config):
    """The local administrator has no account, and the scanner's technician needs AE title and address."""
    shown = host.check_output("script --quiet --command 'agetty --show-issue' /dev/null")
    assert host.check_output("hostname") in shown
    assert "SHA256:" in shown
    assert all(f"AE title {receiver['ae_title']}" in shown for receiver in config["receiver"])
    assert all(f"{address}/" in shown for address in host.check_output("hostname -I").split() if ":" not in address)


def test_console_follows_addresses(host, peer, wait_for):
    """With DHCP the address is known only when the cable is in, and the one that is shown has to be the one that is."""
    peer("scanner")  # a box in service keeps its addresses

    def shown():
        return "198.18.255.7/32" in host.check_output("cat /run/issue.d/10-box.issue")
    try:
        host.check_output("ip address add 198.18.255.7/32 dev host0")
        assert wait_for(shown, 10)
    finally:
        host.check_output("ip address delete 198.18.255.7/32 dev host0")
    assert wait_for(lambda: not shown(), 10)


def test_reboot_is_due_when_what_runs_was_replaced(host):
    """A library that was updated is the old one until whatever runs it is started again; few updates ask for that."""
    assert host.run("/usr/local/lib/box/reboot-due").failed
    program = "/usr/local/bin/replaced"
    assert host.run(f"cp /usr/bin/sleep {program}; {program} 20 > /dev/null 2>&1 & sleep 1; rm {program}; "
                    "/usr/local/lib/box/reboot-due; due=$?; kill $!; exit $due").succeeded


def test_modules_stay_out(host):
    """A driver or protocol that no relay needs is code that a stick or a packet may reach."""
    known = host.check_output("modprobe --showconfig").splitlines()
    for module in ("firewire_core", "sctp", "bluetooth"):
        assert f"install {module} /bin/false" in known
