"""Scanners: DCMTK's dcmsend on files, and a stream of one object that is larger than anybody wants in memory."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from relay_agent import dicom, dimse, wire
from relay_agent.dimse import Command
from relay_agent.negotiate import APPLICATION_CONTEXT
from tests import data
from tests.bench.corpus import plane
from tests.bench.servers import Server, environment


def dcmsend(port: int, aet: str, groups: Sequence[Sequence[Path]], *, nodelay: bool = True) -> None:
    """Send folders, each group over an association of its own, all at once."""
    processes = [subprocess.Popen(["dcmsend", "-aet", "SCANNER", "-aec", aet, "+sd", "127.0.0.1", str(port),
                                   *map(str, group)], env=environment(nodelay), stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for group in groups]
    for process in processes:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"dcmsend failed: {said.decode(errors='replace')[-500:]}")


def stream_object(server: Server, size: int) -> int:
    """Send one multi-frame object of about ``size`` bytes that is nowhere as a whole; the C-STORE status."""
    frame = plane("CT", 1)
    frames = size // len(frame)
    header = data.instance(modality="CT", size=(512, 512), sop_class=EnhancedCTImageStorage, NumberOfFrames=frames)
    del header.PixelData
    command = dimse.encode({
        dimse.AFFECTED_CLASS: EnhancedCTImageStorage, dimse.COMMAND_FIELD: dimse.C_STORE_RQ, dimse.MESSAGE_ID: 1,
        0x0700: 0, dimse.DATA_SET_TYPE: 1, dimse.AFFECTED_INSTANCE: str(header.SOPInstanceUID)})
    head = dicom.encode(header, ExplicitVRLittleEndian)
    head += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, frames * len(frame))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(120)
        line = wire.Wire(connection, 2**20)
        line.send(_associate(server.aet, EnhancedCTImageStorage))
        kind, length = line.next_pdu()
        if kind != wire.A_ASSOCIATE_AC:
            raise RuntimeError("the association was not accepted")
        room = _max_pdu(bytes(line.take(length))) - 6
        line.send(wire.p_data(1, command, True, room + 6))
        for fragment, last in _fragments(head, frame, frames, room):
            line.send(b"".join((struct.pack(">BxIIBB", wire.P_DATA_TF, len(fragment) + 6, len(fragment) + 2, 1,
                                            2 if last else 0), fragment)))
        line.next_pdu()
        _, _, length = line.next_pdv(6 + 2**16)
        status = Command(bytes(line.take(length))).number(dimse.STATUS)
        line.send(struct.pack(">BxI", wire.A_RELEASE_RQ, 4) + bytes(4))
        line.next_pdu()
    return status


def _fragments(head: bytes, frame: bytes, frames: int, room: int) -> Iterator[tuple[memoryview, bool]]:
    yield memoryview(head), False
    for number in range(frames):
        view = memoryview(frame)
        for position in range(0, len(frame), room):
            yield view[position:position + room], number == frames - 1 and position + room >= len(frame)


def _associate(called: str, sop_class: str) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 table 9-11) with one presentation context."""
    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    context = bytes((1, 0, 0, 0)) + item(0x30, sop_class.encode()) + item(0x40, ExplicitVRLittleEndian.encode())
    user = item(0x51, (2**18).to_bytes(4, "big")) + item(0x52, generate_uid().encode())
    body = (struct.pack(">HH16s16s32x", 1, 0, called.ljust(16).encode(), b"SCANNER".ljust(16))
            + item(0x10, APPLICATION_CONTEXT.encode()) + item(0x20, context) + item(0x50, user))
    return struct.pack(">BxI", wire.A_ASSOCIATE_RQ, len(body)) + body


def _max_pdu(accepted: bytes) -> int:
    position = accepted.index(b"\x51\x00\x00\x04")
    return int.from_bytes(accepted[position + 4:position + 8], "big") or 2**18
