"""PDUs: cut and joined as the standard wants it, whatever the network makes of them."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ, A_RELEASE_RP, P_DATA_TF

from relay_agent import wire
from relay_agent.wire import Closed, ProtocolError, Wire


def pdus(data: bytes) -> list[bytes]:
    """The PDUs in a stream of bytes."""
    found = []
    while data:
        end = 6 + int.from_bytes(data[2:6], "big")
        assert end <= len(data)
        found.append(data[:end])
        data = data[end:]
    return found


def decode(data: bytes) -> P_DATA_TF:
    pdu = P_DATA_TF()
    pdu.decode(data)
    return pdu


@given(st.binary(min_size=1, max_size=5000), st.booleans(), st.integers(1, 255),
       st.sampled_from([0, 7, 16, 100, 16384]))
@example(bytes(94), True, 1, 100)
@example(bytes(95), False, 3, 100)
def test_a_message_is_cut_into_pdus_that_pynetdicom_joins_again(
        message: bytes, command: bool, context: int, largest: int) -> None:
    made = pdus(wire.p_data(context, message, command, largest))
    joined, heads = b"", []
    for pdu in made:
        # The limit counts what follows the PDU's own six bytes (PS3.8 section D.1.1).
        assert not largest or len(pdu) - 6 <= largest
        item, = decode(pdu).presentation_data_value_items
        assert item.presentation_context_id == context
        heads.append(item.presentation_data_value[0])
        joined += item.presentation_data_value[1:]
    assert joined == message
    assert heads == [int(command)] * (len(made) - 1) + [int(command) | 2]


def test_no_limit_means_one_pdu() -> None:
    assert len(pdus(wire.p_data(1, bytes(10**6), False, 0))) == 1


@pytest.mark.parametrize("largest", range(1, 7))
def test_a_limit_below_what_the_protocol_needs_does_not_keep_the_answer_back(largest: int) -> None:
    items = [decode(pdu).presentation_data_value_items for pdu in pdus(wire.p_data(1, b"answer", True, largest))]
    assert b"".join(item.presentation_data_value[1:] for item, in items) == b"answer"


def test_the_small_pdus_are_those_of_pynetdicom_byte_for_byte() -> None:
    assert wire.release_response() == A_RELEASE_RP().encode()
    abort = A_ABORT_RQ()
    abort.source, abort.reason_diagnostic = 2, wire.INVALID_PARAMETER
    assert wire.abort(wire.INVALID_PARAMETER) == abort.encode()
    reject = A_ASSOCIATE_RJ()
    reject.result, reject.source, reject.reason_diagnostic = 1, 1, 7
    assert wire.reject(1, 1, 7) == reject.encode()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Wire]]:
    ours, theirs = _connected()
    yield theirs, Wire(ours, 1000)
    ours.close()
    theirs.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.settimeout(10)
    return ours, theirs


def read(reader: Wire) -> list[tuple[int, int, bytes]]:
    """Every PDV until the peer closes: context, control header and fragment."""
    found = []
    while True:
        try:
            kind, left = reader.next_pdu()
        except Closed:
            return found
        assert kind == wire.P_DATA_TF
        while left:
            context, control, length = reader.next_pdv(left)
            left -= length + 6
            found.append((context, control, bytes(reader.take(length))))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3000), st.booleans(), st.sampled_from([7, 50, 1000])),
                min_size=1, max_size=8), st.lists(st.integers(1, 700), max_size=20))
def test_what_was_cut_is_read_again_however_it_comes(messages: list[tuple[bytes, bool, int]], cuts: list[int]) -> None:
    stream = b"".join(wire.p_data(3, message, command, largest) for message, command, largest in messages)
    ours, theirs = _connected()

    def send() -> None:
        rest = stream
        for cut in cuts:
            theirs.sendall(rest[:cut])
            rest = rest[cut:]
        theirs.sendall(rest)
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    with ours:
        found = read(Wire(ours, 1000))
    sender.join()
    joined: list[tuple[bytes, bool]] = []
    part = b""
    for context, control, fragment in found:
        assert context == 3
        part += fragment
        if control & 2:
            joined.append((part, bool(control & 1)))
            part = b""
    assert joined == [(message, command) for message, command, _ in messages] and part == b""


@pytest.mark.parametrize("size", [997, 4001, 60_013])
def test_pdus_across_the_buffers_end_arrive_whole(pair: tuple[socket.socket, Wire], size: int) -> None:
    theirs, reader = pair
    message = random.Random(size).randbytes(1_000_000)

    def send() -> None:
        theirs.sendall(wire.p_data(1, message, False, size))
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert b"".join(fragment for _, _, fragment in read(reader)) == message
    sender.join()


def test_a_slice_stays_valid_until_the_next_call(pair: tuple[socket.socket, Wire]) -> None:
    theirs, reader = pair
    theirs.sendall(b"a" * 500 + b"b" * 500)
    first = reader.take(500)
    assert bytes(first) == b"a" * 500 and bytes(reader.take(500)) == b"b" * 500


def test_the_whole_buffer_can_be_taken_again_and_again(pair: tuple[socket.socket, Wire]) -> None:
    theirs, reader = pair
    size = 64 * 1024
    sender = threading.Thread(target=theirs.sendall, args=(b"".join(bytes((n,)) * size for n in range(5)),))
    sender.start()
    assert [bytes(reader.take(size)) for _ in range(5)] == [bytes((n,)) * size for n in range(5)]
    sender.join()


@pytest.mark.parametrize("sent", [b"", b"\4\0\0\0"])
def test_a_connection_that_ends_says_so(pair: tuple[socket.socket, Wire], sent: bytes) -> None:
    theirs, reader = pair
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(Closed):
        reader.next_pdu()


@pytest.mark.parametrize(("left", "length"), [(5, 2), (6, 3), (10, 7), (6, 2**32 - 1), (6, 0), (6, 1)])
def test_pdvs_that_do_not_fit_their_pdu_are_refused(pair: tuple[socket.socket, Wire], left: int, length: int) -> None:
    theirs, reader = pair
    theirs.sendall(length.to_bytes(4, "big") + b"\1\2")
    with pytest.raises(ProtocolError) as caught:
        reader.next_pdv(left)
    assert caught.value.reason == wire.INVALID_PARAMETER


@pytest.mark.parametrize("content", [0, 1, 100])
def test_a_pdv_that_fits_is_taken(pair: tuple[socket.socket, Wire], content: int) -> None:
    theirs, reader = pair
    theirs.sendall((content + 2).to_bytes(4, "big") + b"\5\3")
    assert reader.next_pdv(content + 6) == (5, 3, content)
