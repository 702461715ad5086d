"""C-STORE: to DCMTK's storescp and a real Orthanc, and to peers that refuse or break."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, _config, evt
from pynetdicom.dimse_primitives import N_EVENT_REPORT

from relay_agent import dicom
from relay_agent.config_destinations import DICOM
from relay_agent.config_values import Window
from relay_agent.destinations import Retry, Stopped
from relay_agent.destinations import dicom as dicom_destination
from relay_agent.destinations.dicom import DICOMDestination, meaning
from relay_agent.negotiate import COMMITMENT
from relay_agent.package import Item, Manifest
from relay_agent.throttle import Closed, Throttle
from tests import data
from tests.destinations import UNLIMITED, images, sample
from tests.peers import Orthanc, free_port, orthanc, storescp

# Everything that DCMTK knows, in the preferred order of the peer and not of ours; bit for bit to the disk.
ANYTHING = ("+xa", "+B")
PRIVATE_CLASS, PRIVATE_SYNTAX = "1.3.12.2.1107.5.9.1", "1.2.840.113619.5.2"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


def destination(port: int, aet: str = "STORESCP", throttle: Throttle = UNLIMITED, **settings: Any) -> DICOMDestination:
    return DICOMDestination(DICOM(name="there", kind="dicom", host="127.0.0.1", port=port, ae_title=aet, **settings),
                            throttle)


def deliver(there: DICOMDestination, manifest: Manifest) -> set[str]:
    """All verbs in their order; how the instances were proved."""
    assert there.missing(manifest, None) == list(manifest.items)
    assert there.send(manifest, manifest.items) == f"0000 {len(manifest.items)} stored"
    assert there.missing(manifest, None) == []
    proofs = there.prove(manifest, there.finish(manifest))
    assert [proof.sop_instance for proof in proofs] == [item.sop_instance for item in manifest.items]
    return {proof.how for proof in proofs}


def data_set(path: Path) -> bytes:
    return path.read_bytes()[dicom.read_meta(path).offset:]


@pytest.mark.parametrize("name", ["MR_small.dcm", "rtplan.dcm", "test-SR.dcm", "JPEG2000.dcm", "JPEG-lossy.dcm",
                                  "ExplVR_BigEnd.dcm", "color3d_jpeg_baseline.dcm"])
def test_bytes_are_untouched(tmp_path: Path, name: str) -> None:
    manifest = sample(tmp_path, name)
    with storescp(tmp_path / "scp", *ANYTHING) as peer:
        assert deliver(destination(peer.port, verify="status"), manifest) == {"status"}
        (file,) = peer.files()
    assert data_set(file) == data_set(manifest.items[0].path)
    assert dicom.read_meta(file).transfer_syntax == manifest.items[0].transfer_syntax


def test_mixed_syntaxes_and_small_pdus(tmp_path: Path) -> None:
    study = [data.instance(study="1.2.3", number=number, transfer_syntax=syntax)
             for number, syntax in enumerate((ExplicitVRLittleEndian, ImplicitVRLittleEndian) * 2)]
    manifest = images(tmp_path, study)
    with storescp(tmp_path / "scp", *ANYTHING, "-pdu", "4096") as peer:
        deliver(destination(peer.port, verify="status"), manifest)
        got = sorted(data_set(file) for file in peer.files())
    assert got == sorted(data_set(item.path) for item in manifest.items)


def test_find_proves(archive: Orthanc, tmp_path: Path) -> None:
    there = destination(archive.dicom_port, archive.aet)
    assert deliver(there, images(tmp_path)) == {"find"}
    assert deliver(there, sample(tmp_path, "CT_small.dcm")) == {"find"}


def test_only_what_is_missing_is_sent_again(archive: Orthanc, tmp_path: Path) -> None:
    there, manifest = destination(archive.dicom_port, archive.aet), images(tmp_path)
    there.send(manifest, manifest.items[3:])
    after_a_restart = destination(archive.dicom_port, archive.aet)
    missing = after_a_restart.missing(manifest, None)
    assert missing == list(manifest.items[:3])
    with pytest.raises(Retry, match="3 of 10 instances are not listed"):
        after_a_restart.prove(manifest, "")
    after_a_restart.send(manifest, missing)
    assert len(after_a_restart.prove(manifest, "")) == 10


def test_statuses_count_for_one_run_only(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with storescp(tmp_path / "scp", *ANYTHING) as peer:
        there = destination(peer.port, verify="status")
        there.send(manifest, manifest.items[:5])
        assert there.missing(manifest, None) == list(manifest.items[5:])
        with pytest.raises(Retry, match="5 of 10 instances are not acknowledged since the agent was started"):
            there.prove(manifest, "")
        assert destination(peer.port, verify="status").missing(manifest, None) == list(manifest.items)


def test_presence_does_not_prove_a_new_version(archive: Orthanc, tmp_path: Path) -> None:
    old = images(tmp_path)
    there = destination(archive.dicom_port, archive.aet)
    deliver(there, old)
    deliver(there, replace(old, items=tuple(replace(item, replaces=True) for item in old.items)))


def test_parts_in_parallel(archive: Orthanc, tmp_path: Path) -> None:
    there, manifest = destination(archive.dicom_port, archive.aet), images(tmp_path)
    streams = [threading.Thread(target=there.send, args=(manifest, manifest.items[n::3])) for n in range(3)]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    assert len(there.prove(manifest, "")) == 10


def test_more_classes_than_an_association_holds(tmp_path: Path) -> None:
    study = [data.instance(study="1.2.3", series="1.2.3.4", sop_class=f"{MRImageStorage}.{n}", size=(2, 2))
             for n in range(130)]
    manifest = images(tmp_path, study)
    with scp(anything=True) as (port, got):
        destination(port, verify="status").send(manifest, manifest.items)
    assert len(got) == 130


def test_private_class_and_syntax(tmp_path: Path) -> None:
    study = [data.instance(study="1.2.3", series="1.2.3.4", sop_class=PRIVATE_CLASS),
             data.instance(study="1.2.3", series="1.2.3.4", sop_class=PRIVATE_CLASS)]
    manifest = images(tmp_path, study)
    manifest = replace(manifest, items=(manifest.items[0], in_private_syntax(manifest.items[1])))
    with scp(anything=True) as (port, got):
        destination(port, verify="status").send(manifest, manifest.items)
    assert sorted(got) == sorted(data_set(item.path) for item in manifest.items)


def in_private_syntax(item: Item) -> Item:
    meta = dicom.read_meta(item.path)
    content = dicom.file_header(meta.sop_class, meta.sop_instance, PRIVATE_SYNTAX, "MR1", "RELAY") \
        + item.path.read_bytes()[meta.offset:]
    item.path.write_bytes(content)
    return replace(item, transfer_syntax=PRIVATE_SYNTAX, size=len(content))


# What is refused


def test_unknown_class_is_named_and_the_rest_is_sent(archive: Orthanc, tmp_path: Path) -> None:
    study = [*data.study(1, 3, study="1.2.3"), data.instance(study="1.2.3", sop_class=PRIVATE_CLASS)]
    manifest = images(tmp_path, study)
    there = destination(archive.dicom_port, archive.aet)
    with pytest.raises(Stopped, match=rf"1 of 4 instances were refused: SOP Class {PRIVATE_CLASS} in transfer syntax "
                                      r"1\.2\.840\.10008\.1\.2\.1 \(Explicit VR Little Endian\) is not taken there"):
        there.send(manifest, manifest.items)
    assert len(there.missing(manifest, None)) == 1


def test_no_context_at_all(tmp_path: Path) -> None:
    manifest = sample(tmp_path, "JPEG2000.dcm")
    with storescp(tmp_path / "scp", "+xi") as peer, pytest.raises(Stopped, match="1 of 1 instances were refused"):
        destination(peer.port).send(manifest, manifest.items)


@pytest.mark.parametrize(("status", "error", "words"), [
    (0xA700, Retry, "A700, out of resources"), (0x0110, Retry, "0110, processing failure"),
    (0xA900, Stopped, "2 of 10 .* A900, data set does not match"), (0xC000, Stopped, "C000, cannot understand"),
    (0x0122, Stopped, "0122, SOP Class not supported"), (0x0124, Stopped, "0124, not authorised")])
def test_statuses_in_words(tmp_path: Path, status: int, error: type[Exception], words: str) -> None:
    manifest = images(tmp_path)
    with scp(statuses=[0, status, 0, status]) as (port, got), pytest.raises(error, match=words):
        destination(port, verify="status").send(manifest, manifest.items)
    assert len(got) == (10 if error is Stopped else 2)


def test_warnings_are_recorded(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with scp(statuses=[0xB000, 0xB007, 0xB000]) as (port, _):
        there = destination(port, verify="status")
        assert there.send(manifest, manifest.items) == "0000 10 stored, 2 with warning B000, 1 with warning B007"
        assert len(there.prove(manifest, "")) == 10


def test_every_status_has_words() -> None:
    assert [status for status in range(1, 0x10000) if meaning(status)[0]] == [0x0110, 0x0213, *range(0xA700, 0xA800)]
    assert all(meaning(status)[1] for status in range(1, 0x10000))


def test_full_disk(tmp_path: Path) -> None:
    with orthanc(tmp_path / "peer", largest_file=2**20) as full:
        there = destination(full.dicom_port, full.aet)
        manifest = images(tmp_path, [data.instance(size=(1024, 1024))])
        with pytest.raises(Retry, match="A700, out of resources"):
            there.send(manifest, manifest.items)
        assert there.missing(manifest, None) == list(manifest.items)


def test_association_refused(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with (orthanc(tmp_path / "peer", DicomCheckCalledAet=True) as archive,
          pytest.raises(Retry, match="does not go by the AE title NOBODY: correct ae_title")):
        destination(archive.dicom_port, "NOBODY").missing(manifest, None)
    # It closes so fast that its answer may get lost.
    with (storescp(tmp_path / "scp", "--refuse") as peer,
          pytest.raises(Retry, match=r"rejected the association|hung up on our request for an association")):
        destination(peer.port).send(manifest, manifest.items)
    with scp(known=["SOMEBODY"]) as (port, _), pytest.raises(Retry, match="add our AE title RELAY"):
        destination(port).send(manifest, manifest.items)


def test_no_queries(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with storescp(tmp_path / "scp", *ANYTHING) as peer:
        there = destination(peer.port)
        assert there.missing(manifest, None) == list(manifest.items)
        there.send(manifest, manifest.items)
        assert there.missing(manifest, None) == []
        with pytest.raises(Stopped, match="does not answer C-FIND"):
            there.prove(manifest, "")


# What breaks


def test_nobody_there(tmp_path: Path) -> None:
    there, manifest = destination(free_port()), images(tmp_path)
    for verb in (lambda: there.missing(manifest, None), lambda: there.send(manifest, manifest.items),
                 lambda: there.prove(manifest, "")):
        with pytest.raises(Retry, match="nothing listens there; is the server up"):
            verb()


def test_no_dicom_there(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def hang_up() -> None:
            listener.accept()[0].close()
        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(Retry, match="is it a DICOM port"):
            destination(listener.getsockname()[1]).send(manifest, manifest.items)


def test_line_is_cut(tmp_path: Path) -> None:
    manifest = images(tmp_path, [data.instance(size=(2048, 1024)) for _ in range(2)])
    with storescp(tmp_path / "scp", *ANYTHING) as peer, cut_after(2**20, peer.port) as port:
        there = destination(port, verify="status")
        with pytest.raises(Retry, match="the association broke"):
            there.send(manifest, manifest.items)
        assert there.missing(manifest, None) == list(manifest.items)


def test_peer_dies(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with scp(before=lambda number: number < 4) as (port, _):
        there = destination(port, verify="status")
        with pytest.raises(Retry, match="the association broke"):
            there.send(manifest, manifest.items)
        assert len(there.missing(manifest, None)) == 10 - 3


@pytest.mark.parametrize("said", [b"", b"\2\0\0\0\0\x99", b"\2\0\0\0\0\x99" + bytes(30)])
def test_peer_falls_silent_while_negotiating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(dicom_destination, "_CONNECT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def speak() -> None:
            connections.append(listener.accept()[0])
            connections[0].sendall(said)

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(Retry, match="no answer within"):
            destination(listener.getsockname()[1]).send(images(tmp_path), images(tmp_path).items)
        connections[0].close()


def test_peer_falls_silent_over_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_destination, "_ANSWER", 2.0)
    manifest, over = images(tmp_path), threading.Event()
    with scp(before=lambda number: number < 4 or over.wait(120)) as (port, _):
        there = destination(port, verify="status")
        with pytest.raises(Retry, match="or no answer came"):
            there.send(manifest, manifest.items)
        over.set()
        assert {*manifest.items[3:]} <= {*there.missing(manifest, None)}


def test_peer_lists_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_destination, "_LIST", 1.0)
    over = threading.Event()

    def find(event: evt.Event) -> Iterator[tuple[int, Any]]:
        while not over.is_set():
            yield 0xFF00, event.identifier

    ae = AE()
    ae.add_supported_context(dicom_destination.STUDY_ROOT_FIND)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    try:
        with pytest.raises(Retry, match="no end was in sight"):
            destination(server.server_address[1]).missing(images(tmp_path), None)
    finally:
        over.set()
        server.shutdown()


def test_a_report_between_instances_disturbs_nothing(tmp_path: Path) -> None:
    """Once with each instance: pynetdicom's requestor hung for ever at the next one, or broke the association."""
    manifest = images(tmp_path)

    def report(event: evt.Event) -> None:
        message = N_EVENT_REPORT()
        message.MessageID, message.EventTypeID = 1, 1
        message.AffectedSOPClassUID, message.AffectedSOPInstanceUID = COMMITMENT, "1.2.3"
        event.assoc.dimse.send_msg(message, event.context.context_id)

    with scp(meanwhile=report) as (port, got):
        destination(port, verify="status").send(manifest, manifest.items)
    assert len(got) == 10


