from __future__ import annotations

import json
import shutil

import pytest
from pydicom.uid import generate_uid

from tests import data
from tests.box.conftest import PROJECT

SHARED = "/srv/relay"  # where peers see the project


@pytest.fixture
def send(host, peer, address, wait_for):
    """Have the scanner send images and wait until their session is delivered; the session's receipts."""
    folders = []

    def go(session, images):
        folder = PROJECT / "build/lab/studies" / session
        folders.append(folder)
        data.write(images, folder)
        sent = peer("scanner").run(
            f"storescu -aet SCANNER -aec RELAY {address} 11112 +sd {SHARED}/{folder.relative_to(PROJECT)}")
        assert sent.succeeded, sent.stderr

        def delivered():
            listed = json.loads(host.check_output("relay-agent list --json < /dev/null"))
            return [row for row in listed if row["session"] == session and row["state"] == "delivered"]
        shipments = wait_for(delivered)
        assert shipments, host.check_output("relay-agent list < /dev/null")
        return json.loads(host.check_output(f"relay-agent receipt {shipments[0]['shipment']} --json < /dev/null"))
    yield go
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture
def session(host):
    """A session that nobody has sent before."""
    return f"{host.check_output('hostname')}_{generate_uid()[-8:]}"


def test_study_reaches_the_archive(peer, send, session):
    """The whole path, with a scanner's own tools: acknowledged, delivered, receipted, and there on the other side.

    It crosses everything that a fault of rights, sandbox, firewall, certificates or credentials would stop.
    """
    images = list(data.study(comments=f"Project:P1 Subject:{session} Session:{session}"))
    proved = {instance["sop_instance"] for receipt in send(session, images) for instance in receipt["instances"]}
    assert proved == {str(image.SOPInstanceUID) for image in images}
    there = peer("central").check_output(f"find /var/lib/xnat -path '*{session}*' -name '*.dcm' | wc -l")
    assert int(there) == len(images)


def test_identifiers_stay_in_the_box(peer, send, session):
    """De-identification runs in the worker's sandbox as well: child processes, numpy, no memory that can be executed.

    A library that wants such memory, or a call that is not allowed, would show here and nowhere else.
    """
    planted = {"PatientName": f"Planted^{session[-8:]}", "AccessionNumber": f"ACC-{session[-8:]}-P"}
    images = list(data.study(1, 3, comments=f"Project:P1 Subject:{session} Session:{session}",
                             StudyDescription="TRIAL", **planted))
    receipts = send(session, images)
    assert all(receipt["recipe_sha256"] for receipt in receipts)
    central = peer("central")
    assert int(central.check_output(f"find /var/lib/xnat -path '*{session}*' -name '*.dcm' | wc -l")) == len(images)
    for value in (*planted.values(), images[0].StudyInstanceUID):
        assert central.run(f"grep -rlF '{value}' /var/lib/xnat").stdout == ""


def test_strangers_are_rejected(peer, address):
    """An address that may come in is not yet a caller that may send: the AE title has to be known as well."""
    assert peer("scanner").run(f"echoscu -aet STRANGER -aec RELAY {address} 11112").failed
    assert peer("scanner").run(f"echoscu -aet SCANNER -aec RELAY {address} 11112").succeeded
