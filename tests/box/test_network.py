from __future__ import annotations

import pytest

STRANGER = "198.18.0.41"


def test_interfaces_are_what_the_inventory_says(host, variables):
    """A cable in the wrong plug looks like a network that is down; what is not named stays switched off."""
    said = {interface["role"] for interface in variables["network_interfaces"]}
    assert {name.removeprefix("10-") for name in host.file("/etc/systemd/network").listdir()} == {
        *(f"{role}.network" for role in said), "90-unused.network"}
    states = host.check_output("networkctl --no-legend --no-pager list").splitlines()
    assert sum(line.split()[-1] == "configured" for line in states) == len(said)


def test_names_come_from_named_servers(host, variables):
    """The firewall opens to these alone; others would be waited for in vain."""
    servers = [line.split()[1] for line in host.file("/etc/resolv.conf").content_string.splitlines()
               if line.startswith("nameserver")]
    assert servers == variables["network_name_servers"]


def test_does_not_forward(host):
    """What stands in three networks must not be the way from one into another."""
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        assert host.check_output(f"sysctl -n {key}") == "0"


@pytest.mark.parametrize(("key", "value"), [
    ("rp_filter", "1"), ("arp_ignore", "1"), ("accept_redirects", "0"), ("send_redirects", "0"),
    ("accept_source_route", "0"), ("log_martians", "1"),
])
def test_believes_nobody_about_ways(host, key, value):
    """On every interface: for some of these, one that believes is enough."""
    told = host.check_output(f"cat /proc/sys/net/ipv4/conf/*/{key}").split()
    assert set(told) == {value}


@pytest.fixture
def way_through(host, peer, variables, alone):
    """The scanner's back end takes the box for a router to the stranger, and the stranger for one back."""
    raw, uplink = variables.get("lab_raw"), variables["ansible_host"]
    scanner, stranger = peer("scanner"), peer("stranger")
    scanner.check_output(f"ip route replace {STRANGER}/32 via {raw} dev raw")
    stranger.check_output(f"ip route replace 198.19.0.0/24 via {uplink}")
    yield lambda: scanner.run(f"nc -z -w 1 {STRANGER} 22").succeeded
    # Who forwards and stops that, has the kernel's own values for everything else afterwards.
    host.check_output("sysctl -q -w net.ipv4.ip_forward=0; systemctl restart systemd-sysctl; nft -f /etc/nftables.conf")
    scanner.check_output(f"ip route delete {STRANGER}/32")
    stranger.check_output("ip route delete 198.19.0.0/24")


def test_nothing_passes_through(host, way_through):
    """Tried with real packets, and each of the two that forbid it by itself: without both it would work."""
    assert not way_through()
    host.check_output("nft add rule inet box forward accept")
    assert not way_through()  # the kernel does not forward
    host.check_output("nft -f /etc/nftables.conf; sysctl -q -w net.ipv4.ip_forward=1")
    assert not way_through()  # the firewall drops
    host.check_output("nft add rule inet box forward accept")
    assert way_through()


def test_back_end_sees_the_share_alone(peer, variables):
    """The network of raw data is the scanner's inside: what comes from there may drop files and nothing else."""
    raw = variables.get("lab_raw")
    scanner, share = peer("scanner"), {"sftp": 22}.get(variables.get("share_protocol"), 445)
    assert scanner.run(f"nc -z -w 2 -s 198.19.0.21 {raw} {share}").succeeded
    for port in {22, 25, 445, 11112} - {share}:
        assert scanner.run(f"nc -z -w 1 -s 198.19.0.21 {raw} {port}").failed


@pytest.mark.usefixtures("alone")
def test_share_is_not_on_the_uplink(peer, variables):
    """Nor can anybody get at it there by its address on the other side, or by an address from the other side."""
    scanner, share = peer("scanner"), {"sftp": 22}.get(variables.get("share_protocol"), 445)
    raw, uplink = variables.get("lab_raw"), variables["ansible_host"]
    assert scanner.run(f"nc -z -w 1 {uplink} {share}").failed
    scanner.check_output(f"ip route replace {raw}/32 via {uplink} dev host0")
    try:
        assert scanner.run(f"nc -z -w 1 -s 198.18.0.21 {raw} {share}").failed
        assert scanner.run(f"nc -z -w 1 -s 198.19.0.21 {raw} {share}").failed
    finally:
        scanner.check_output(f"ip route delete {raw}/32")
