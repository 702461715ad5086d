"""Associations that we ask for: whatever the peer does, or leaves undone, we come back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.pdu import A_ASSOCIATE_RQ

from relay_agent import dimse, negotiate, wire
from relay_agent import scu as ours
from relay_agent.negotiate import COMMITMENT, VERIFICATION, Context
from tests.receive import scu

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
ECHO = dimse.request(dimse.C_ECHO_RQ, 7, VERIFICATION)
FIND = dimse.request(dimse.C_FIND_RQ, 7, VERIFICATION)
CONTEXTS = [(VERIFICATION, (EXPLICIT, IMPLICIT))]
SOON = 0.5  # seconds that we wait for the peer here
IN_THE_END = 60.0  # much more than it takes on any machine, and less than for ever

Script = Callable[[scu.SCU], None]


@pytest.fixture(scope="module", autouse=True)
def no_long_goodbye() -> Iterator[None]:
    """Few of the peers here answer our release."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_LAST_WORD", SOON)
        yield


def accepted(longest: int = 16384, results: bytes = b"") -> bytes:
    """An A-ASSOCIATE-AC that takes the first context in Implicit VR."""
    results = results or scu.item(0x21, bytes((1, 0, 0, 0)) + scu.item(0x40, IMPLICIT.encode()))
    user = scu.item(0x51, longest.to_bytes(4, "big")) + scu.item(0x52, b"1.2.3")
    return scu.pdu(scu.AC, b"\0\1" + bytes(66) + scu.item(0x10, scu.CONTEXT_NAME.encode()) + results
                   + scu.item(0x50, user))


def answer(status: int = 0, to: int = 7, field: int = 0x8030, data_set: int = 0x0101) -> bytes:
    """A response, as a PDV."""
    return scu.pdv(1, 3, scu.command(field=field, responded=to, data_set=data_set, status=status))


@contextmanager
def peer(script: Script) -> Iterator[int]:
    """A peer that follows a script on one connection, and leaves it open; its port."""
    over = threading.Event()

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            there = scu.SCU.__new__(scu.SCU)
            there.socket = connection
            with suppress(OSError):  # the other side was to give up
                script(there)
                over.wait(IN_THE_END)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            with suppress(OSError):  # where nobody called
                socket.create_connection(listener.getsockname()[:2], 1).close()
            thread.join(IN_THE_END)
    assert not thread.is_alive()


