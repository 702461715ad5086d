from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import testinfra

from tests.box.conftest import (
    PROJECT,
    inventory,
    peer,
    pytest_configure,
    pytest_ignore_collect,
    wait_for,
)

__all__ = ["inventory", "peer", "pytest_configure", "pytest_ignore_collect", "wait_for"]

LAB = PROJECT / "inventory/lab.yml"
BOX, ADDRESS = "relay-lab-1", "198.18.0.11"
OTHER, OTHERS_ADDRESS = "relay-lab-2", "198.18.0.12"


def command(playbook: str | Path, *options: str) -> list[str]:
    """A play in the lab as a command."""
    return [str(Path(sys.executable).with_name("ansible-playbook")), f"--inventory={LAB}", str(playbook), *options]


def environment() -> dict[str, str]:
    """What plays need around them; they go the way that a fleet's go, without what makes the lab quick.

    What is said to the tests is not for those that a play starts.
    """
    ours = ("ANSIBLE_STRATEGY", "PYTEST_")
    usual = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return usual | {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}


def ansible(playbook: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a play in the lab."""
    return subprocess.run(command(playbook, *options), cwd=PROJECT, capture_output=True, text=True, check=False,
                          env=environment())


def variables(**values: Any) -> str:
    """Variables that are other ones than the inventory's."""
    return f"--extra-vars={json.dumps(values)}"


def cut(box: str = BOX) -> None:
    """Cut a box's power: nothing in it gets a chance to finish."""
    subprocess.run([sys.executable, PROJECT / "molecule/lab/lab.py", "cut", box], check=True)


def start(box: str = BOX) -> None:
    """Give it power again and wait until it can be reached."""
    assert ansible("molecule/lab/create.yml", f"--limit=localhost,{box}").returncode == 0


@pytest.fixture
def site() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run site.yml for the box with other variables than the inventory's."""
    def play(tag: str, **values: Any) -> subprocess.CompletedProcess[str]:
        return ansible("playbooks/site.yml", f"--limit={BOX}", f"--tags={tag}", variables(**values))
    return play


@pytest.fixture
def gets_in() -> Callable[[], bool]:
    """Whether an administrator gets in over a connection that was not there before."""
    def ask() -> bool:
        words = ["ssh", "-F", PROJECT / "build/lab/ssh_config", "-o", "ControlPath=none", "-o", "BatchMode=yes",
                 "-o", "ConnectTimeout=3", f"lab@{ADDRESS}", "true"]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return ask


@pytest.fixture
def power_cut() -> Callable[[], None]:
    """Nothing in the box gets a chance to finish; then it starts again."""
    def again() -> None:
        cut()
        start()
    return again


@pytest.fixture(scope="session")
def other(request) -> Any:
    """The second box."""
    return testinfra.get_host(f"ansible://{OTHER}", ansible_inventory=str(LAB),
                              ssh_config=request.config.getoption("--ssh-config"))


@pytest.fixture
def dead(tmp_path) -> str:
    """An option that adds a box to the fleet which is not there: relay-lab-9."""
    facts = {"ansible_host": "198.18.0.99", "ansible_ssh_args": f"-F {PROJECT}/build/lab/ssh_config"}
    (tmp_path / "dead.yml").write_text(json.dumps({"all": {"children": {
        name: {"hosts": {"relay-lab-9": facts}} for name in ("relays", "lab", "site_lab")}}}))
    return f"--inventory={tmp_path}/dead.yml"
