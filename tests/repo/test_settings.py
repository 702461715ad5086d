"""Settings that go out with a release: all that a site says, and no secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.repo.variables import PROJECT

pytestmark = pytest.mark.slow  # ten seconds each
SITE = PROJECT / "inventory/group_vars/site_example"
SECRETS = yaml.safe_load((SITE / "vault.yml.example").read_text())


@pytest.fixture
def write(tmp_path):
    """Play settings.yml in a checkout of its own, for boxes that fetch their releases."""
    for folder in ("playbooks", "roles", "inventory"):
        shutil.copytree(PROJECT / folder, tmp_path / folder)
    shutil.copy(PROJECT / "ansible.cfg", tmp_path)

    def play(**values):
        values = SECRETS | {"update_url": "https://relays.example.org/relay.tar"} | values
        return subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "--inventory=inventory/fleet.yml",
             "playbooks/settings.yml", f"--extra-vars={json.dumps(values)}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"})
    return play


def test_all_but_secrets(write, tmp_path):
    """What a role marks as secret, the way to the box and whom it takes releases from stay as the box has them."""
    done = write()
    assert done.returncode == 0, done.stdout[-3000:]
    text = (tmp_path / "build/settings/relay-0001.json").read_text()
    told = json.loads(text)
    assert told["settings"]["relay_agent_config"]["receiver"]
    assert told["settings"]["firewall_inbound"]
    stays = {"smtp_password", "relay_agent_credentials", "network_interfaces", "update_url", "update_signers"}
    assert stays <= set(told["kept"])
    assert not set(told["kept"]) & set(told["settings"])
    for secret in SECRETS.values():
        assert secret not in text


@pytest.mark.parametrize("secret", ["correct horse battery", "first line of it\nwith \"quotes\" in it\n",
                                    "relay:correct horse battery"])
def test_a_secret_that_went_astray(write, tmp_path, secret):
    """In a script or an address it would lie on a web server for everybody: its place is named, its value is not."""
    astray = secret.split(":")[-1].splitlines()[-1]
    done = write(vault_smtp_password=secret, relay_agent_files={"site.das": f"// {astray}"})
    assert done.returncode != 0
    assert "relay_agent_files of relay-0001 would carry a secret" in " ".join(done.stdout.split())
    assert astray not in done.stdout + done.stderr
    assert not (tmp_path / "build/settings/relay-0001.json").exists()


def test_boxes_that_are_called(write, tmp_path):
    """They get theirs over SSH."""
    assert write(update_url="").returncode == 0
    assert not (tmp_path / "build").exists()
