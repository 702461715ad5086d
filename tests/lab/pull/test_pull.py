"""A box that nobody can reach fetches its releases: which it takes, which it refuses, and what a power cut does."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.box.conftest import PROJECT
from tests.lab.conftest import ADDRESS, BOX, LAB, cut, start

SERVED = PROJECT / "build/lab/served"
REMEMBERED = PROJECT / f"build/lab/{BOX}/upper/etc/relay-agent/credentials/.update/before"
VERSION = "/etc/relay-agent/credentials/.update/version"
INVENTORY = "/etc/relay-agent/credentials/.update/inventory.json"


def bundle(*sites: Path) -> Path:
    """What `make bundle` makes, with the settings of these inventories."""
    subprocess.run(["make", "--silent", "bundle", f"KEY={PROJECT}/build/lab/release-key",
                    f"SITES={' '.join(map(str, sites))}"], cwd=PROJECT, check=True)
    return PROJECT / "build/relay.tar"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One without settings."""
    return bundle().rename(tmp_path_factory.mktemp("bundle") / "relay.tar")


@pytest.fixture
def serve(plain, tmp_path, inventory) -> Callable[..., None]:
    """Serve the bundle as one of another version, signed by a key; then with a byte that is another one.

    ``receiver`` is what the site says of the agent's receiver by now.
    """
    def put(version: str, key: str = "release-key", tampered: bool = False, receiver: dict[str, Any] | None = None,
            ) -> None:
        bundled = plain
        if receiver:
            config = inventory["_meta"]["hostvars"][BOX]["relay_agent_config"] | {"receiver": [receiver]}
            changed = tmp_path / "changed.json"
            changed.write_text(json.dumps({"all": {"hosts": {BOX: {"relay_agent_config": config}}}}))
            bundled = bundle(LAB, changed)
        SERVED.mkdir(parents=True, exist_ok=True)
        target = SERVED / "relay.tar"
        with tarfile.open(bundled) as made, tarfile.open(target, "w") as new:
            for member in made:
                content = made.extractfile(member)
                data = content.read() if content else b""
                if member.name == "build/VERSION":
                    data = f"{version}\n".encode()
                    member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        (SERVED / "relay.tar.sig").unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", PROJECT / "build/lab" / key, "-n", "relay-release",
                        target], check=True, capture_output=True)
        if tampered:
            data = target.read_bytes()
            target.write_bytes(data.replace(b"PermitRootLogin no", b"PermitRootLogin on", 1))
            assert target.read_bytes() != data
    return put


def told(peer, words: str) -> bool:
    """Whether the box's contacts had a mail with these words in its subject, on as many lines as it takes."""
    return bool(peer("central").run(f"cat /var/lib/mail/new/* | tr -d '\\n' | grep -F '{words}'").stdout)


def test_nothing_is_served(host):
    """The next time will tell; nobody is woken for a server that is away."""
    (SERVED / "relay.tar").unlink(missing_ok=True)
    fetched = host.run("box-pull")
    assert fetched.rc == 1
    assert "404" in fetched.stderr or "refused" in fetched.stderr


@pytest.mark.parametrize(("served", "why"), [
    ({"version": "9.0.20990101000000-new", "tampered": True}, "its signature is not one of a key that this box trusts"),
    ({"version": "9.0.20990101000000-new", "key": "key"}, "its signature is not one of a key that this box trusts"),
    ({"version": "0.0.1-old"}, "runs here, which is later"),
], ids=["tampered with", "of a wrong key", "older"])
def test_refused(host, peer, serve, wait_for, served, why):
    """Nothing of it is used, the contacts are told once, and it is not fetched again and again."""
    serve(**served)
    version = host.file(VERSION).content_string
    fetched = host.run("box-pull")
    assert fetched.rc == 1
    assert why in fetched.stdout
    assert host.file(VERSION).content_string == version
    assert host.run("box-pull").stdout == "nothing new\n"
    digest = subprocess.run(["sha256sum", SERVED / "relay.tar"], check=True, capture_output=True, text=True).stdout[:64]
    assert wait_for(lambda: told(peer, digest), 120)


def test_a_good_one_is_applied_also_after_a_power_cut(host, peer, serve, wait_for):
    """The box comes back as it was, fetches it again at the next time, and then runs it."""
    serve("1.0.20990101000000-good")
    was = host.file(VERSION).content_string
    host.check_output("systemctl start --no-block box-pull.service")
    end = time.monotonic() + 900
    while not REMEMBERED.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert REMEMBERED.exists(), host.run("journalctl -u box-pull").stdout[-3000:]
    cut()
    start()
    assert wait_for(lambda: host.service("relay-work.service").is_running)
    assert not REMEMBERED.exists()
    assert host.file(VERSION).content_string == was
    fetched = host.run("box-pull")
    assert fetched.rc == 0, fetched.stdout[-3000:]
    assert "release 1.0.20990101000000-good" in fetched.stdout
    assert host.file(VERSION).content_string == "1.0.20990101000000-good\n"
    for service in ("relay-receive", "relay-work"):
        assert host.service(f"{service}.service").is_running
    assert host.run("box-pull").stdout == "nothing new\n"
    assert wait_for(lambda: told(peer, "runs here now"), 120)


def calls(peer, title: str) -> bool:
    return bool(peer("scanner").run(f"echoscu -aet {title} -aec RELAY {ADDRESS} 11112").succeeded)


def test_settings_come_with_it(host, peer, serve, wait_for):
    """A hospital has a new scanner, and nobody may reach the box: secrets stay, the rest is what the site says now."""
    secrets = "cat /etc/postfix/password /etc/relay-agent/credentials/central | sha256sum"
    before = host.check_output(secrets)
    assert not calls(peer, "LATER")
    serve("1.0.20990102000000-settings",
          receiver={"ae_title": "RELAY", "allow": ["SCANNER@198.18.0.21", "LATER@198.18.0.21"]})
    fetched = host.run("box-pull")
    assert fetched.rc == 0, fetched.stdout[-3000:]
    assert wait_for(lambda: calls(peer, "LATER"))
    assert calls(peer, "SCANNER")
    assert host.check_output(secrets) == before
    assert "LATER" in host.file(INVENTORY).content_string
    assert host.run("find /var/lib/box-pull -name inventory.json").stdout == ""


def test_settings_that_cannot_be_are_taken_back(host, peer, serve, wait_for):
    """The agent reads them before they count; the box goes on with those it had, and remembers those."""
    before = host.check_output(f"cat {INVENTORY} /etc/relay-agent/config.toml | sha256sum")
    serve("1.0.20990103000000-wrong", receiver={"ae_title": "LONGER THAN SIXTEEN", "allow": ["*"]})
    fetched = host.run("box-pull")
    assert fetched.rc == 1
    assert "failed; the box is as it was before" in fetched.stdout
    assert "1 to 16 printable" in fetched.stdout, fetched.stdout[-3000:]
    assert host.check_output(f"cat {INVENTORY} /etc/relay-agent/config.toml | sha256sum") == before
    assert host.file(VERSION).content_string == "1.0.20990102000000-settings\n"
    assert wait_for(lambda: calls(peer, "LATER"))  # its receiver begins again
