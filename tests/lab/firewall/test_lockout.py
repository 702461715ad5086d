from __future__ import annotations

import subprocess
import time

import pytest

NOBODY = ["192.0.2.1"]


@pytest.fixture
def other_key(tmp_path):
    """A key that nobody has."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    return [{"name": "lab", "keys": [(tmp_path / "key.pub").read_text().strip()]}]


def digest(host):
    """Of all that a lock-out may come from."""
    return host.check_output("cat /etc/nftables.conf $(find /etc/ssh /etc/systemd/network -type f | sort) | sha256sum")


def lost(played):
    """Whether the play could not come back, or only when the change had been taken back: a matter of its patience."""
    return "unreachable=1" in played.stdout or "too late, the change of" in played.stdout


def test_firewall_that_locks_out(host, site, gets_in, wait_for):
    """The play cannot come back to say that all is well, so the rules before it come back by themselves."""
    before = digest(host)
    played = site("firewall", site_administrator_networks=NOBODY, firewall_patience=15)
    assert lost(played), played.stdout[-2000:]
    assert wait_for(gets_in)
    assert digest(host) == before
    assert "nobody came back after a change of firewall" in host.check_output("journalctl --since=-5min -t root")


def test_ssh_that_locks_out(host, site, gets_in, other_key, wait_for):
    """The same for keys: a wrong one in the inventory would take effect everywhere in one run."""
    before = digest(host)
    played = site("ssh", ssh_administrators=other_key, ssh_patience=15)
    assert lost(played), played.stdout[-2000:]
    time.sleep(20)  # sshd shuts out for a while whom it refused: who asks all the time has to wait all the longer
    assert wait_for(gets_in, 120)
    assert digest(host) == before


def test_network_that_locks_out(host, site, gets_in, wait_for):
    """The same for addresses: one digit that is wrong, and nobody could correct it from afar."""
    before = digest(host)
    mac = host.check_output("cat /sys/class/net/host0/address")
    uplink = {"role": "uplink", "mac": mac, "address": "198.18.0.99/24", "gateway": "198.18.0.1"}
    played = site("network", network_interfaces=[uplink], network_patience=15)
    assert lost(played), played.stdout[-2000:]
    assert wait_for(gets_in)
    assert digest(host) == before


def test_power_cut_while_locked_out(host, site, gets_in, wait_for, power_cut):
    """The timer is gone with the power; what was remembered is not, and comes back before the services start."""
    before = digest(host)
    played = site("firewall", site_administrator_networks=NOBODY, firewall_patience=3600)
    assert "unreachable=1" in played.stdout
    assert not gets_in()
    power_cut()
    assert wait_for(gets_in)
    assert digest(host) == before


def test_a_good_change_stays(host, site, gets_in):
    """The guard keeps no more than it has to: what the play could confirm is not taken back at the next start."""
    assert "failed=0" in site("firewall", firewall_patience=20).stdout
    assert gets_in()
    assert host.run("test -e /var/lib/box-guard/firewall").failed
    assert host.run("systemctl is-active box-guard-firewall.timer").failed


def test_a_play_that_never_came_back(host):
    """What it left half done is not remembered as good: the next play begins with what was before it."""
    before = digest(host)
    arm = "box-guard arm firewall /etc/nftables.conf 'systemctl reload nftables.service'"
    host.check_output(arm)
    host.check_output("echo 'half a line' >> /etc/nftables.conf")
    host.check_output(arm)
    assert digest(host) == before
    host.check_output("box-guard keep firewall")
    assert digest(host) == before


def test_the_time_counts_from_the_change(host, wait_for):
    """On a slow line the play takes its time until it makes the change; it is watched all the same."""
    host.check_output("box-guard arm ssh /etc/ssh 'systemctl reload ssh.service'")
    timer = host.check_output("systemctl list-timers --no-legend box-guard-ssh.timer")
    assert "59min" in timer or "1h" in timer
    host.check_output("box-guard apply ssh 5")
    assert wait_for(lambda: host.run("test -e /var/lib/box-guard/ssh").failed, 30)
    assert "too late, the change of ssh was taken back" in host.run("box-guard keep ssh").stderr
    assert "too late, the change of ssh was taken back" in host.run("box-guard apply ssh 5").stderr


def test_interfaces_that_cannot_be_meant(host, site):
    """Two uplinks would be two default routes."""
    before = digest(host)
    uplink = {"role": "uplink", "mac": "02:00:00:00:00:01", "address": "dhcp"}
    played = site("network", network_interfaces=[uplink, uplink])
    assert "network_interfaces needs one uplink" in played.stdout
    assert digest(host) == before


def test_rules_that_cannot_be(host, site):
    """nft reads them before they take the place of those that work."""
    before = digest(host)
    played = site("firewall", site_administrator_networks=["198.18.0.1/99"])
    assert "failed=1" in played.stdout
    assert digest(host) == before


def test_wrong_variable_is_named_before_anything_changes(site):
    """Also when it belongs to the last role: half a change is worse than none."""
    played = site("all", relay_agent_files="many", smtp_queue_days="many")
    assert "smtp_queue_days" in played.stdout
    assert "relay_agent_files" in played.stdout
    assert "changed=0" in played.stdout
