"""Storage commitment (PS3.4 Annex J): of each instance is said what is true, over either association."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association

from tests import data, peers
from tests.harness import PATIENCE, Agent, running, wait_for
from tests.receive import proof, scu
from tests.undisturbed import no_delay, undisturbed

NO_SUCH_INSTANCE, CLASS_MISMATCH = 0x0112, 0x0119
WELL_KNOWN = "1.2.840.10008.1.20.1.1"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """A receiver that reports over the association that asked."""
    with running(Agent(tmp_path_factory.mktemp("commitment")), "receive") as agent:
        yield agent


@dataclass
class Report:
    """A report: what it says is safe, and what failed with its reason."""

    event: int
    transaction: str
    safe: set[tuple[str, str]]
    failed: dict[tuple[str, str], int]


@dataclass
class Asker:
    """A pynetdicom SCU of storage and of storage commitment."""

    association: Association
    reports: queue.Queue[tuple[Report, threading.Thread]] = field(default_factory=queue.Queue)

    def ask(self, *instances: tuple[str, str]) -> Report:
        """N-ACTION, and the N-EVENT-REPORT that follows it on this association."""
        transaction, status = self.request(*instances)
        assert status == 0
        report, thread = self.reports.get(timeout=PATIENCE)
        thread.join(PATIENCE)  # it still has to send the response, which must not come in between what we send next
        assert report.transaction == transaction and not thread.is_alive()
        return report

    def store(self, *images: Dataset) -> None:
        """C-STORE; all must be acknowledged."""
        with undisturbed(self.association):
            assert [self.association.send_c_store(image).Status for image in images] == [0] * len(images)

    def request(self, *instances: tuple[str, str]) -> tuple[str, int]:
        """N-ACTION alone: the transaction and the status."""
        request = Dataset()
        request.TransactionUID = generate_uid()
        request.ReferencedSOPSequence = [_item(*instance) for instance in instances]
        with undisturbed(self.association):
            status, _ = self.association.send_n_action(request, 1, scu.COMMITMENT, WELL_KNOWN)
        return str(request.TransactionUID), int(status.Status)


def _item(sop_class: str, sop_instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
    return item


def read(event: evt.Event) -> Report:
    """A report from pynetdicom's event; every failed instance must have a reason, no safe one may."""
    info = event.event_information
    safe, failed = info.get("ReferencedSOPSequence") or [], info.get("FailedSOPSequence") or []
    assert all("FailureReason" not in item for item in safe)
    return Report(event.request.EventTypeID, str(info.TransactionUID),
                  {(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in safe},
                  {(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)): int(item.FailureReason)
                   for item in failed})


@contextmanager
def asker(agent: Agent, calling: str = "SCANNER") -> Iterator[Asker]:
    """An association for storage and commitment."""
    reports: queue.Queue[tuple[Report, threading.Thread]] = queue.Queue()

    def told(event: evt.Event) -> tuple[int, None]:
        reports.put((read(event), threading.current_thread()))
        return 0, None

    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = PATIENCE
    for sop_class in (MRImageStorage, CTImageStorage, scu.COMMITMENT):
        ae.add_requested_context(sop_class)
    association = ae.associate("127.0.0.1", agent.port, ae_title="RELAY", evt_handlers=[
        (evt.EVT_N_EVENT_REPORT, told), (evt.EVT_CONN_OPEN, no_delay)])
    assert association.is_established
    try:
        yield Asker(association, reports)
    finally:
        with undisturbed(association):
            association.release()


def test_what_was_just_stored_is_safe(box: Agent) -> None:
    """Asked in the same breath as it was sent: the receiver must not be behind its own word."""
    with asker(box) as peer:
        for _ in range(10):
            images = list(data.study(1, 3, transfer_syntax="1.2.840.10008.1.2"))
            peer.store(*images)
            wanted = {(str(image.SOPClassUID), str(image.SOPInstanceUID)) for image in images}
            report = peer.ask(*wanted)
            assert (report.event, report.safe, report.failed) == (1, wanted, {})


def test_asked_over_another_association(box: Agent) -> None:
    """Many scanners store over one association and ask over the next, which another process may serve."""
    for _ in range(10):
        images = list(data.study(1, 3))
        with scu.SCU(box.port) as other, scu.SCU(box.port) as store:
            other.associate(scu.ECHO)  # so that the two that matter are served by different processes
            store.associate()
            for image in images:
                assert store.store(image.SOPInstanceUID, scu.encode(image)) == 0
            wanted = {(str(image.SOPClassUID), str(image.SOPInstanceUID)) for image in images}
            with asker(box) as peer:
                report = peer.ask(*wanted)
                assert (report.safe, report.failed) == (wanted, {})


