"""DICOMweb: against a real Orthanc, and against servers that say what is not so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from relay_agent.config_destinations import DICOMweb
from relay_agent.config_values import Window
from relay_agent.destinations import Retry, Stopped
from relay_agent.destinations.dicomweb import DICOMwebDestination
from relay_agent.package import Manifest
from relay_agent.throttle import Closed, Throttle
from tests import data
from tests.destinations import UNLIMITED, images, sample
from tests.peers import Orthanc, free_port, orthanc

SAMPLES = ["MR_small.dcm", "CT_small.dcm", "rtplan.dcm", "rtdose.dcm", "test-SR.dcm", "reportsi.dcm", "JPEG2000.dcm",
           "693_J2KR.dcm", "JPEG-lossy.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm", "color3d_jpeg_baseline.dcm"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


def destination(url: str, throttle: Throttle = UNLIMITED, **settings: Any) -> DICOMwebDestination:
    return DICOMwebDestination(DICOMweb(name="there", kind="dicomweb", url=url, **settings), throttle)


def deliver(there: DICOMwebDestination, manifest: Manifest) -> list[str]:
    """All verbs in their order; how each instance was proved."""
    assert there.missing(manifest, None) == list(manifest.items)
    answer = there.send(manifest, manifest.items)
    assert answer == f"200 {len(manifest.items)} stored"
    assert there.missing(manifest, None) == []
    location = there.finish(manifest)
    assert location == f"studies/{manifest.study_uid}"
    proofs = there.prove(manifest, location)
    assert [proof.sop_instance for proof in proofs] == [item.sop_instance for item in manifest.items]
    return [proof.how for proof in proofs]


# A real archive


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_arrive_byte_for_byte(archive: Orthanc, tmp_path: Path, name: str) -> None:
    assert deliver(destination(archive.dicomweb), sample(tmp_path, name)) == ["bytes"]


def test_several_series(archive: Orthanc, tmp_path: Path) -> None:
    assert deliver(destination(archive.dicomweb), images(tmp_path)) == ["bytes"] * 10


def test_sample_fetches_one_of_each_series(archive: Orthanc, tmp_path: Path) -> None:
    hows = deliver(destination(archive.dicomweb, verify="sample"), images(tmp_path))
    assert hows == ["bytes", "find", "find", "find", "find"] * 2


def test_only_what_is_missing_is_sent_again(archive: Orthanc, tmp_path: Path) -> None:
    there, manifest = destination(archive.dicomweb), images(tmp_path)
    there.send(manifest, manifest.items[:5])
    missing = destination(archive.dicomweb).missing(manifest, None)
    assert missing == list(manifest.items[5:])
    with pytest.raises(Retry, match="5 of 10 instances are not there"):
        there.prove(manifest, "")
    there.send(manifest, missing)
    assert len(there.prove(manifest, "")) == 10


def test_sending_again_does_no_harm(archive: Orthanc, tmp_path: Path) -> None:
    there, manifest = destination(archive.dicomweb), images(tmp_path)
    assert there.send(manifest, manifest.items) == there.send(manifest, manifest.items)
    assert len(there.prove(manifest, "")) == 10


def test_presence_does_not_prove_a_new_version(archive: Orthanc, tmp_path: Path) -> None:
    old = next(iter(data.study(1, 1)))
    there, first = destination(archive.dicomweb), images(tmp_path / "1", [old])
    deliver(there, first)
    old.PatientID = "corrected"  # the header alone: the pixels are the same
    second = images(tmp_path / "2", [old], replaces=True)
    assert there.missing(second, None) == list(second.items)
    there.send(second, second.items)  # Orthanc says it is stored, and keeps what it had (OverwriteInstances)
    with pytest.raises(Stopped, match="1 instances and still gives back the old ones"):
        there.missing(second, None)
    with pytest.raises(Retry, match="1 of 1 instances are not there"):
        there.prove(second, "")
    for one in requests.get(f"{archive.rest}/instances", timeout=60).json():
        tags = requests.get(f"{archive.rest}/instances/{one}/simplified-tags", timeout=60).json()
        if tags["SOPInstanceUID"] == second.items[0].sop_instance:
            requests.delete(f"{archive.rest}/instances/{one}", timeout=60)
    deliver(there, second)


def test_parts_in_parallel(archive: Orthanc, tmp_path: Path) -> None:
    there, manifest = destination(archive.dicomweb), images(tmp_path)
    streams = [threading.Thread(target=there.send, args=(manifest, [item])) for item in manifest.items]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    assert len(there.prove(manifest, "")) == 10


def test_limit_is_kept(archive: Orthanc, tmp_path: Path) -> None:
    slept: list[float] = []
    throttle = Throttle(100_000, clock=lambda: sum(slept), sleep=slept.append)
    manifest = images(tmp_path)
    destination(archive.dicomweb, throttle).send(manifest, manifest.items)
    assert sum(slept) == pytest.approx(manifest.size / 100_000, abs=0.3)


def test_window_closes_on_the_way(archive: Orthanc, tmp_path: Path) -> None:
    moments = iter([datetime(2026, 1, 1, 5, 59), *[datetime(2026, 1, 1, 6)] * 100])
    throttle = Throttle(None, [Window.model_validate({"start": time(18), "end": time(6)})], now=lambda: next(moments))
    manifest = images(tmp_path, [data.instance(size=(1024, 1024)) for _ in range(2)])
    with pytest.raises(Closed):
        destination(archive.dicomweb, throttle).send(manifest, manifest.items)
    assert destination(archive.dicomweb).missing(manifest, None) == list(manifest.items)


def test_full_disk(tmp_path: Path) -> None:
    """Orthanc's plug-in answers 200 and stores nothing (Debian 12's), or 400 with the reason (Debian 13's)."""
    with orthanc(tmp_path / "peer", largest_file=2**20) as full:
        there, manifest = destination(full.dicomweb), images(tmp_path, [data.instance(size=(1024, 1024))])
        with pytest.raises(Retry, match=r"answered [24]00 and did not store 1 of 1 instances"):
            there.send(manifest, manifest.items)
        assert full.instances() == []
        assert there.missing(manifest, None) == list(manifest.items)


def test_credential_is_read_anew(tmp_path: Path) -> None:
    with orthanc(tmp_path / "peer", AuthenticationEnabled=True, RegisteredUsers={"relay": "right"}) as peer:
        file = tmp_path / "credential"
        there, manifest = destination(peer.dicomweb, credential=str(file)), images(tmp_path)
        with pytest.raises(Retry, match="cannot be read"):
            there.missing(manifest, None)
        file.write_text("relay:wrong")
        with pytest.raises(Retry, match=r"answered 401\. Write a valid user:password") as refused:
            there.send(manifest, manifest.items)
        assert "wrong" not in str(refused.value)
        assert [finding.ok for finding in there.check()] == [False]
        file.write_text("relay:right")
        assert [finding.ok for finding in there.check()] == [True]
        deliver(there, manifest)


def test_check(archive: Orthanc) -> None:
    assert [finding.ok for finding in destination(archive.dicomweb).check()] == [True]
    assert [finding.ok for finding in destination(f"{archive.rest}/nowhere").check()] == [False]
    (finding,) = destination(f"http://127.0.0.1:{free_port()}").check()
    assert not finding.ok and "nothing listens there" in finding.what


def test_nobody_there(tmp_path: Path) -> None:
    there, manifest = destination(f"http://127.0.0.1:{free_port()}"), images(tmp_path)
    for verb in (lambda: there.missing(manifest, None), lambda: there.send(manifest, manifest.items),
                 lambda: there.prove(manifest, "")):
        with pytest.raises(Retry, match="nothing listens there; is the server up"):
            verb()


# Servers that are not what they should be

Reply = tuple[int, str, bytes]


@contextmanager
def server(answer: Callable[[str, str, bytes], Reply | None]) -> Iterator[str]:
    """A server that answers as told (method, path, body); None cuts the connection after half of the body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert "Transfer-Encoding" not in self.headers
            reply = answer("POST", self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(reply)

        def do_GET(self) -> None:
            self.reply(answer("GET", self.path, b""))

        def reply(self, reply: Reply | None) -> None:
            status, kind, body = reply or (200, 'multipart/related; boundary=x', b"--x\r\n\r\nDICM")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body) + 100 * (reply is None)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = reply is None

        def log_message(self, *args: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        listener.server_close()


def stored(*uids: str, failed: dict[str, int] | None = None, others: tuple[int, ...] = ()) -> bytes:
    """An answer to STOW-RS in the DICOM JSON Model."""
    return json.dumps({
        "00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in uids]},
        "00081198": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [uid]},
                                            "00081197": {"vr": "US", "Value": [reason]}}
                                           for uid, reason in (failed or {}).items()]},
        "0008119A": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [reason]}} for reason in others]},
    }).encode()


JSON = "application/dicom+json"


@pytest.mark.parametrize("reply", [
    (200, JSON, b""), (200, JSON, b"[]"), (200, JSON, b"7"), (200, JSON, b"{\"00081199\": null}"),
    (200, JSON, stored("1.2.3")), (200, "text/html", b"<html>Please log in</html>"),
    (202, "application/dicom+xml", b"<NativeDicomModel"), (400, "text/plain", b"Bad file format"),
    (409, JSON, b""), (500, "text/plain", b"oops"), (503, "text/plain", b"later"), (404, "text/plain", b"")])
def test_lies_are_not_believed(tmp_path: Path, reply: Reply) -> None:
    manifest = images(tmp_path)
    with server(lambda *request: reply) as url, pytest.raises(Retry):
        destination(url).send(manifest, manifest.items)


@pytest.mark.parametrize(("reason", "error", "words"), [
    (0xA700, Retry, "A700, out of resources"), (0x0110, Retry, "0110, processing failure"),
    (0xA900, Stopped, "A900, data set does not match its SOP Class"), (0xC000, Stopped, "C000, cannot understand"),
    (0x0122, Stopped, "0122, SOP Class not supported"), (0xC122, Stopped, "C122, transfer syntax not supported"),
    (0x0124, Stopped, "0124, not authorised")])
def test_reasons_in_words(tmp_path: Path, reason: int, error: type[Exception], words: str) -> None:
    manifest = images(tmp_path)
    *good, bad = [item.sop_instance for item in manifest.items]
    reply = (202, JSON, stored(*good, failed={bad: reason}))
    with server(lambda *request: reply) as url, pytest.raises(error, match=f"not store 1 of 10 instances: 1 × {words}"):
        destination(url).send(manifest, manifest.items)


def test_failure_of_unnamed_instances(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    reply = (409, JSON, stored(others=(0xC000, 0xC000)))
    with server(lambda *request: reply) as url, pytest.raises(Stopped, match="2 × C000"):
        destination(url).send(manifest, manifest.items[:2])


def test_answer_in_xml(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    one, two = (item.sop_instance for item in manifest.items[:2])
    row = ('<Item number="1"><DicomAttribute tag="00081155" vr="UI"><Value number="1">{}</Value></DicomAttribute>{}'
           '</Item>')
    reason = '<DicomAttribute tag="00081197" vr="US"><Value number="1">42752</Value></DicomAttribute>'
    body = ('<?xml version="1.0"?><NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">'
            f'<DicomAttribute tag="00081199" vr="SQ">{row.format(one, "")}</DicomAttribute>'
            f'<DicomAttribute tag="00081198" vr="SQ">{row.format(two, reason)}</DicomAttribute></NativeDicomModel>')
    reply = (202, "application/dicom+xml", body.encode())
    with server(lambda *request: reply) as url:
        assert destination(url).send(manifest, manifest.items[:1]) == "202 1 stored"
        with pytest.raises(Retry, match="1 of 2 instances: 1 × A700"):
            destination(url).send(manifest, manifest.items[:2])


def test_already_there(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    item = manifest.items[0]
    reply = (409, JSON, stored(failed={item.sop_instance: 0xB00E}))
    with server(lambda *request: reply) as url:
        assert destination(url).send(manifest, [item]) == "409 1 stored"  # whether it is, prove() finds out
        with pytest.raises(Stopped, match="another version is there"):
            destination(url).send(manifest, [replace(item, replaces=True)])


@pytest.mark.parametrize(("status", "words"), [(413, "smaller part_size"), (415, "transfer syntaxes")])
def test_parts_that_will_never_be_taken(tmp_path: Path, status: int, words: str) -> None:
    manifest = images(tmp_path)
    with server(lambda *request: (status, "text/plain", b"")) as url, pytest.raises(Stopped, match=words):
        destination(url).send(manifest, manifest.items)


def test_the_body_is_what_it_says(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    bodies: list[bytes] = []

    def answer(method: str, path: str, body: bytes) -> Reply:
        bodies.append(body)
        return 200, JSON, stored(*(item.sop_instance for item in manifest.items))

    with server(answer) as url:
        destination(url).send(manifest, manifest.items)
    boundary = bodies[0].split(b"\r\n", 2)[1]
    pieces = bodies[0].split(b"\r\n" + boundary)
    assert [piece.partition(b"\r\n\r\n")[2] for piece in pieces[1:-1]] == [i.path.read_bytes() for i in manifest.items]
    assert pieces[-1] == b"--\r\n"


@pytest.mark.parametrize("page", [3, 1000])
def test_listing_of_odd_servers(tmp_path: Path, page: int) -> None:
    """One gives few at a time whatever is asked for; the other gives all and ignores the offset."""
    manifest = images(tmp_path)

    def answer(method: str, path: str, body: bytes) -> Reply:
        start = int(path.rpartition("offset=")[2]) if page == 3 else 0
        rows = [{"00080018": {"vr": "UI", "Value": [item.sop_instance]}} for item in manifest.items[:8]]
        return 200, JSON, json.dumps(rows[start:start + page]).encode()

    with server(answer) as url:
        assert destination(url).missing(manifest, None) == list(manifest.items[8:])


@pytest.mark.parametrize("reply", [(204, JSON, b""), (404, "text/plain", b""), (200, JSON, b"[]")])
def test_nothing_listed(tmp_path: Path, reply: Reply) -> None:
    manifest = images(tmp_path)
    with server(lambda *request: reply) as url:
        assert destination(url).missing(manifest, None) == list(manifest.items)


@pytest.mark.parametrize("reply", [(200, "text/html", b"<html>"), (200, JSON, b"{}"), (500, "text/plain", b""),
                                   (302, "text/plain", b"")])
def test_no_list_is_no_empty_list(tmp_path: Path, reply: Reply) -> None:
    manifest = images(tmp_path)
    with server(lambda *request: reply) as url, pytest.raises(Retry):
        destination(url).missing(manifest, None)


def archive_of(manifest: Manifest, change: Callable[[bytes], bytes] = bytes, whole: int | None = 200,
               ) -> Callable[[str, str, bytes], Reply | None]:
    """WADO-RS of what was sent, changed on the way; ``whole`` is the status of series, None cuts them off."""

    def answer(method: str, path: str, body: bytes) -> Reply | None:
        wanted = [item for item in manifest.items if item.series_uid in path]
        if "/instances/" in path:
            (item,) = [item for item in wanted if path.endswith(item.sop_instance)]
            return 200, "application/dicom", change(item.path.read_bytes())
        if whole is None:
            return None
        parts = b"".join(b"--a b\r\nContent-Type: application/dicom\r\n\r\n" + change(item.path.read_bytes()) + b"\r\n"
                         for item in wanted)
        return whole, 'multipart/related; type="application/dicom"; boundary="a b"', parts + b"--a b--"

    return answer


@pytest.mark.parametrize("whole", [200, 400, 501, None])
def test_series_or_else_one_by_one(tmp_path: Path, whole: int | None) -> None:
    manifest = images(tmp_path)
    with server(archive_of(manifest, whole=whole)) as url:
        assert {proof.how for proof in destination(url).prove(manifest, "")} == {"bytes"}


def test_nothing_is_given_back(tmp_path: Path) -> None:
    manifest = images(tmp_path)
    with server(lambda *request: (406, "text/plain", b"")) as url, pytest.raises(Retry, match=r"WADO-RS was .* 406"):
        destination(url).prove(manifest, "")


def test_rewritten_headers_and_changed_pixels(tmp_path: Path) -> None:
    manifest = images(tmp_path)

    def rename(content: bytes) -> bytes:
        return content.replace(data.PATIENT_ID.encode(), b"OTHER-ID-000815")

    with server(archive_of(manifest, rename)) as url:
        assert {proof.how for proof in destination(url).prove(manifest, "")} == {"content"}
        newer = replace(manifest, items=tuple(replace(item, replaces=True) for item in manifest.items))
        with pytest.raises(Retry, match="10 of 10"):
            destination(url).prove(newer, "")
    with server(archive_of(manifest, lambda content: content[:-2] + b"\0\0")) as url, pytest.raises(Retry):
        destination(url).prove(manifest, "")
    with server(archive_of(manifest, lambda content: b"no DICOM")) as url, pytest.raises(Retry, match="10 of 10"):
        destination(url).prove(manifest, "")
