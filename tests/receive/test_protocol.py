"""Bytes that no sender should send, and senders that are slow, silent, countless or huge."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import MRImageStorage, generate_uid

from tests import data
from tests.harness import Agent, running, wait_for
from tests.receive import proof, scu

NOT_SPECIFIED, UNRECOGNISED, UNEXPECTED, INVALID = 0, 1, 2, 6


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """A box that these tests may hurt, if they can."""
    with running(Agent(tmp_path_factory.mktemp("target")), "receive") as agent:
        yield agent


@pytest.fixture(scope="module")
def half_open(target: Agent) -> Iterator[dict[str, float]]:
    """Three callers that never get to their request, from the beginning of the module; seconds until each is closed."""
    request = scu.associate_rq()
    ends: dict[str, float] = {}
    over = threading.Event()

    def call(name: str, opening: bytes, drops: bytes) -> None:
        start = time.monotonic()
        with scu.SCU(target.port, timeout=200) as peer:
            peer.send(opening)
            for n in range(len(drops)):
                with contextlib.suppress(OSError):
                    peer.send(drops[n:n + 1])
                if name in ends or over.wait(0.5):
                    return
                peer.socket.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    if peer.socket.recv(1, 2) in (b"", b"\7"):  # MSG_PEEK
                        break
                peer.socket.settimeout(200)
            peer.socket.settimeout(200)
            assert peer.rest() in ([], [abort(NOT_SPECIFIED)])
            ends[name] = time.monotonic() - start

    threads = [threading.Thread(target=call, args=each, daemon=True) for each in (
        ("silent", b"", b""), ("half", request[:50], b""), ("dripping", b"", request[:150]))]
    for thread in threads:
        thread.start()
    yield ends
    over.set()


def abort(reason: int) -> tuple[int, bytes]:
    """An A-ABORT by the service provider."""
    return scu.ABORT, bytes((0, 0, 2, reason))


def sees_a_healthy_box(agent: Agent) -> None:
    """A store over a new association in each receiving process."""
    with scu.SCU(agent.port) as one, scu.SCU(agent.port) as two:
        for peer in (one.associate(), two.associate()):
            image = data.instance()
            assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
            peer.release()


P, V = scu.P_DATA, scu.pdv
STORE = scu.c_store("1.2.3")
FIRST = {  # instead of an A-ASSOCIATE-RQ: what is sent, reason of the abort
    "unknown type": (scu.pdu(0x2A, b"abcd"), UNRECOGNISED),
    "type 0": (scu.pdu(0, b"abcd"), UNRECOGNISED),
    "data": (scu.pdu(P, V(1, 3, STORE)), UNEXPECTED),
    "release": (scu.pdu(scu.RELEASE_RQ, bytes(4)), UNEXPECTED),
    "acceptance": (scu.pdu(scu.AC, bytes(80)), UNEXPECTED),
    "abort": (scu.pdu(scu.ABORT, bytes(4)), UNEXPECTED),
    "length of 4 GiB": (b"\1\0\xff\xff\xff\xff", INVALID),
    "empty request": (scu.pdu(scu.RQ, b""), INVALID),
    "request of 10 bytes": (scu.pdu(scu.RQ, bytes(10)), INVALID),
    "item longer than the PDU": (scu.associate_rq(more=b"\x20\0\xff\xff"), INVALID),
    "item cut off": (scu.associate_rq(more=b"\x20\0"), INVALID),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", UNRECOGNISED),
    "even context": (scu.associate_rq({2: scu.MR[1]}), INVALID),
}
THEN = {  # on an association: what is sent, reason of the abort
    "unknown PDU type": (scu.pdu(0x55, b"abcd"), UNRECOGNISED),
    "a second request": (scu.associate_rq(), UNEXPECTED),
    "an acceptance": (scu.pdu(scu.AC, bytes(80)), UNEXPECTED),
    "a rejection": (scu.pdu(scu.RJ, bytes(4)), UNEXPECTED),
    "a release response": (scu.pdu(scu.RELEASE_RP, bytes(4)), UNEXPECTED),
    "PDU of 4 GiB": (b"\4\0\xff\xff\xff\xff", INVALID),
    "PDU longer than negotiated": (b"\4\0" + (300 * 1024).to_bytes(4, "big"), INVALID),
    "PDV longer than its PDU": (scu.pdu(P, struct.pack(">IBB", 100, 1, 3) + STORE[:20]), INVALID),
    "PDV of 4 GiB": (scu.pdu(P, struct.pack(">IBB", 0xFFFFFFFF, 1, 3) + STORE), INVALID),
    "PDV length 0": (scu.pdu(P, struct.pack(">IBB", 0, 1, 3)), INVALID),
    "PDV length 1": (scu.pdu(P, struct.pack(">IBB", 1, 1, 3)), INVALID),
    "PDV cut off": (scu.pdu(P, b"\0\0\0"), INVALID),
    "data set before its command": (scu.pdu(P, V(1, 2, b"data")), UNEXPECTED),
    "command twice": (scu.pdu(P, V(1, 3, STORE) + V(1, 3, STORE)), UNEXPECTED),
    "command in the middle of a data set": (scu.pdu(P, V(1, 3, STORE) + V(1, 0, b"data") + V(1, 1, STORE)), UNEXPECTED),
    "data set in another context": (scu.pdu(P, V(1, 3, STORE) + V(3, 2, b"data")), UNEXPECTED),
    "command in two contexts": (scu.pdu(P, V(1, 1, STORE[:20]) + V(3, 3, STORE[20:])), UNEXPECTED),
    "context that was not accepted": (scu.pdu(P, V(5, 3, STORE)), INVALID),
    "context 0": (scu.pdu(P, V(0, 3, STORE)), INVALID),
    "empty command": (scu.pdu(P, V(1, 3, b"")), INVALID),
    "garbage command": (scu.pdu(P, V(1, 3, bytes(range(200)))), INVALID),
    "command cut off": (scu.pdu(P, V(1, 3, STORE[:-5])), INVALID),
    "command of another group": (scu.pdu(P, V(1, 3, b"\x08\0\x18\0\4\0\0\0001.2\0")), INVALID),
    "command without a field": (scu.pdu(P, V(1, 3, scu.command(message=1, data_set=0x101))), INVALID),
    "command without a data set type": (scu.pdu(P, V(1, 3, scu.command(message=1, field=1))), INVALID),
    "store without a message ID": (scu.pdu(P, V(1, 3, scu.command(field=1, data_set=1, affected_class="1.2",
                                                                  affected_instance="1.2")) + V(1, 2, b"")), INVALID),
}


@pytest.mark.usefixtures("half_open")
@pytest.mark.parametrize("case", FIRST)
def test_what_is_no_request(target: Agent, case: str) -> None:
    """Aborted at once, with the reason; a scanner's engineer reads it in a trace."""
    sent, reason = FIRST[case]
    with scu.SCU(target.port) as peer:
        peer.send(sent)
        assert peer.rest() == [abort(reason)]


