"""Command sets: read and written as pynetdicom does, and never surprised by bytes."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_ECHO_RSP, C_STORE_RQ, C_STORE_RSP, N_ACTION_RQ, N_ACTION_RSP, N_EVENT_REPORT_RQ
from pynetdicom.dimse_primitives import C_ECHO, C_STORE, N_ACTION, N_EVENT_REPORT
from pynetdicom.dsutils import encode as encode_data_set

from relay_agent import dimse
from relay_agent.commitment import INSTANCE, event_report
from relay_agent.dimse import BadCommand, Command
from relay_agent.negotiate import COMMITMENT

MR = "1.2.840.10008.5.1.4.1.1.4"
NUMBERS = [dimse.COMMAND_FIELD, dimse.MESSAGE_ID, dimse.MESSAGE_ID_BEING_RESPONDED_TO, dimse.DATA_SET_TYPE,
           dimse.STATUS, dimse.EVENT_TYPE, dimse.ACTION_TYPE]
UIDS = [dimse.AFFECTED_CLASS, dimse.REQUESTED_CLASS, dimse.AFFECTED_INSTANCE, dimse.REQUESTED_INSTANCE]
US, UID = st.integers(0, 0xFFFF), st.text("0123456789.", min_size=1, max_size=64)


def command_of(message: Any, primitive: Any) -> bytes:
    """The command set that pynetdicom makes of a primitive."""
    message.primitive_to_message(primitive)
    encoded = encode_data_set(message.command_set, True, True)
    assert encoded is not None
    return bytes(encoded)


def store_request(number: int, instance: str, priority: int = 2) -> bytes:
    primitive = C_STORE()
    primitive.MessageID, primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = number, MR, instance
    primitive.Priority, primitive.DataSet = priority, BytesIO(b"data")
    return command_of(C_STORE_RQ(), primitive)


@given(st.dictionaries(st.sampled_from(NUMBERS), US), st.dictionaries(st.sampled_from(UIDS), UID))
def test_what_is_encoded_is_decoded_again(numbers: dict[int, int], uids: dict[int, str]) -> None:
    encoded = dimse.encode({**numbers, **uids})
    found = Command(encoded)
    assert {element: found.number(element) for element in numbers} == numbers
    assert {element: found.uid(element) for element in uids} == uids
    assert set(found.elements) == {0, *numbers, *uids}
    assert int.from_bytes(found.elements[0], "little") == len(encoded) - 12
    positions = list(found.elements)
    assert positions == sorted(positions) and all(len(value) % 2 == 0 for value in found.elements.values())


@given(st.binary(max_size=80))
@example(b"\0\0")
@example(struct.pack("<HHI", 0, 0x100, 0xFFFFFFFF))
@example(struct.pack("<HHI", 8, 0x100, 0))
def test_any_bytes_are_a_command_or_a_bad_command(data: bytes) -> None:
    try:
        command = Command(data)
    except BadCommand:
        return
    assert sum(8 + len(value) for value in command.elements.values()) <= len(data)
    for element in (*NUMBERS, *UIDS):
        assert isinstance(command.uid(element), str)
        try:
            assert 0 <= command.number(element) <= 0xFFFF
        except BadCommand:
            assert len(command.elements.get(element, b"")) != 2


@given(st.data())
def test_a_command_that_is_cut_or_changed_anywhere_is_no_surprise_either(data: st.DataObject) -> None:
    whole = store_request(7, "1.2.3")
    cut = whole[:data.draw(st.integers(0, len(whole) - 1))]
    at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    for text in (cut, whole[:at] + bytes((byte,)) + whole[at + 1:]):
        try:
            command = Command(text)
            dimse.response(command, dimse.SUCCESS)
        except BadCommand:
            pass


def test_a_command_that_is_cut_inside_an_element_is_bad() -> None:
    whole = store_request(7, "1.2.3")
    ends, position = set(), 0
    while position < len(whole):
        ends.add(position)
        position += 8 + int.from_bytes(whole[position + 4:position + 8], "little")
    for length in set(range(len(whole))) - ends:
        with pytest.raises(BadCommand):
            Command(whole[:length])


def test_a_missing_number_is_named() -> None:
    command = Command(dimse.encode({dimse.COMMAND_FIELD: 1, dimse.AFFECTED_CLASS: MR}))
    with pytest.raises(BadCommand, match=r"\(0000,0110\)"):
        command.number(dimse.MESSAGE_ID)
    with pytest.raises(BadCommand, match=r"\(0000,0800\)"):
        _ = command.has_data_set
    assert command.uid(dimse.AFFECTED_INSTANCE) == ""


@given(US, st.lists(st.integers(0, 99999), min_size=2, max_size=10).map(lambda parts: ".".join(map(str, parts))))
def test_a_request_of_pynetdicom_is_read(number: int, instance: str) -> None:
    command = Command(store_request(number, instance))
    assert command.number(dimse.COMMAND_FIELD) == dimse.C_STORE_RQ and command.number(dimse.MESSAGE_ID) == number
    assert command.uid(dimse.AFFECTED_INSTANCE) == instance and command.uid(dimse.AFFECTED_CLASS) == MR
    assert command.has_data_set


@pytest.mark.parametrize("status", [0x0000, 0xA700, 0xC000, 0x0117])
@pytest.mark.parametrize("instance", ["1.2.3", "1.2.34"])
@pytest.mark.parametrize("comment", ["", "odd", "even", "x" * 80])
def test_a_store_response_is_that_of_pynetdicom_byte_for_byte(status: int, instance: str, comment: str) -> None:
    answer = C_STORE()
    answer.MessageIDBeingRespondedTo, answer.Status = 7, status
    answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID = MR, instance
    if comment:
        answer.ErrorComment = comment[:64]
    assert dimse.response(Command(store_request(7, instance)), status, comment) == command_of(C_STORE_RSP(), answer)


def test_an_echo_response_is_that_of_pynetdicom_byte_for_byte() -> None:
    answer = C_ECHO()
    answer.MessageIDBeingRespondedTo, answer.Status = 9, 0
    answer.AffectedSOPClassUID = "1.2.840.10008.1.1"
    request = Command(dimse.encode({dimse.AFFECTED_CLASS: "1.2.840.10008.1.1", dimse.COMMAND_FIELD: dimse.C_ECHO_RQ,
                                    dimse.MESSAGE_ID: 9, dimse.DATA_SET_TYPE: dimse.NO_DATA_SET}))
    assert not request.has_data_set
    assert dimse.response(request, 0) == command_of(C_ECHO_RSP(), answer)


def test_an_action_response_is_that_of_pynetdicom_byte_for_byte() -> None:
    request = N_ACTION()
    request.MessageID, request.ActionTypeID = 3, 1
    request.RequestedSOPClassUID, request.RequestedSOPInstanceUID = COMMITMENT, INSTANCE
    request.ActionInformation = BytesIO(b"data")
    answer = N_ACTION()
    answer.MessageIDBeingRespondedTo, answer.Status = 3, 0
    answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID = COMMITMENT, INSTANCE
    made = dimse.response(Command(command_of(N_ACTION_RQ(), request)), 0)
    assert made == command_of(N_ACTION_RSP(), answer)


@pytest.mark.parametrize("reasons", [[0, 0], [0, 0x0112], [0x0112, 0x0119]])
def test_a_commitment_report_is_that_of_pynetdicom_byte_for_byte(reasons: list[int]) -> None:
    event = N_EVENT_REPORT()
    event.MessageID, event.EventTypeID = 5, 2 if any(reasons) else 1
    event.AffectedSOPClassUID, event.AffectedSOPInstanceUID = COMMITMENT, INSTANCE
    event.EventInformation = BytesIO(b"data")
    command, report = event_report(5, "1.9", [(MR, "1.1"), (MR, "1.2")], reasons)
    assert command == command_of(N_EVENT_REPORT_RQ(), event)
    told = [(item.ReferencedSOPInstanceUID, item.get("FailureReason", 0)) for name in
            ("ReferencedSOPSequence", "FailedSOPSequence") for item in report.get(name, [])]
    assert sorted(told) == sorted(zip(["1.1", "1.2"], reasons, strict=True)) and report.TransactionUID == "1.9"


@given(st.text(max_size=100))
def test_an_error_comment_never_breaks_the_response(comment: str) -> None:
    found = Command(dimse.response(Command(store_request(7, "1.2.3")), 0xA700, comment))
    assert found.number(dimse.STATUS) == 0xA700
    assert len(found.elements.get(dimse.ERROR_COMMENT, b"")) <= 64


def test_a_request_without_a_message_id_gets_no_response() -> None:
    with pytest.raises(BadCommand):
        dimse.response(Command(dimse.encode({dimse.COMMAND_FIELD: dimse.C_STORE_RQ})), 0)
