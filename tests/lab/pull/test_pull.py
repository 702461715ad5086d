"""A box that nobody can reach fetches its releases: which it takes, which it refuses, and what a power cut does."""

from __future__ import annotations

import io
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.box.conftest import PROJECT
from tests.lab.conftest import BOX, cut, start

SERVED = PROJECT / "build/lab/served"
REMEMBERED = PROJECT / f"build/lab/{BOX}/upper/etc/relay-agent/credentials/.update/before"
VERSION = "/etc/relay-agent/credentials/.update/version"


@pytest.fixture(scope="module")
def bundle() -> Path:
    """What `make bundle` makes."""
    subprocess.run(["make", "--silent", "bundle", f"KEY={PROJECT}/build/lab/release-key"], cwd=PROJECT, check=True)
    return PROJECT / "build/relay.tar"


@pytest.fixture
def serve(bundle) -> Callable[..., None]:
    """Serve the bundle as one of another version, signed by a key; then with a byte that is another one."""
    def put(version: str, key: str = "release-key", tampered: bool = False) -> None:
        SERVED.mkdir(parents=True, exist_ok=True)
        target = SERVED / "relay.tar"
        with tarfile.open(bundle) as made, tarfile.open(target, "w") as new:
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