def test_window_closes_on_the_way(tmp_path: Path) -> None:
    moments = iter([*[datetime(2026, 1, 1, 5, 59)] * 10, *[datetime(2026, 1, 1, 6)] * 10000])
    throttle = Throttle(None, [Window.model_validate({"start": time(18), "end": time(6)})], now=lambda: next(moments))
    manifest = images(tmp_path, [data.instance(size=(2048, 1024)) for _ in range(2)])
    with storescp(tmp_path / "scp", *ANYTHING) as peer, pytest.raises(Closed):
        destination(peer.port, throttle=throttle).send(manifest, manifest.items)


def test_limit_is_kept(tmp_path: Path) -> None:
    slept: list[float] = []
    throttle = Throttle(100_000, clock=lambda: sum(slept), sleep=slept.append)
    manifest = images(tmp_path)
    with storescp(tmp_path / "scp", *ANYTHING) as peer:
        destination(peer.port, throttle=throttle).send(manifest, manifest.items)
    assert sum(slept) == pytest.approx(manifest.size / 100_000, abs=0.3)


def test_little_is_read_ahead(tmp_path: Path) -> None:
    """A large instance on a slow line stays on the disk, also when the peer takes PDUs of any length (0)."""
    manifest = images(tmp_path, [data.instance(size=(2048, 2048)) for _ in range(4)])
    taken: list[int] = []

    class Clock(Throttle):
        def paced(self, stream: Iterable[bytes]) -> Iterator[bytes]:
            for block in super().paced(stream):
                taken.append(len(block))
                yield block

    with scp(max_pdu=0) as (port, got):
        destination(port, verify="status", throttle=Clock(None)).send(manifest, manifest.items)
    assert max(taken) <= 2**20
    assert len(got) == 4