@contextmanager
def in_time() -> Iterator[None]:
    """What takes no longer than it must not."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < IN_THE_END


def associate(port: int, patience: float = SOON) -> ours.Association:
    """Ask for an association."""
    return ours.Association(ours.connect("127.0.0.1", port, IN_THE_END), "THERE", "RELAY", CONTEXTS,
                            negotiation=patience, answer=patience)


def dribble(there: scu.SCU, data: bytes) -> None:
    """So slow that each byte comes in time, and the whole never."""
    for byte in data:
        there.send(bytes((byte,)))
        time.sleep(SOON / 10)


# Negotiation

@pytest.mark.parametrize("provided", [[], [COMMITMENT]])
def test_the_request_is_what_pynetdicom_reads(provided: list[str]) -> None:
    contexts = [(VERIFICATION, (EXPLICIT, IMPLICIT)), (COMMITMENT, (IMPLICIT,))]
    pdu = A_ASSOCIATE_RQ()
    pdu.decode(negotiate.ask("THERE", "RELAY 1", contexts, 65536, provided))
    request = pdu.to_primitive()
    assert (request.called_ae_title, request.calling_ae_title) == ("THERE", "RELAY 1")
    assert request.application_context_name == negotiate.APPLICATION_CONTEXT
    assert [(each.context_id, each.abstract_syntax, tuple(each.transfer_syntax))
            for each in request.presentation_context_definition_list] == [
        (1, VERIFICATION, (EXPLICIT, IMPLICIT)), (3, COMMITMENT, (IMPLICIT,))]
    items = {type(item).__name__: item for item in request.user_information}
    assert items["MaximumLengthNotification"].maximum_length_received == 65536
    roles = items.get("SCP_SCU_RoleSelectionNegotiation")
    assert (roles is None) == (not provided)
    assert roles is None or (roles.sop_class_uid, roles.scu_role, roles.scp_role) == (COMMITMENT, False, True)


def test_what_is_agreed_on() -> None:
    results = b"".join(scu.item(0x21, bytes((number, 0, result, 0)) + scu.item(0x40, syntax.encode()))
                       for number, result, syntax in ((1, 0, IMPLICIT), (3, 3, ""), (5, 0, EXPLICIT)))
    contexts = [(VERIFICATION, (EXPLICIT, IMPLICIT)), (COMMITMENT, (IMPLICIT,)), ("1.2.3", (EXPLICIT,))]
    assert negotiate.agreed(accepted(4096, results)[6:], contexts) == (
        {1: Context(VERIFICATION, IMPLICIT), 5: Context("1.2.3", EXPLICIT)}, 4096)


@pytest.mark.parametrize("result", [
    bytes((2, 0, 0, 0)) + scu.item(0x40, IMPLICIT.encode()), bytes((3, 0, 0, 0)) + scu.item(0x40, IMPLICIT.encode()),
    bytes((1, 0, 0, 0)) + scu.item(0x40, b"1.2.3"), bytes((1, 0, 0, 0)), b"", b"\1"])
def test_what_was_never_proposed_is_not_agreed_on(result: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        negotiate.agreed(accepted(results=scu.item(0x21, result))[6:], CONTEXTS)


@given(st.binary(max_size=200))
def test_garbage_is_agreed_on_or_refused(garbage: bytes) -> None:
    with suppress(wire.ProtocolError):
        negotiate.agreed(bytes(68) + garbage, CONTEXTS)


@pytest.mark.parametrize("script", [
    lambda there: None, lambda there: there.read(), lambda there: there.send(accepted()[:3]),
    lambda there: there.send(accepted()[:6]), lambda there: there.send(accepted()[:-1]),
    lambda there: dribble(there, accepted() + bytes(10_000))])
def test_a_peer_that_falls_silent_while_negotiating(script: Script) -> None:
    """With pynetdicom each but the first two hung for ever."""
    with in_time(), peer(script) as port, pytest.raises(TimeoutError):
        associate(port)


@pytest.mark.parametrize("script", [
    lambda there: there.socket.shutdown(socket.SHUT_RDWR), lambda there: there.send(b"HTTP/1.1 400 Bad\r\n\r\n"),
    lambda there: there.send(scu.pdu(scu.ABORT, bytes(4))), lambda there: there.send(scu.pdu(scu.AC, bytes(10))),
    lambda there: there.send(scu.pdu(scu.AC, bytes(2**17))), lambda there: there.send(accepted(results=b"\x21\0"))])
def test_a_peer_that_hangs_up_or_speaks_no_dicom(script: Script) -> None:
    with peer(script) as port, pytest.raises(ours.HungUp):
        associate(port, IN_THE_END)


def test_a_rejection_has_its_reason() -> None:
    with peer(lambda there: there.send(wire.reject(1, 1, 7))) as port, pytest.raises(ours.Rejected) as rejected:
        associate(port, IN_THE_END)
    assert rejected.value.reason == (1, 1, 7)


# Requests and answers

def after(*said: bytes) -> Script:
    """Accept, read the request, and say this."""
    def script(there: scu.SCU) -> None:
        there.read()
        there.send(accepted())
        there.read()
        for one in said:
            there.send(one)
    return script


@pytest.mark.parametrize("said", [
    [], [scu.pdu(scu.P_DATA, answer())[:5]], [scu.pdu(scu.P_DATA, answer())[:-1]],
    # only questions, and never the answer
    *([scu.pdu(scu.P_DATA, scu.pdv(1, 3, scu.c_echo(number))) for number in range(many)] for many in (1, 50))])
def test_a_peer_that_falls_silent(said: list[bytes]) -> None:
    with in_time(), peer(after(*said)) as port, pytest.raises(ours.Broken), associate(port) as association:
        association.ask(VERIFICATION, ECHO)


def test_a_peer_that_dribbles() -> None:
    def script(there: scu.SCU) -> None:
        after()(there)
        dribble(there, scu.pdu(scu.P_DATA, answer(field=0x8020, data_set=1) + scu.pdv(1, 0, bytes(10_000))))

    with in_time(), peer(script) as port, pytest.raises(ours.Broken), associate(port) as association:
        association.ask(VERIFICATION, ECHO)


def test_a_peer_that_reads_no_more() -> None:
    with in_time(), peer(after()) as port, pytest.raises(ours.Broken), associate(port) as association:
        association.ask(VERIFICATION, FIND, repeat(bytes(2**18)))


@pytest.mark.parametrize("said", [
    scu.pdu(scu.ABORT, bytes(4)), scu.pdu(scu.RELEASE_RQ, bytes(4)), accepted(), b"\x99" * 100,
    scu.pdu(scu.P_DATA, answer(to=8)), scu.pdu(scu.P_DATA, scu.pdv(1, 2, b"data first")),
    scu.pdu(scu.P_DATA, scu.pdv(1, 3, b"no command")), scu.pdu(scu.P_DATA, scu.pdv(1, 3, scu.command(field=0x8030))),
    scu.pdu(scu.P_DATA, answer(data_set=1) * 2), b"\4\0\xff\xff\xff\xff"])
def test_what_is_no_answer_breaks_the_association(said: bytes) -> None:
    with peer(after(said)) as port, pytest.raises(ours.Broken), associate(port, IN_THE_END) as association:
        association.ask(VERIFICATION, ECHO)


def test_a_report_while_we_wait_is_answered_and_disturbs_nothing() -> None:
    """This hung pynetdicom's requestor: the thread that serves the report resets a flag that others wait for."""
    replies: list[dict[str, object]] = []

    def script(there: scu.SCU) -> None:
        there.read()
        there.send(accepted())
        for number in range(20):
            there.message()
            there.send(scu.pdu(scu.P_DATA, scu.pdv(1, 3, scu.command(
                affected_class=COMMITMENT, field=0x0100, message=number, data_set=0x0101,
                affected_instance="1.2.3", event=1)) + answer(to=7)))
            replies.append(there.message()[0])
        assert there.read() == (scu.RELEASE_RQ, bytes(4))
        there.send(wire.release_response())

    with peer(script) as port, associate(port, IN_THE_END) as association:
        assert [association.ask(VERIFICATION, ECHO).status for _ in range(20)] == [0] * 20
    assert [(reply["responded"], reply["status"]) for reply in replies] == [
        (number, dimse.UNRECOGNISED_OPERATION) for number in range(20)]


