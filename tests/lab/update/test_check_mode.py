"""Check mode: each playbook says what it would do with a box, to its end, and the box is as it was.

All roles are played by commission.yml.
"""

from __future__ import annotations

import pytest

from tests.lab.conftest import BOX, ansible, variables

# Of the data what is there at all: a box goes on working meanwhile, and its first check fetches a token.
STATE = """
ls /var/lib/relay-agent | grep -v tokens
find /etc /opt/relay-agent /usr/local -type f -printf '%p %s %T@ %m\\n' -o -type l -printf '%p %l\\n' | sort
systemctl show --property=Id,ActiveState,MainPID,UnitFileState,ActiveEnterTimestamp \
    relay-receive.service relay-work.service relay-share.service nftables.service ssh.service
"""


@pytest.mark.parametrize(("playbook", "says"), [
    ("update.yml", "changed=0"), ("status.yml", "on its way"),
    ("commission.yml", "NOT ACCEPTED"), ("retire.yml", "NOTHING WAS DESTROYED")])
def test_nothing_is_changed(host, tmp_path, playbook, says):
    seen = host.check_output("ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
    before = host.check_output(STATE)
    played = ansible(f"playbooks/{playbook}", "--check", f"--limit={BOX},localhost",
                     variables(retire=BOX, commission_fingerprint=seen,
                               commission_known_hosts=str(tmp_path / "known_hosts"),
                               update_roles=["relay_agent", "update"]))
    assert played.returncode == 0, played.stdout[-4000:]
    assert says in played.stdout, played.stdout[-4000:]
    assert host.check_output(STATE) == before
