from __future__ import annotations

import json
import re

import pytest


@pytest.fixture(scope="module")
def chains(host) -> dict[str, dict]:
    """The chains that packets really pass."""
    listed = json.loads(host.check_output("nft --json list chains"))["nftables"]
    return {entry["chain"]["name"]: entry["chain"] for entry in listed if "chain" in entry}


@pytest.mark.parametrize("name", ["input", "output", "forward"])
def test_default_is_no(chains, name):
    """What nobody declared does not pass; nor does the box join the networks that it stands in."""
    assert chains[name]["policy"] == "drop"


def test_comes_back_after_a_reboot(host):
    """Rules that are only loaded are gone at the next start."""
    assert host.service("nftables.service").is_enabled
    assert host.file("/etc/nftables.conf").mode & 0o077 == 0


def test_listens_to_what_is_declared(host, config):
    """A port that is open without being meant is found here before somebody else finds it."""
    shared = {445} if host.service("relay-share.service").is_running else set()
    meant = {22, *shared, *(receiver.get("port", 11112) for receiver in config["receiver"])}
    found = {int(line.split()[3].rpartition(":")[2]) for line in host.check_output(
        "ss --no-header --listening --tcp --numeric").splitlines() if not line.split()[3].startswith(("127.", "[::1]"))}
    assert found <= meant


@pytest.mark.parametrize("port", [22, 25, 445, 11112])
def test_strangers_see_nothing(peer, address, port):
    """Tried with real packets: who is not declared gets no answer, not even a refusal."""
    assert peer("stranger").run(f"nc -z -w 1 {address} {port}").failed


def test_scanner_sees_dicom_alone(peer, address):
    """A scanner's computer is often older than its operating system's support, so it gets the one port it needs."""
    assert peer("scanner").run(f"nc -z -w 1 {address} 11112").succeeded
    assert peer("scanner").run(f"nc -z -w 1 {address} 22").failed
    assert peer("scanner").run(f"nc -z -w 1 {address} 445").failed


def test_nothing_goes_where_it_is_not_declared(host, peer):
    """Whatever got into the box cannot send what is in it to anybody; it is refused at once, not left to time out."""
    stranger = peer("stranger").check_output("hostname -I").split()[0]
    answer = host.run(f"python3 -c \"import socket; socket.create_connection(('{stranger}', 22), 3)\"")
    assert answer.failed
    assert "No route to host" in answer.stderr


def test_reports_to_switches_get_out(host):
    """Who is silent is not passed on to by switches that listen (MLD snooping), and IPv6 fails after some minutes."""
    def let_out():
        rules = host.check_output("nft list chain inet box output")
        return int(re.search(r"mld2-listener-report .*counter packets (\d+) bytes \d+ accept", rules)[1])
    uplink = host.check_output("ip -6 -oneline address show scope link | head -n 1").split()[1]
    before = let_out()
    host.check_output(
        f"""python3 -c 'import socket as s; g = s.inet_pton(s.AF_INET6, "ff02::db8")
k = s.socket(s.AF_INET6, s.SOCK_DGRAM)
k.setsockopt(s.IPPROTO_IPV6, s.IPV6_JOIN_GROUP, g + s.if_nametoindex("{uplink}").to_bytes(4, "little"))'""")
    assert let_out() > before
