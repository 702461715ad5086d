from __future__ import annotations

import json
import re

DATA = "/var/lib/relay-agent"


def test_runs_and_comes_back(host, service):
    """After a power cut nobody is there to start it."""
    assert host.service(f"{service}.service").is_running
    assert host.service(f"{service}.service").is_enabled


def test_sandbox(host, service):
    """Both handle what strangers send; what is wrong in them must not become wrong with the box."""
    shown = host.check_output(f"systemd-analyze security --no-pager {service}.service")
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)[1]) <= 2.0


def test_users_are_apart(host, service):
    """Each runs as itself: the one that strangers reach has no secrets, the one with the secrets is not reached."""
    running = host.check_output(f"ps --no-headers -o user:20 -p $(systemctl show --value -p MainPID {service})")
    assert running.strip() == service


def test_receiver_has_no_secrets(host):
    """It never needs one: it opens no connection to anywhere."""
    assert "LoadCredential" not in host.check_output("systemctl cat relay-receive.service")
    calls = host.check_output("systemctl show --value --property=SystemCallFilter relay-receive.service").split()
    assert "accept4" in calls
    assert "connect" not in calls
    for file in host.run("find /etc/relay-agent/credentials -type f").stdout.split():
        assert host.run(f"setpriv --reuid relay-receive --regid relay-agent --clear-groups cat {file}").failed


def test_others_read_no_data(host):
    """An administrator's account is not a right to see patients."""
    assert host.file(DATA).mode == 0o2770
    assert host.run(f"find {DATA} -perm /007 ! -type l").stdout == ""


def test_check_finds_nothing(host):
    """The agent's own look at disk, clock, ports, certificates, destinations, log-in and mail."""
    found = json.loads(host.run("relay-agent check --json < /dev/null").stdout)
    assert [entry for entry in found if not entry["ok"]] == []


def test_ledger_balances(host):
    """Received is delivered, held, quarantined, rejected or on its way: anything else is lost."""
    assert json.loads(host.check_output("relay-agent status --json < /dev/null"))["balance"]["difference"] == 0


def test_installed_from_the_release_alone(host):
    """What runs is what was released and tested together, whatever Debian has of the same name."""
    assert host.file("/opt/relay-agent/current").is_symlink
    assert host.check_output("/opt/relay-agent/current/bin/python -c 'import sys, pydicom; print(pydicom.__file__)'"
                             ).startswith("/opt/relay-agent/")
