"""A new site: asked for, checked by the roles' own specs, written; and a box that takes another one's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.variables import PROJECT

pytestmark = pytest.mark.slow  # half a minute each
BIN = Path(sys.executable).parent
ANSWERS = {
    "site_code": "stgeorge", "site_box": "relay-0003", "site_hardware": "nuc", "site_mac": "02:00:00:00:03:01",
    "site_address": "192.0.2.200/24", "site_gateway": "192.0.2.1", "site_names": "192.0.2.53, 192.0.2.54",
    "site_times": "ntp.example.org", "site_timezone": "Europe/London", "site_mirror": "http://debian.example.org",
    "site_administrators": "198.51.100.0/28", "site_admin": "anna", "site_admin_name": "Anna Example: \"coordinating\"",
    "site_admin_key": "ssh-ed25519 AAAA anna", "site_scanners": "MR1@192.0.2.65, CT1@192.0.2.66",
    "site_xnat": "https://xnat.example.org", "site_xnat_addresses": "203.0.113.10", "site_smtp": "mail.example.org",
    "site_smtp_addresses": "192.0.2.25", "site_smtp_user": "relay", "site_contacts": "a@example.org, b@example.org",
    "site_recovery_key": "age1a, age1b",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "PATH": f"{BIN}:{os.environ['PATH']}",
                                "ANSIBLE_FORCE_COLOR": "0"}
    return subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False, cwd=PROJECT,
                          env=environment)


@pytest.fixture
def inventory(tmp_path):
    """A copy of the fleet's."""
    shutil.copytree(PROJECT / "inventory", tmp_path / "inventory")
    return tmp_path / "inventory/fleet.yml"


def new_site(inventory, **answers):
    return run("ansible-playbook", f"--inventory={inventory}", "playbooks/new_site.yml",
               f"--extra-vars={json.dumps(ANSWERS | answers)}")


def variables(inventory, box):
    done = run("ansible-inventory", f"--inventory={inventory}", "--host", box)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_site(inventory):
    """Everything that the roles need is there, and the box is in its groups; other sites are as they were."""
    before = variables(inventory, "relay-0001")
    done = new_site(inventory)
    assert done.returncode == 0, done.stdout[-3000:]
    written = variables(inventory, "relay-0003")
    assert written["site_dicom_networks"] == ["192.0.2.65", "192.0.2.66"]
    assert written["base_administrators"][0]["full_name"] == ANSWERS["site_admin_name"]
    assert written["site_recovery"] == ["age1a", "age1b"]
    assert written["ansible_host"] == "192.0.2.200"
    assert written["smtp_password"] == "{{ vault_smtp_password }}"
    graph = run("ansible-inventory", f"--inventory={inventory}", "--graph").stdout
    assert graph.count("relay-0003") == 2
    assert variables(inventory, "relay-0001") == before
    assert new_site(inventory).returncode != 0  # it is there already


@pytest.mark.parametrize(("answers", "words"), [
    ({"site_code": "St George"}, "The code needs letters"),
    ({"site_box": "relay-0001"}, "may be in"),
    ({"site_hardware": "laptop"}, "nuc or supermicro"),
    ({"site_timezone": "[1, 2]"}, "time zone is a name"),
])
def test_what_cannot_be_is_not_written(inventory, answers, words):
    """It is named by the roles' specs or before, and the inventory is as it was."""
    before = {path: path.read_bytes() for path in inventory.parent.rglob("*") if path.is_file()}
    done = new_site(inventory, **answers)
    assert done.returncode != 0
    assert words in done.stdout
    assert {path: path.read_bytes() for path in inventory.parent.rglob("*") if path.is_file()} == before


def test_a_swapped_box_inherits_everything(inventory):
    """It joins the group of the site, and the one that it replaces leaves."""
    old = variables(inventory, "relay-0001")
    inventory.write_text(inventory.read_text().replace("relay-0001", "relay-0009"))
    host_vars = inventory.parent / "host_vars/relay-0001.yml"
    if host_vars.exists():
        host_vars.rename(host_vars.with_name("relay-0009.yml"))
    assert variables(inventory, "relay-0009") == old


def test_the_inventory_is_checked_without_asking_a_box(inventory):
    """A wrong variable of the last role is named, too."""
    example = f"--extra-vars=@{inventory.parent}/group_vars/site_example/vault.yml.example"
    assert run("ansible-playbook", f"--inventory={inventory}", "playbooks/check.yml", example).returncode == 0
    done = run("ansible-playbook", f"--inventory={inventory}", "playbooks/check.yml", example,
               "--extra-vars=update_patience=long", "--extra-vars=smtp_port=many")
    assert done.returncode != 0
    assert "update_patience" in done.stdout
    assert "smtp_port" in done.stdout