@pytest.mark.parametrize("case", THEN)
def test_what_is_out_of_place(target: Agent, case: str) -> None:
    """Aborted at once, with the reason, and nothing of it is kept."""
    sent, reason = THEN[case]
    with scu.SCU(target.port) as peer:
        peer.associate({**scu.MR, 3: scu.MR[1]})
        peer.send(sent)
        assert peer.rest() == [abort(reason)]
    assert not proof.partials(target)


def test_the_peers_abort_is_not_answered(target: Agent) -> None:
    """PS3.8 section 9.2: the transport connection is closed, and the instance under way is forgotten."""
    with scu.SCU(target.port) as peer:
        peer.associate()
        peer.begin("1.2.3.4")
        peer.send(scu.pdu(P, V(1, 0, bytes(50_000))))
        peer.send(scu.pdu(scu.ABORT, bytes(4)))
        assert peer.rest() == []
    assert not proof.partials(target) and not proof.rows(target, "1.2.3.4")
    wait_for(lambda: target.ledger.value("SELECT count(*) FROM association WHERE ended = 'aborted'"))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_connection_lost_in_the_middle(target: Agent, large: bool) -> None:
    """A cable is pulled half way: no debris, no row, whichever way objects of that size are kept meanwhile."""
    uid = generate_uid()
    with scu.SCU(target.port) as peer:
        peer.associate()
        peer.begin(uid)
        for _ in range(60 if large else 2):
            peer.send(scu.pdu(P, V(1, 0, bytes(50_000))))
        if large:
            wait_for(lambda: proof.partials(target), say="the test is blind: a large object has no partial file")
    wait_for(lambda: not proof.partials(target), say="a partial file was left")
    sees_a_healthy_box(target)
    assert not proof.rows(target, uid)


@pytest.mark.parametrize("uid", ["", "1" * 65, "../../../../tmp/escaped", "1.2/3", "1.2\\3", "1.2\n3", "1.2.é"])
def test_names_that_are_no_uids(target: Agent, uid: str) -> None:
    """A UID never becomes a path: refused with a status, the association goes on."""
    with scu.SCU(target.port) as peer:
        peer.associate()
        for content in (bytes(20), bytes(100_000)):
            peer.begin(uid)
            peer.data([content])
            assert peer.status() == 0x0117
        image = data.instance()
        assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.release()