# Checks, logs, TLS


def test_check(archive: Orthanc, tmp_path: Path) -> None:
    assert [finding.ok for finding in destination(archive.dicom_port, archive.aet).check()] == [True] * 4
    with storescp(tmp_path / "scp", *ANYTHING) as peer:
        assert [finding.ok for finding in destination(peer.port).check()] == [True, True, False, True]
        assert [finding.ok for finding in destination(peer.port, verify="status").check()] == [True] * 3
    (finding,) = destination(free_port()).check()
    assert not finding.ok and "nothing listens there" in finding.what


def test_nothing_of_the_patient_in_the_log(archive: Orthanc, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        deliver(destination(archive.dicom_port, archive.aet), images(tmp_path))
    assert data.PATIENT_ID not in caplog.text and data.PATIENT_NAME not in caplog.text


def test_tls_is_verified(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path / "peer")
    stranger, _ = self_signed(tmp_path / "stranger")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    manifest = images(tmp_path)
    with scp(tls=context) as (port, got):
        destination(port, verify="status", tls_ca=certificate).send(manifest, manifest.items)
        assert len(got) == 10
        with pytest.raises(Retry, match="its certificate is not trusted"):
            destination(port, tls_ca=stranger).send(manifest, manifest.items)
        with pytest.raises(Retry, match="is it a DICOM port without TLS"):
            destination(port).send(manifest, manifest.items)
    with pytest.raises(Retry, match=r"tls_ca = .* cannot be used"):
        destination(port, tls_ca=tmp_path / "none").send(manifest, manifest.items)
    with storescp(tmp_path / "scp") as peer, pytest.raises(Retry, match=r"TLS failed|the connection broke"):
        destination(peer.port, tls_ca=certificate).send(manifest, manifest.items)


def self_signed(path: Path) -> tuple[Path, Path]:
    certificate, key = path.with_suffix(".crt"), path.with_suffix(".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=peer",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate], check=True,
                   capture_output=True)
    return certificate, key


