from __future__ import annotations

import pytest


def test_watchdog(host):
    """Nobody is there to press the button when it hangs."""
    assert host.check_output("systemctl show --value --property=RuntimeWatchdogUSec") == "30s"


@pytest.mark.parametrize("name", ["intel-microcode", "amd64-microcode", "smartmontools"])
def test_installed(host, name):
    """Processors have holes that only their makers close; drives tell before they fail."""
    assert host.package(name).is_installed


def test_smartd_understands_its_settings(host):
    """One that does not start watches nothing. (17: there are no drives, as in a container.)"""
    done = host.run("smartd --quit=onecheck --configfile=/etc/smartd.conf")
    assert done.rc in (0, 17), done.stdout


@pytest.mark.usefixtures("alone")
def test_drives_mail_reaches_people(host, peer, wait_for):
    """smartd calls a program of ours with what it has to say; a fault in that would be found by a dead drive."""
    name = host.check_output("hostname")
    host.check_output("env SMARTD_SUBJECT='SMART error (FailedHealthCheck)' SMARTD_FULLMESSAGE='Device: /dev/nvme0' "
                      "/usr/local/lib/box/smartd-mail")
    assert wait_for(lambda: peer("central").run(
        f"grep -lr 'Subject: {name}: SMART error' /var/lib/mail/new").succeeded)


def test_console_of_the_bmc_is_there_where_one_is(host):
    """Its sensors and its log are in the box's health; without a BMC nothing of it may fail."""
    if host.file("/dev/ipmi0").exists:
        assert host.run("ipmitool sel info").succeeded
    assert host.run("systemctl is-failed rasdaemon ras-mc-ctl smartmontools").stdout.split().count("failed") == 0
