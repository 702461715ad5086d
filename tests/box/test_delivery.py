from __future__ import annotations

import json
import shutil

import pytest
from pydicom.uid import generate_uid

from tests import data
from tests.box.conftest import PROJECT

SHARED = "/srv/relay"  # where peers see the project


@pytest.fixture(scope="module")
def study(host):
    """A study of ten images that nobody has sent before, for a session of its own."""
    session = f"{host.check_output('hostname')}_{generate_uid()[-8:]}"
    images = list(data.study(comments=f"Project:P1 Subject:{session} Session:{session}"))
    folder = PROJECT / "build/lab/studies" / session
    data.write(images, folder)
    yield session, images, folder.relative_to(PROJECT)
    shutil.rmtree(folder)


def test_study_reaches_the_archive(host, peer, study, wait_for):
    """The whole path, with a scanner's own tools: acknowledged, delivered, receipted, and there on the other side.

    It crosses everything that a fault of rights, sandbox, firewall, certificates or credentials would stop.
    """
    session, images, folder = study
    address = host.check_output("hostname -I").split()[0]
    sent = peer("scanner").run(f"storescu -aet SCANNER -aec RELAY {address} 11112 +sd {SHARED}/{folder}")
    assert sent.succeeded, sent.stderr

    def delivered():
        listed = json.loads(host.check_output("relay-agent list --json < /dev/null"))
        return [row for row in listed if row["session"] == session and row["state"] == "delivered"]
    shipments = wait_for(delivered)
    assert shipments, host.check_output("relay-agent list < /dev/null")
    receipts = json.loads(host.check_output(f"relay-agent receipt {shipments[0]['shipment']} --json < /dev/null"))
    proved = {instance["sop_instance"] for receipt in receipts for instance in receipt["instances"]}
    assert proved == {str(image.SOPInstanceUID) for image in images}
    there = peer("central").check_output(f"find /var/lib/xnat -path '*{session}*' -name '*.dcm' | wc -l")
    assert int(there) == len(images)


def test_strangers_are_rejected(host, peer):
    """An address that may come in is not yet a caller that may send: the AE title has to be known as well."""
    address = host.check_output("hostname -I").split()[0]
    assert peer("scanner").run(f"echoscu -aet STRANGER -aec RELAY {address} 11112").failed
    assert peer("scanner").run(f"echoscu -aet SCANNER -aec RELAY {address} 11112").succeeded
