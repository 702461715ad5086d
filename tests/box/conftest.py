from __future__ import annotations

import fcntl
import json
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra

PROJECT = Path(__file__).resolve().parents[2]


def pytest_configure(config: pytest.Config) -> None:
    """The lab is reached by a way of its own, which the inventory has in words that testinfra does not understand."""
    if Path(config.getoption("--ansible-inventory", None) or "").name == "lab.yml":
        config.option.ssh_config = str(PROJECT / "build/lab/ssh_config")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without a box to look at, testinfra would look at this machine."""
    return None if config.getoption("--hosts", None) else True


@pytest.fixture
def alone() -> Iterator[None]:
    """For tests that change what all boxes have in common, or that would miss it: not beside such a one of another box.

    With ``-n 2 --dist loadgroup`` two boxes are looked at side by side, each by one test at a time.
    """
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def inventory(request) -> dict[str, Any]:
    """The inventory that the boxes were named from."""
    file = request.config.getoption("--ansible-inventory")
    command = ["ansible-inventory", "-i", file, "--list"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.fixture(scope="module")
def variables(host, inventory) -> dict[str, Any]:
    """What the inventory says of the box."""
    return inventory["_meta"]["hostvars"][host.check_output("hostname")]


@pytest.fixture(scope="module")
def address(variables) -> str:
    """Where scanners and administrators reach it."""
    return variables["ansible_host"]


@pytest.fixture(scope="module")
def config(host) -> dict[str, Any]:
    """The agent's configuration, as it stands in the box."""
    return tomllib.loads(host.file("/etc/relay-agent/config.toml").content_string)


@pytest.fixture(scope="session")
def peer(request, inventory) -> Callable[[str], Any]:
    """Another host of the lab; real boxes have none that is ours to command."""
    def named(name: str) -> Any:
        if name not in inventory.get("lab", {}).get("hosts", ()):
            pytest.skip(f"{name} is a host of the lab alone; a real box has no peer that is ours to command")
        option = request.config.getoption
        return testinfra.get_host(f"ansible://{name}", ansible_inventory=option("--ansible-inventory"),
                                  ssh_config=option("--ssh-config"))
    return named


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Ask until the answer is true; what it was at last."""
    def ask(question: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (answer := question()) and time.monotonic() < end:
            time.sleep(0.5)
        return answer
    return ask


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The two services of the agent, where a test asks for one."""
    if "service" in metafunc.fixturenames:
        metafunc.parametrize("service", ["relay-receive", "relay-work"])
