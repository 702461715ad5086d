"""A box that arrives: it is commissioned, and asked how it is."""

from __future__ import annotations

import json

import pytest

from tests.box.conftest import PROJECT
from tests.lab.conftest import BOX, OTHER, ansible, variables


def commission(**values: object):
    return ansible("playbooks/commission.yml", f"--limit={BOX},localhost",
                   variables(commission_suite="tests/box/test_relay_agent.py", **values))


@pytest.fixture
def known_hosts(tmp_path):
    return tmp_path / "known_hosts"


def test_another_machine_is_not_commissioned(host, known_hosts):
    """Somebody in between, or another machine at this address: nothing is sent to it."""
    for told in ("SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", None):
        values = {"commission_fingerprint": told} if told else {}
        played = commission(commission_known_hosts=str(known_hosts), **values)
        assert played.returncode != 0
        seen = host.check_output("ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
        assert f"shows the key {seen}" in " ".join(played.stdout.split())
        assert "PLAY [Set up the whole box]" not in played.stdout
        assert not known_hosts.exists()


def test_commissioned(host, known_hosts):
    """The box that shows the right key gets its site, is tested, delivers, and has a report that says so."""
    report = PROJECT / f"build/acceptance/{BOX}.txt"
    report.unlink(missing_ok=True)
    seen = host.check_output("ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
    played = commission(commission_known_hosts=str(known_hosts), commission_fingerprint=seen)
    assert played.returncode == 0, played.stdout[-4000:]
    assert known_hosts.read_text().startswith("198.18.0.11 ssh-ed25519 ")
    text = report.read_text()
    assert f"Box:            {BOX}" in text
    assert seen in text
    assert "AE title RELAY, port 11112; takes SCANNER@198.18.0.21" in text
    assert " passed" in text
    assert "Delivery:       delivered and proved" in text, text


def test_status_names_who_does_not_answer(host, other, tmp_path, dead):
    """One table, a line a box: also for the box that is dead, and the exit status is that of a question answered."""
    told = tmp_path / "told.json"
    played = ansible("playbooks/status.yml", dead, variables(status_file=str(told)))
    assert played.returncode == 0, played.stdout[-3000:]
    table = played.stdout.partition("PLAY RECAP")[0]
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip().startswith("relay-lab-")}
    assert "does not answer" in lines["relay-lab-9"]
    for name, box in ((BOX, host), (OTHER, other)):
        assert box.file("/etc/relay-agent/credentials/.update/version").content_string.strip() in lines[name]
    answers = json.loads(told.read_text())
    assert answers["relay-lab-9"] is None
    assert answers[BOX]["agent"]["balance"]["difference"] == 0
    assert answers[BOX]["health"]["box"] == BOX


def test_a_worker_without_its_password(host, wait_for):
    """What is missing may come back while nobody is there: it is started for ever, and less and less often.

    The first pauses are short, and one that nobody looked at is not seen.
    """
    secret = "/etc/relay-agent/credentials/central"
    host.check_output(f"mv {secret} {secret}.away")
    pauses = []

    def tried() -> bool:
        shown = host.check_output("systemctl show --property=NRestarts,RestartUSecNext relay-work.service")
        told = dict(line.split("=") for line in shown.splitlines())
        pauses.append(told["RestartUSecNext"])
        return int(told["NRestarts"]) >= 4
    try:
        host.run("systemctl restart relay-work.service")
        assert wait_for(tried, 120), pauses
        assert len(set(pauses)) >= 3, pauses
        assert host.check_output("systemctl show --value --property=ActiveState relay-work.service") == "activating"
    finally:
        host.check_output(f"mv {secret}.away {secret}")
    assert wait_for(lambda: host.service("relay-work.service").is_running, 120)