# Peers made for one test


@contextmanager
def scp(statuses: list[int] | None = None, *, anything: bool = False, known: list[str] | None = None,
        tls: ssl.SSLContext | None = None, max_pdu: int = 16382,
        before: Callable[[int], bool] = lambda number: True,
        meanwhile: Callable[[evt.Event], object] = lambda event: None) -> Iterator[tuple[int, list[bytes]]]:
    """A Storage SCP that answers with these statuses in turn, then 0; its port, and the data sets it got.

    ``before`` is asked with the number of each instance, and False aborts the association; ``meanwhile`` is called
    before each answer.
    """
    got: list[bytes] = []

    def store(event: evt.Event) -> int:
        got.append(event.request.DataSet.getvalue())
        if not before(len(got)):
            event.assoc.abort()
        meanwhile(event)
        return statuses[len(got) - 1] if statuses and len(got) <= len(statuses) else 0

    ae = AE()
    ae.require_calling_aet, ae.maximum_pdu_size = known or [], max_pdu
    ae.add_supported_context(MRImageStorage, [ExplicitVRLittleEndian])
    _config.UNRESTRICTED_STORAGE_SERVICE = anything
    server = ae.start_server(("127.0.0.1", 0), block=False, ssl_context=tls, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield server.server_address[1], got
    finally:
        server.shutdown()
        _config.UNRESTRICTED_STORAGE_SERVICE = False


@contextmanager
def cut_after(count: int, port: int) -> Iterator[int]:
    """A proxy that cuts the connection when so many bytes went through."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def run() -> None:
            left = count
            inner, _ = listener.accept()
            with inner, socket.create_connection(("127.0.0.1", port)) as outer:
                back = threading.Thread(target=pump, args=(outer, inner), daemon=True)
                back.start()
                while left > 0 and (block := inner.recv(min(left, 65536))):
                    outer.sendall(block)
                    left -= len(block)
                inner.shutdown(socket.SHUT_RDWR)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while block := source.recv(65536):
                    sink.sendall(block)
            except OSError:  # it was cut
                pass

        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]