def test_requests_that_are_not_served(target: Agent) -> None:
    """C-FIND, N-CREATE and the like in a storage context: unrecognised operation, and the association goes on."""
    with scu.SCU(target.port) as peer:
        peer.associate()
        for field in (0x0010, 0x0020, 0x0021, 0x0110, 0x0120, 0x0140, 0x0150, 0x0100):
            for with_data in (0x0101, 0x0001):
                request = scu.command(affected_class=MRImageStorage, field=field, message=7, data_set=with_data)
                peer.send(scu.pdu(P, V(1, 3, request) + (V(1, 2, b"data") if with_data == 1 else b"")))
                assert peer.response()["status"] == 0x0211
        peer.send(scu.pdu(P, V(1, 3, scu.command(field=0x0FFF, responded=7, data_set=0x0101))))  # C-CANCEL: no answer
        peer.send(scu.pdu(P, V(1, 3, scu.command(field=0x8001, responded=7, data_set=0x0101, status=0))))
        peer.send(scu.pdu(P, V(1, 3, scu.c_store("1.2.3.4", 9, data_set=0x0101))))
        answer = peer.response()
        assert answer["responded"] == 9 and 0xC000 <= answer["status"] <= 0xCFFF
        image = data.instance()
        peer._message = 20
        assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.release()


@pytest.mark.parametrize("together", [True, False], ids=["one PDU", "a PDU each"])
def test_fragments_of_one_byte(target: Agent, together: bool) -> None:
    """Command and data set a byte at a time, as PS3.8 allows."""
    image = data.instance(size=(32, 32))
    content = scu.encode(image)
    items = [V(1, 1 if n + 1 < len(c) else 3, c[n:n + 1]) for c in [scu.c_store(image.SOPInstanceUID)]
             for n in range(len(c))]
    items += [V(1, 0 if n + 1 < len(content) else 2, content[n:n + 1]) for n in range(len(content))]
    with scu.SCU(target.port) as peer:
        peer.associate()
        peer._message = 1
        peer.send(scu.pdu(P, b"".join(items)) if together else b"".join(scu.pdu(P, one) for one in items))
        assert peer.status() == 0
        peer.release()
    assert proof.part10(proof.stored(target, image.SOPInstanceUID))[1] == content


def test_empty_fragments(target: Agent) -> None:
    """Fragments without a byte in them, first, in the middle and last."""
    image = data.instance()
    content = scu.encode(image)
    with scu.SCU(target.port) as peer:
        peer.associate()
        peer.begin(image.SOPInstanceUID)
        peer.data([b"", content[:100], b"", b"", content[100:], b""])
        assert peer.status() == 0
        peer.release()
    assert proof.part10(proof.stored(target, image.SOPInstanceUID))[1] == content


