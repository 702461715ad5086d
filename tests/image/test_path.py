"""A box from a stick of its site: commissioned, and the way of images through it, from this machine to this machine."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from tests import data
from tests.delivery.box import arrived_exactly
from tests.harness import send, wait_for
from tests.image.boxes import NUC, installed
from tests.image.conftest import PROJECT, build
from tests.image.fleet import BOX, PASSWORD, SITE, Fleet
from tests.image.vm import PATIENCE

pytestmark = [pytest.mark.full, pytest.mark.timeout(7200)]
ADMINISTRATOR = "anna"
WHOLE_DELIVERY = 300 * PATIENCE  # seconds


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return Fleet.make(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def box(tmp_path_factory, fleet, keys):
    folder = tmp_path_factory.mktemp("site")
    build(folder, "--fast", "--site", SITE, "--inventory", fleet.inventory, "--version", "path", "--keys",
          keys / "keys")
    return installed(folder / "box", NUC, folder / f"relay-{SITE}-path.img")


@pytest.fixture
def machine(box, tmp_path):
    with box.copy(tmp_path / "box", forwards={"dicom": 11112}) as machine:
        yield machine


@pytest.fixture
def central(fleet, tmp_path):
    with fleet.central(tmp_path / "central") as central, fleet.mail(tmp_path / "mail"), fleet.time():
        yield central


def complete(machine, fleet):
    """What commissioning adds that no stick has: the password at the central XNAT."""
    machine.wait_ssh(user=ADMINISTRATOR, key=fleet.key)
    machine.ssh(f"echo relay:{PASSWORD} | sudo install -m 0600 /dev/stdin /etc/relay-agent/credentials/central; "
                "sudo systemctl restart relay-work", user=ADMINISTRATOR, key=fleet.key)


def receives(machine, images):
    """Send until the box answers at all: the log-in is there before the agent is."""
    def once():
        try:
            return send(machine.port("dicom"), images)
        except AssertionError:
            return None
    return wait_for(once, 120 * PATIENCE)


def test_images_arrive(machine, central, fleet):
    """Byte for byte, with the network, the firewall and the sandbox that the box is shipped with."""
    complete(machine, fleet)
    images = list(data.study())
    assert receives(machine, images) == [0] * len(images)
    wait_for(lambda: len(central.archive_instances("P1", "S1_MR1")) == len(images), WHOLE_DELIVERY)
    arrived_exactly(central, images)


def test_power_cut_while_receiving(machine, central, fleet):
    """All that was acknowledged before the cut is there after it, and is delivered; the rest can be sent again."""
    complete(machine, fleet)
    first = list(data.study(1, 5, study="1.2.3"))
    receives(machine, first[:1])
    begin = time.monotonic()
    assert send(machine.port("dicom"), first) == [0] * len(first)
    each = (time.monotonic() - begin) / len(first)
    images, statuses = list(data.study(2, 100, study="1.2.3")), []
    sender = threading.Thread(target=lambda: statuses.extend(send(machine.port("dicom"), images)))
    sender.start()
    time.sleep(50 * each)
    machine.cut()
    sender.join()
    acknowledged = [image for image, status in zip(images, statuses, strict=True) if status == 0]
    assert 0 < len(acknowledged) < len(images), "the cut was not in between"
    machine.start()
    must = {str(image.SOPInstanceUID) for image in [*first, *acknowledged]}
    wait_for(lambda: must <= set(central.archive_instances("P1", "S1_MR1")), WHOLE_DELIVERY)
    rest = [image for image in images if image not in acknowledged]
    assert receives(machine, rest) == [0] * len(rest)
    wait_for(lambda: len(central.archive_instances("P1", "S1_MR1")) == len(first) + len(images), WHOLE_DELIVERY)
    arrived_exactly(central, [*first, *images])


def play(playbook, inventory, **values):
    """Run a playbook for the box."""
    return subprocess.run(
        [PROJECT / ".venv/bin/ansible-playbook", "--inventory", inventory, f"playbooks/{playbook}",
         "--extra-vars", " ".join(f"{name}={value}" for name, value in values.items())],
        cwd=PROJECT, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"})


def test_commissioned(machine, central, fleet, tmp_path):
    """As docs/fleet.md has it: the box is found by what its screen shows, completed, and all of tests/box passes."""
    machine.wait_for(f"{BOX} ", seconds=240)
    machine.wait_ssh(user=ADMINISTRATOR, key=fleet.key)
    shown = wait_for(lambda: re.search(r"SHA256:[\w+/]{43}", machine.log()), 60 * PATIENCE)[0]
    known = tmp_path / "known_hosts"
    inventory = fleet.reached_at(machine.port("ssh"), tmp_path / "fleet", known)
    done = play("commission.yml", inventory, commission_fingerprint=shown, commission_known_hosts=known,
                commission_folder=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = (tmp_path / f"{BOX}.txt").read_text()
    print(report)
    assert not re.search("FAILED|ERROR", report), report


def test_retired(machine, central, fleet, tmp_path):
    """As docs/fleet.md has it, on a real pool: the ledger comes home, and then nothing opens what is on the disk."""
    complete(machine, fleet)
    images = list(data.study())
    assert receives(machine, images) == [0] * len(images)
    wait_for(lambda: len(central.archive_instances("P1", "S1_MR1")) == len(images), WHOLE_DELIVERY)
    inventory = fleet.reached_at(machine.port("ssh"), tmp_path / "fleet", tmp_path / "known_hosts")
    done = play("retire.yml", inventory, retire=BOX, retire_folder=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    certificate = (tmp_path / f"{BOX}.txt").read_text()
    print(certificate)
    assert f"Received:       {len(images)} instances" in certificate
    assert f"Delivered:      {len(images)}, each proved" in certificate
    assert "pool, " in certificate
    with closing(sqlite3.connect(tmp_path / f"{BOX}.sqlite")) as ledger:
        assert ledger.execute("SELECT count(*) FROM instance").fetchone() == (len(images),)
    gone = machine.ssh("sudo zpool import 2>&1; sudo zpool list 2>&1", user=ADMINISTRATOR, key=fleet.key, check=False)
    assert gone.stdout.count("no pools available") == 2, gone.stdout