def test_pending_answers_come_in_pdus_of_any_cut() -> None:
    pending = answer(0xFF00, field=0x8020, data_set=1)
    said = scu.pdu(scu.P_DATA, pending + scu.pdv(1, 2, b"one") + pending + scu.pdv(1, 0, b"t")) \
        + scu.pdu(scu.P_DATA, scu.pdv(1, 2, b"wo") + answer(field=0x8020))
    with peer(after(said)) as port, associate(port) as association:
        assert association.ask(VERIFICATION, ECHO) == ours.Answer(0xFF00, b"one")
        assert association.answer() == ours.Answer(0xFF00, b"two")
        assert association.answer() == ours.Answer(0, b"")


@pytest.mark.parametrize("longest", [0, 4096, 4097, 16384])
@pytest.mark.parametrize("blocks", [[], [b""], [b"odd"], [bytes(range(256)) * 64] * 5, [bytes(10_000), b"", b"rest"]])
def test_a_data_set_arrives_as_it_was_given(longest: int, blocks: list[bytes]) -> None:
    got: list[tuple[dict[str, object], bytes | None]] = []

    def script(there: scu.SCU) -> None:
        there.read()
        there.send(accepted(longest))
        got.append(there.message())
        there.send(scu.pdu(scu.P_DATA, answer()))
        there.read()
        there.send(wire.release_response())

    with peer(script) as port, associate(port, IN_THE_END) as association:
        association.ask(VERIFICATION, FIND, iter(blocks))
    ((command, data),) = got
    assert command["field"] == dimse.C_FIND_RQ and data == b"".join(blocks)


def test_the_error_of_who_gives_the_data_is_not_taken_for_the_peers() -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(1000)
        raise PermissionError

    kinds: list[int] = []

    def script(there: scu.SCU) -> None:
        there.read()
        there.send(accepted())
        kinds.extend(kind for kind, _ in there.rest())

    with peer(script) as port, pytest.raises(PermissionError), associate(port, IN_THE_END) as association:
        association.ask(VERIFICATION, FIND, failing())
    assert kinds == [scu.P_DATA, scu.ABORT]


# The end

@pytest.mark.parametrize("said", [
    b"", wire.release_response()[:5], scu.pdu(scu.P_DATA, answer()) * 3, scu.pdu(scu.P_DATA, bytes(2**20)),
    b"\x99" * 50, wire.release_request() + wire.release_response(), wire.abort(0)])
def test_the_end_comes_whatever_the_peer_says(said: bytes) -> None:
    with in_time(), peer(after(scu.pdu(scu.P_DATA, answer()) + said)) as port, associate(port) as association:
        assert association.ask(VERIFICATION, ECHO).status == 0