def mutations(random_: random.Random, count: int) -> Iterator[tuple[bool, bytes]]:
    """Streams that are nearly right: whether after an association, and the bytes."""
    def stream() -> bytes:
        image = data.instance(size=(8, 8))
        content = scu.encode(image)
        cut = random_.randrange(1, len(content))
        return (scu.pdu(P, V(1, 3, scu.c_store(image.SOPInstanceUID))) + scu.pdu(P, V(1, 0, content[:cut]))
                + scu.pdu(P, V(1, 2, content[cut:])) + scu.pdu(P, V(3, 3, scu.c_echo(2)))
                + scu.pdu(scu.RELEASE_RQ, bytes(4)))

    def flip(raw: bytes) -> bytes:
        out = bytearray(raw)
        for _ in range(random_.randint(1, 6)):
            out[random_.randrange(min(len(out), 400))] = random_.randrange(256)
        return bytes(out)

    def number(raw: bytes) -> bytes:
        at = random_.randrange(len(raw) - 4)
        return raw[:at] + random_.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)).to_bytes(4, "big") + raw[at + 4:]

    def move(raw: bytes) -> bytes:
        a, b, c = sorted(random_.randrange(len(raw)) for _ in range(3))
        return raw[:a] + raw[b:c] + raw[a:b] + raw[c:]

    changes: list[Callable[[bytes], bytes]] = [
        flip, flip, number, move, lambda raw: raw[:random_.randrange(len(raw))],
        lambda raw: raw[:(at := random_.randrange(len(raw)))] + random_.randbytes(random_.randint(1, 40)) + raw[at:],
        lambda raw: raw[:(at := random_.randrange(len(raw)))] + raw[at + random_.randint(1, 20):],
        lambda raw: random_.randbytes(random_.randint(1, 600)),
        lambda raw: raw[:random_.randrange(80)] + random_.randbytes(200)]
    for _ in range(count):
        inside = random_.random() < 0.6
        yield inside, random_.choice(changes)(stream() if inside else scu.associate_rq({**scu.MR, 3: scu.ECHO[1]}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nearly_right(target: Agent, seed: int) -> None:
    """Three times a thousand damaged streams: answered by valid PDUs and closed, never a dead process or debris."""
    processes = proof.children(target.processes["receive"].pid)
    aborted = 0
    for inside, raw in mutations(random.Random(seed), 1000):
        with scu.SCU(target.port) as peer:
            if inside:
                peer.associate({**scu.MR, 3: scu.ECHO[1]})
            with contextlib.suppress(OSError):  # it may be closed while we still talk
                peer.send(raw)
                peer.socket.shutdown(1)  # no more will come, so that a PDU that is cut off is not waited for
            answers = peer.rest()
            assert {kind for kind, _ in answers} <= {scu.AC, scu.RJ, scu.P_DATA, scu.RELEASE_RP, scu.ABORT}
            assert all(len(body) == 4 for kind, body in answers if kind not in (scu.AC, scu.P_DATA))
            aborted += any(kind == scu.ABORT for kind, _ in answers)
    assert aborted > 100, "the streams are not damaged enough to tell anything"
    assert proof.children(target.processes["receive"].pid) == processes
    sees_a_healthy_box(target)
    proof.intact(target)
    assert proof.failures(target.log) == []


def test_slow_senders_do_not_hold_up_fast_ones(target: Agent) -> None:
    """Two senders stop half way, a byte at a time, in each receiving process; a hundred others pass them."""
    images = [data.instance(), data.instance()]
    with scu.SCU(target.port) as one, scu.SCU(target.port) as two:
        slow = [(one.associate(), images[0]), (two.associate(), images[1])]
        rest = []
        for peer, image in slow:
            content = scu.encode(image)
            raw = scu.pdu(P, V(1, 3, scu.c_store(image.SOPInstanceUID))) + scu.pdu(P, V(1, 2, content))
            for n in range(600):
                peer.send(raw[n:n + 1])
                if n % 20 == 0:
                    time.sleep(0.001)
            rest.append(raw[600:])
        for _ in range(4):
            with scu.SCU(target.port) as fast:
                fast.associate()
                for _ in range(25):
                    image = data.instance()
                    assert fast.store(image.SOPInstanceUID, scu.encode(image)) == 0
                fast.release()
        for (peer, image), last in zip(slow, rest, strict=True):
            peer.send(last)
            peer._message = 1
            assert peer.status() == 0
            assert proof.part10(proof.stored(target, image.SOPInstanceUID))[1] == scu.encode(image)


def descriptors(pid: int) -> int:
    """Open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_two_thousand_associations(target: Agent) -> None:
    """A scanner that opens one for each image, for weeks: descriptors, threads and memory stay where they are."""
    master = target.processes["receive"].pid

    def some(count: int) -> None:
        for _ in range(count):
            with scu.SCU(target.port) as peer:
                peer.associate(scu.ECHO, calling="PATIENCE")
                assert peer.echo() == 0
                peer.release()

    some(300)  # what is made once is made by now
    processes = [master, *proof.children(master)]
    wait_for(lambda: target.ledger.value("SELECT count(*) FROM association WHERE closed IS NULL") == 0)
    before = {pid: (descriptors(pid), proof.status_kib(pid, "Threads")) for pid in processes}
    memory = {pid: proof.status_kib(pid, "VmRSS") for pid in processes}
    some(2000)
    ended = "SELECT count(*) FROM association WHERE calling_ae = 'PATIENCE' AND ended = 'released'"
    wait_for(lambda: target.ledger.value(ended) == 2300, say="an association is not in the ledger")
    assert [master, *proof.children(master)] == processes
    # Fewer are no leak: the thread of the last one may still have been ending when they were counted first.
    wait_for(lambda: all(descriptors(pid) <= before[pid][0] and proof.status_kib(pid, "Threads") <= before[pid][1]
                         for pid in processes), say="descriptors or threads are not given back")
    assert all(proof.status_kib(pid, "VmRSS") - memory[pid] < 8192 for pid in processes)


def large_object(megabytes: int) -> tuple[data.Dataset, bytes]:
    """A multi-frame image whose pixel data, ``megabytes`` of it, is still to follow the returned bytes."""
    image = data.instance(size=(512, 512), sop_class="1.2.840.10008.5.1.4.1.1.4.1")
    image.NumberOfFrames = megabytes * 2
    del image.PixelData
    return image, scu.encode(image) + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, megabytes * 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [300, 2000])
def test_a_large_object_passes_in_little_memory(tmp_path: Path, megabytes: int) -> None:
    """Streamed: peak memory of every receiving process stays below 150 MB, and every byte of it is on the disk."""
    with running(Agent(tmp_path), "receive") as agent, scu.SCU(agent.port, timeout=240) as peer:
        image, head = large_object(megabytes)
        block = random.Random(megabytes).randbytes(2**20)
        digest = hashlib.sha256(head)
        peer.associate({1: (image.SOPClassUID, ["1.2.840.10008.1.2.1"])})
        room = peer.longest - 6

        def fragments() -> Iterator[bytes]:
            yield head
            for number in range(megabytes):
                part = number.to_bytes(8, "big") + block[8:]
                digest.update(part)
                for at in range(0, len(part), room):
                    yield part[at:at + room]

        peer.begin(image.SOPInstanceUID, sop_class=image.SOPClassUID)
        peer.data(fragments())
        assert peer.status() == 0
        peer.release()
        row = proof.row(agent, image.SOPInstanceUID)
        master = agent.processes["receive"].pid
        peaks = {pid: proof.status_kib(pid, "VmHWM") for pid in [master, *proof.children(master)]}
        assert max(peaks.values()) < 150_000, peaks
        file = agent.config.spool / row["path"]
        assert file.stem == digest.hexdigest() and file.stat().st_size == row["size"] > megabytes * 2**20
        with file.open("rb") as content:
            content.seek(-len(head) - megabytes * 2**20, 2)
            assert hashlib.file_digest(content, "sha256").hexdigest() == file.stem
        assert dcmread(file, stop_before_pixels=True).NumberOfFrames == megabytes * 2


def test_four_large_objects_at_once(tmp_path: Path) -> None:
    """Four times 60 MB in one process: memory does not grow with what is under way."""
    settings = '[receive]\nreserve = "10 MB"\nprocesses = 1'
    with running(Agent(tmp_path, settings), "receive") as agent:
        statuses: list[int] = []

        def one() -> None:
            image, head = large_object(60)
            with scu.SCU(agent.port, timeout=240) as peer:
                peer.associate({1: (image.SOPClassUID, ["1.2.840.10008.1.2.1"])})
                peer.begin(image.SOPInstanceUID, sop_class=image.SOPClassUID)
                peer.data([head, *[bytes(2**18 - 6)] * 240, bytes(240 * 6)])
                statuses.append(peer.status())

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [0] * 4
        (child,) = proof.children(agent.processes["receive"].pid)
        assert proof.status_kib(child, "VmHWM") < 150_000


def test_idle_associations_are_aborted(tmp_path: Path) -> None:
    """A scanner that was switched off: its association ends, and the session that it carried can complete."""
    receiver = ('[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]\n'
                'idle_timeout = "2 s"')
    with running(Agent(tmp_path, receivers=receiver), "receive") as agent:
        with scu.SCU(agent.port) as idle, scu.SCU(agent.port) as half, scu.SCU(agent.port) as busy:
            idle.associate(scu.ECHO)
            half.associate()
            half.begin("1.2.3.4")
            half.send(scu.pdu(P, V(1, 0, bytes(1000))))
            busy.associate(scu.ECHO)
            for _ in range(8):  # in use for longer than the time-out, so it stays
                time.sleep(0.5)
                assert busy.echo() == 0
            assert idle.rest() == [abort(NOT_SPECIFIED)] and half.rest() == [abort(NOT_SPECIFIED)]
            busy.release()
        ends = wait_for(lambda: len(e := agent.ledger.all("SELECT ended FROM association WHERE closed > 0")) == 3 and e)
        assert sorted(row["ended"] for row in ends) == ["aborted", "aborted", "released"]
        assert proof.intact(agent) == 0 and proof.failures(agent.log) == []


@pytest.mark.slow
def test_half_open_connections_end(target: Agent, half_open: dict[str, float]) -> None:
    """Silent, half a request, a byte now and then: all closed after the ARTIM time of 30 s, whatever they do."""
    wait_for(lambda: len(half_open) == 3, say="a caller may hold a connection for as long as it likes")
    assert min(half_open.values()) > 29 and set(half_open) == {"silent", "half", "dripping"}
    sees_a_healthy_box(target)


def test_nothing_is_left_lying_about(target: Agent) -> None:
    """After all of the above: each file hashes to its name, ledger and disk agree, and nothing failed unseen."""
    assert proof.intact(target) > 100
    assert proof.failures(target.log) == []
