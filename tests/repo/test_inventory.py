from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.repo.variables import PROJECT

INVENTORY = PROJECT / "inventory"


def listed(name):
    command = [Path(sys.executable).with_name("ansible-inventory"), "-i", INVENTORY / name, "--list"]
    done = subprocess.run(command, check=True, capture_output=True, cwd=PROJECT,
                          env=os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")})
    return json.loads(done.stdout)


def members(groups, name):
    group = groups.get(name, {})
    below = (members(groups, child) for child in group.get("children", ()))
    return set(group.get("hosts", ())).union(*below)


@pytest.mark.parametrize("name", ["fleet.yml", "lab.yml"])
def test_each_box_has_one_kind_of_hardware_and_one_site(name):
    """A box that is swapped inherits everything by its groups, so there must be no doubt which they are."""
    groups = listed(name)
    for kind in ("relays", "sites"):
        for box in members(groups, "relays"):
            inside = [group for group in groups[kind]["children"] if box in members(groups, group)]
            assert len(inside) == 1, (box, kind, inside)


def test_no_secrets_in_the_lab():
    """CI has no vault password, and what opens something does not belong into a repository."""
    for path in [INVENTORY / "lab.yml", *INVENTORY.glob("group_vars/*.yml"), *INVENTORY.glob("group_vars/site_lab/*")]:
        text = path.read_text()
        assert "ANSIBLE_VAULT" not in text, path
        assert "PRIVATE KEY" not in text, path
        assert not re.search(r"\bvault_", text), path


def test_secrets_of_sites_come_from_the_vault():
    """The example shows how: what a role marks as secret is never in the open."""
    site = yaml.safe_load((INVENTORY / "group_vars/site_example/site.yml").read_text())
    assert site["smtp_password"] == "{{ vault_smtp_password }}"
    assert all("vault_" in value for value in site["relay_agent_credentials"].values())
    example = (INVENTORY / "group_vars/site_example/vault.yml.example").read_text()
    for name in set(re.findall(r"vault_\w+", str(site))):
        assert f"{name}:" in example


@pytest.mark.parametrize(("pull", "ports", "networks"), [
    ({"host": "fd00::2", "port": 2222}, [2222], ["fd00::2"]),
    *(pytest.param(*words, marks=pytest.mark.slow)
      for words in (({"host": "192.168.2.2"}, [22], ["192.168.2.2"]), (None, [], [])))])
def test_a_box_may_reach_the_imagers_that_it_pulls_from(pull, ports, networks):
    """What is written once, in the agent's configuration, opens the firewall as well."""
    source = {"name": "prisma"} | ({"pull": pull} if pull else {})
    config = {"relay_agent_config": {"receiver": [{"ae_title": "A"}], "kspace": {"source": [source]}}}
    command = [Path(sys.executable).with_name("ansible"), "-i", INVENTORY / "lab.yml", "relay-lab-1", "-m", "debug",
               "-a", "var=firewall_outbound", "-e", json.dumps(config)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT, env=os.environ | {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"})
    rules = json.loads(done.stdout.partition("=>")[2])["firewall_outbound"]
    (rule,) = (one for one in rules if "imagers" in one["name"])
    assert (rule["ports"], rule["networks"]) == (ports, networks)
