from __future__ import annotations

import json

import pytest

from tests.box.studies import Study


@pytest.fixture(scope="module")
def study(host):
    """A study for a session of its own."""
    made = Study(host.check_output("hostname"))
    yield made
    made.forget()


def test_study_reaches_the_archive(host, peer, study, wait_for):
    """The whole path, with a scanner's own tools: acknowledged, delivered, receipted, and there on the other side.

    It crosses everything that a fault of rights, sandbox, firewall, certificates or credentials would stop.
    """
    assert study.send(peer("scanner"), host.check_output("hostname -I").split()[0])
    shipments = wait_for(lambda: study.delivered(host))
    assert shipments, host.check_output("relay-agent list < /dev/null")
    receipts = json.loads(host.check_output(f"relay-agent receipt {shipments[0]['shipment']} --json < /dev/null"))
    proved = {instance["sop_instance"] for receipt in receipts for instance in receipt["instances"]}
    assert proved == {str(image.SOPInstanceUID) for image in study.images}
    assert study.archived(peer("central")) == len(study.images)


def test_strangers_are_rejected(host, peer):
    """An address that may come in is not yet a caller that may send: the AE title has to be known as well."""
    address = host.check_output("hostname -I").split()[0]
    assert peer("scanner").run(f"echoscu -aet STRANGER -aec RELAY {address} 11112").failed
    assert peer("scanner").run(f"echoscu -aet SCANNER -aec RELAY {address} 11112").succeeded