def test_what_is_not_safe_is_said(box: Agent) -> None:
    """Unknown, of another class, deleted behind our back, cut short: each with its reason, the safe one beside them."""
    good, lost, short = data.instance(), data.instance(), data.instance()
    with scu.SCU(box.port) as store:
        store.associate()
        for image in (good, lost, short):
            assert store.store(image.SOPInstanceUID, scu.encode(image)) == 0
        store.release()
    files = {image.SOPInstanceUID: proof.stored(box, image.SOPInstanceUID) for image in (good, lost, short)}
    wait_for(lambda: all(path.exists() for path in files.values()))
    files[lost.SOPInstanceUID].unlink()
    files[short.SOPInstanceUID].write_bytes(files[short.SOPInstanceUID].read_bytes()[:-2])
    unknown = generate_uid()
    with asker(box) as peer:
        report = peer.ask((MRImageStorage, good.SOPInstanceUID), (CTImageStorage, good.SOPInstanceUID),
                          (MRImageStorage, unknown), (MRImageStorage, lost.SOPInstanceUID),
                          (MRImageStorage, short.SOPInstanceUID))
    assert report.event == 2
    assert report.safe == {(MRImageStorage, good.SOPInstanceUID)}
    assert report.failed == {
        (CTImageStorage, good.SOPInstanceUID): CLASS_MISMATCH, (MRImageStorage, unknown): NO_SUCH_INSTANCE,
        (MRImageStorage, lost.SOPInstanceUID): NO_SUCH_INSTANCE,
        (MRImageStorage, short.SOPInstanceUID): NO_SUCH_INSTANCE}


def test_ten_thousand_at_once(box: Agent) -> None:
    """A large study in one request, most of it unknown: one report with every instance in it, in PDUs of our size."""
    image = data.instance()
    known = (str(image.SOPClassUID), str(image.SOPInstanceUID))
    asked = {(str(MRImageStorage), f"{generate_uid()[:50]}.{number}") for number in range(10_000)}
    request = Dataset()
    request.TransactionUID = generate_uid()
    request.ReferencedSOPSequence = [_item(*instance) for instance in (known, *asked)]
    content = scu.encode(request)
    with scu.SCU(box.port, timeout=200) as peer:
        peer.associate({1: scu.MR[1], 3: (scu.COMMITMENT, scu.MR[1][1])}, longest=16384)
        assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.send(scu.pdu(scu.P_DATA, scu.pdv(3, 3, scu.command(
            requested_class=scu.COMMITMENT, field=0x0130, message=9, data_set=1, requested_instance=WELL_KNOWN,
            action=1))))
        peer.data((content[at:at + 100_000] for at in range(0, len(content), 100_000)), context=3)
        assert peer.response()["status"] == 0
        event, told = peer.message()
        assert (event["field"], event["event"], event["affected_instance"]) == (0x0100, 2, WELL_KNOWN)
        peer.send(scu.pdu(scu.P_DATA, scu.pdv(3, 3, scu.command(
            affected_class=scu.COMMITMENT, field=0x8100, responded=event["message"], data_set=0x0101, status=0))))
        peer.release()
    report = dcmread(BytesIO(told or b""), force=True)
    assert report.TransactionUID == request.TransactionUID
    assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == [known[1]]
    assert {(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in report.FailedSOPSequence} == asked
    assert {item.FailureReason for item in report.FailedSOPSequence} == {NO_SUCH_INSTANCE}


def test_requests_that_are_none(box: Agent) -> None:
    """Another action, another instance, a data set that is garbage: refused by status, never reported on."""
    contexts = {1: (scu.COMMITMENT, ["1.2.840.10008.1.2"]), 3: scu.MR[1]}
    with scu.SCU(box.port) as peer:
        peer.associate(contexts)
        base: dict[str, Any] = {"requested_class": scu.COMMITMENT, "field": 0x0130, "message": 1, "data_set": 1,
                                "requested_instance": WELL_KNOWN, "action": 1}
        cases: list[tuple[dict[str, Any], int, bytes, int]] = [
            ({"action": 2}, 1, b"", 0x0123), ({"requested_instance": "1.2.3"}, 1, b"", 0x0123), ({}, 3, b"", 0x0123),
            ({}, 1, b"\xff" * 50, 0x0110), ({}, 1, b"", 0x0110)]
        for change, context, content, status in cases:
            request = scu.command(**base | change)
            peer.send(scu.pdu(scu.P_DATA, scu.pdv(context, 3, request) + scu.pdv(context, 2, content)))
            assert peer.response()["status"] == status
        peer.release()
    assert proof.failures(box.log) == []


# Over an association of its own

def settings(port: int, calling: str) -> str:
    """A receiver that reports to ``calling`` at a port."""
    return ('[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]\n'
            f'commitment_to = ["{calling}@127.0.0.1:{port}"]')


def test_reported_over_an_association_of_its_own(tmp_path: Path) -> None:
    """The receiver opens no connections; the worker calls back, waits for a caller that is away, and tells once."""
    port = peers.free_port()
    reports: queue.Queue[tuple[Report, str]] = queue.Queue()

    def told(event: evt.Event) -> tuple[int, None]:
        reports.put((read(event), str(event.assoc.requestor.ae_title)))
        return 0, None

    with running(Agent(tmp_path, receivers=settings(port, "MR1"))) as agent:
        image, unknown = data.instance(transfer_syntax="1.2.840.10008.1.2"), generate_uid()
        with asker(agent, "MR1") as peer:
            peer.store(image)
            transaction, status = peer.request((MRImageStorage, image.SOPInstanceUID), (MRImageStorage, unknown))
            assert status == 0
        wait_for(lambda: "caller is not reachable" in agent.log, say="nobody tried to report")
        ae = AE(ae_title="MR1")
        ae.add_supported_context(scu.COMMITMENT, scu_role=False, scp_role=True)
        server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, told)])
        try:
            report, calling = reports.get(timeout=PATIENCE)
            assert calling == "RELAY" and report.transaction == transaction and report.event == 2
            assert report.safe == {(MRImageStorage, image.SOPInstanceUID)}
            assert report.failed == {(MRImageStorage, unknown): NO_SUCH_INSTANCE}
            wait_for(lambda: agent.ledger.value("SELECT count(*) FROM commitment WHERE answered IS NOT NULL") == 1)
            time.sleep(6)  # the chore runs every five seconds
            assert reports.empty(), "a report was sent twice"
            with asker(agent, "OTHER") as other:  # who is not listed is told over its own association
                assert other.ask((MRImageStorage, image.SOPInstanceUID)).event == 1
        finally:
            server.shutdown()
        assert proof.failures(agent.log) == []


