from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.box.conftest import PROJECT, pytest_configure, pytest_ignore_collect, wait_for

__all__ = ["pytest_configure", "pytest_ignore_collect", "wait_for"]

LAB = PROJECT / "inventory/lab.yml"
BOX, ADDRESS = "relay-lab-1", "198.18.0.11"


def ansible(playbook: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("ansible-playbook"), f"--inventory={LAB}", playbook, *options]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False,
                          env=os.environ | {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")})


@pytest.fixture
def site() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run site.yml for the box with other variables than the inventory's."""
    def play(tag: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        return ansible("playbooks/site.yml", f"--limit={BOX}", f"--tags={tag}", f"--extra-vars={json.dumps(variables)}")
    return play


@pytest.fixture
def gets_in() -> Callable[[], bool]:
    """Whether an administrator gets in over a connection that was not there before."""
    def ask() -> bool:
        command = ["ssh", "-F", PROJECT / "build/lab/ssh_config", "-o", "ControlPath=none", "-o", "BatchMode=yes",
                   "-o", "ConnectTimeout=3", f"lab@{ADDRESS}", "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ask


@pytest.fixture
def power_cut() -> Callable[[], None]:
    """Nothing in the box gets a chance to finish; then it starts again."""
    def cut() -> None:
        subprocess.run([sys.executable, PROJECT / "molecule/lab/lab.py", "cut", BOX], check=True)
        assert ansible("molecule/lab/create.yml", f"--limit=localhost,{BOX}").returncode == 0
    return cut