def test_callers_that_are_away_do_not_hold_up_the_work(tmp_path: Path) -> None:
    """Twenty reports to a machine that swallows packets: sessions still become complete meanwhile."""
    receiver = settings(104, "MR1").replace("127.0.0.1:104", "192.0.2.1:104")
    with running(Agent(tmp_path, receivers=receiver)) as agent:
        with asker(agent, "MR1") as peer:
            for _ in range(20):
                assert peer.request((MRImageStorage, generate_uid()))[1] == 0
        wait_for(lambda: agent.ledger.value("SELECT count(*) FROM commitment") == 20)
        wait_for(lambda: "caller is not reachable" in agent.log)
        with scu.SCU(agent.port) as store:
            image = data.instance()
            assert store.associate().store(image.SOPInstanceUID, scu.encode(image)) == 0
            store.release()
        agent.wait_state("held", 1)


def test_orthanc_asks_and_is_told(tmp_path: Path) -> None:
    """End to end with another product as the SCU: Orthanc sends, asks, and reads our report on its own SCP."""
    folder = tmp_path / "orthanc"
    port = peers.free_port()
    with running(Agent(tmp_path / "box", receivers=settings(port, "ORTHANC"))) as agent:
        modality = {"relay": {"AET": "RELAY", "Host": "127.0.0.1", "Port": agent.port, "AllowStorageCommitment": True}}
        with peers.orthanc(folder, DicomPort=port, DicomModalities=modality) as orthanc:
            images = list(data.study(1, 5))
            for path in data.write(images, tmp_path / "files"):
                requests.post(f"{orthanc.rest}/instances", data=path.read_bytes(), timeout=PATIENCE).raise_for_status()
            stored = requests.post(f"{orthanc.rest}/modalities/relay/store", timeout=PATIENCE, json={
                "Resources": orthanc.instances(), "StorageCommitment": True}).json()
            assert stored["FailedInstancesCount"] == 0
            unknown = generate_uid()
            asked = requests.post(f"{orthanc.rest}/modalities/relay/storage-commitment", timeout=PATIENCE, json={
                "DicomInstances": [[str(MRImageStorage), unknown],
                                   *([str(i.SOPClassUID), str(i.SOPInstanceUID)] for i in images)]}).json()

            def outcome(transaction: str) -> Any:
                report = requests.get(f"{orthanc.rest}/storage-commitment/{transaction}", timeout=PATIENCE).json()
                return report if report["Status"] != "Pending" else None

            report = wait_for(lambda: outcome(stored["StorageCommitmentTransactionUID"]), say=agent.log[-2000:])
            assert report["Status"] == "Success" and len(report["Success"]) == 5
            report = wait_for(lambda: outcome(asked["ID"]), say=agent.log[-2000:])
            assert report["Status"] == "Failure" and report["RemoteAET"] == "RELAY"
            assert {entry["SOPInstanceUID"] for entry in report["Success"]} == {i.SOPInstanceUID for i in images}
            assert [(entry["SOPInstanceUID"], entry["FailureReason"]) for entry in report["Failures"]] == [
                (unknown, NO_SUCH_INSTANCE)]


def test_the_role_is_ours(box: Agent) -> None:
    """A caller that wants to be told roles (PS3.7 section D.3.3.4) is told that it is the SCU and no SCP."""
    ae = AE(ae_title="SCANNER")
    ae.add_requested_context(scu.COMMITMENT)
    association = ae.associate("127.0.0.1", box.port, ae_title="RELAY",
                               ext_neg=[build_role(scu.COMMITMENT, scu_role=True, scp_role=True)])
    assert association.is_established
    (context,) = association.accepted_contexts
    assert context.as_scu and not context.as_scp
    with undisturbed(association):
        association.release()
