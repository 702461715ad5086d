"""A sender made of bytes on a socket, for what no toolkit would send. Shares no code with the agent."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage

from tests.harness import PATIENCE

RQ, AC, RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
CONTEXT_NAME = "1.2.840.10008.3.1.1.1"
VERIFICATION, COMMITMENT = "1.2.840.10008.1.1", "1.2.840.10008.1.20.1"
MR = {1: (str(MRImageStorage), [str(ExplicitVRLittleEndian)])}
ECHO = {1: (VERIFICATION, [str(ImplicitVRLittleEndian)])}

Contexts = Mapping[int, tuple[str, Sequence[str]]]


def pdu(kind: int, body: bytes) -> bytes:
    """Any PDU."""
    return struct.pack(">BxI", kind, len(body)) + body


def item(kind: int, body: bytes) -> bytes:
    """An item or sub-item of an association PDU."""
    return struct.pack(">BxH", kind, len(body)) + body


def pdv(context: int, control: int, fragment: bytes) -> bytes:
    """A presentation data value item; control: 1 command, 2 last."""
    return struct.pack(">IBB", len(fragment) + 2, context, control) + fragment


def associate_rq(contexts: Contexts = MR, *, called: str = "RELAY", calling: str = "SCANNER", version: int = 1,
                 name: str = CONTEXT_NAME, longest: int = 16384, window: tuple[int, int] | None = None,
                 more: bytes = b"", more_user: bytes = b"") -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 section 9.3.2)."""
    proposed = b"".join(
        item(0x20, bytes((number, 0, 0, 0)) + item(0x30, abstract.encode())
             + b"".join(item(0x40, syntax.encode()) for syntax in syntaxes))
        for number, (abstract, syntaxes) in contexts.items())
    user = item(0x51, struct.pack(">I", longest)) + item(0x52, b"1.2.826.0.1.3680043.8.498.7")
    if window:
        user += item(0x53, struct.pack(">HH", *window))
    return pdu(RQ, struct.pack(">HH16s16s32x", version, 0, called.ljust(16).encode(), calling.ljust(16).encode())
               + item(0x10, name.encode()) + proposed + item(0x50, user + more_user) + more)


def command(**elements: int | str) -> bytes:
    """A command set; keywords are PS3.7's, group length is added."""
    body = b""
    for name, value in sorted(elements.items(), key=lambda e: _TAGS[e[0]]):
        raw = struct.pack("<H", value) if isinstance(value, int) else value.encode()
        body += struct.pack("<HHI", 0, _TAGS[name], len(raw) + len(raw) % 2) + raw + b"\0" * (len(raw) % 2)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


_TAGS = {"affected_class": 0x0002, "requested_class": 0x0003, "field": 0x0100, "message": 0x0110,
         "responded": 0x0120, "priority": 0x0700, "data_set": 0x0800, "status": 0x0900,
         "affected_instance": 0x1000, "requested_instance": 0x1001, "event": 0x1002, "action": 0x1008}
_NAMES = {number: name for name, number in _TAGS.items()}


def c_store(sop_instance: str, message: int = 1, sop_class: str = str(MRImageStorage), **more: int | str) -> bytes:
    """A C-STORE-RQ's command set."""
    return command(**{"affected_class": sop_class, "field": 1, "message": message, "priority": 0, "data_set": 1,
                      "affected_instance": sop_instance} | more)


def c_echo(message: int = 1) -> bytes:
    """A C-ECHO-RQ's command set."""
    return command(affected_class=VERIFICATION, field=0x30, message=message, data_set=0x0101)


def parse(data: bytes) -> dict[str, Any]:
    """A command set by the same keywords."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        value = data[position + 8:position + 8 + length]
        assert group == 0 and len(value) == length, "the answer is no command set"
        position += 8 + length
        if element == 0:
            assert int.from_bytes(value, "little") == len(data) - position, "the group length is wrong"
            continue
        name = _NAMES.get(element, f"{element:04X}")
        found[name] = int.from_bytes(value, "little") if length == 2 else value.rstrip(b"\0 ").decode("ascii")
    return found


def encode(data: Dataset) -> bytes:
    """A data set as it travels, Explicit VR Little Endian."""
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, data)
    return bytes(out.getvalue())


class SCU:
    """One association, or an attempt at one."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", source: str = "", tls: ssl.SSLContext | None = None,
                 timeout: float = PATIENCE) -> None:
        self.socket: socket.socket = socket.create_connection((host, port), timeout,
                                                              source_address=(source, 0) if source else None)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.results: dict[int, tuple[int, str]] = {}  # of each context: result, transfer syntax
        self.user: dict[int, bytes] = {}
        self.longest = 16384
        self._message = 0

    def __enter__(self) -> SCU:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.socket.sendall(data)

    def read(self) -> tuple[int, bytes] | None:
        """The next PDU; None when the connection was closed or reset."""
        head = self._exactly(6)
        if head is None:
            return None
        kind, length = struct.unpack(">BxI", head)
        body = self._exactly(length)
        assert body is not None, "the answer was cut off"
        return kind, body

    def _exactly(self, count: int) -> bytes | None:
        got = bytearray()
        while len(got) < count:
            try:
                more = self.socket.recv(count - len(got))
            except ConnectionResetError:
                more = b""
            if not more:
                return bytes(got) if got else None if count else b""
            got += more
        return bytes(got)

    def rest(self) -> list[tuple[int, bytes]]:
        """Every PDU up to the end of the connection."""
        found = []
        while (one := self.read()) is not None:
            found.append(one)
        return found

    def associate(self, contexts: Contexts = MR, **settings: Any) -> SCU:
        """Ask for an association and read the answer, which must be yes."""
        self.send(associate_rq(contexts, **settings))
        answer = self.read()
        assert answer is not None and answer[0] == AC, f"no A-ASSOCIATE-AC: {answer}"
        position, body = 68, answer[1]
        while position < len(body):
            kind, length = struct.unpack_from(">BxH", body, position)
            value = body[position + 4:position + 4 + length]
            position += 4 + length
            if kind == 0x21:
                assert value[4] == 0x40
                self.results[value[0]] = value[2], value[8:].decode()
            elif kind == 0x50:
                inside = 0
                while inside < len(value):
                    kind, length = struct.unpack_from(">BxH", value, inside)
                    self.user[kind] = value[inside + 4:inside + 4 + length]
                    inside += 4 + length
        self.longest = int.from_bytes(self.user[0x51], "big")
        return self

    def accepted(self) -> set[int]:
        """IDs of the accepted contexts."""
        return {number for number, (result, _) in self.results.items() if result == 0}

    def begin(self, sop_instance: str, *, sop_class: str = str(MRImageStorage), context: int = 1) -> None:
        """Send the command set of a C-STORE."""
        self._message = self._message % 65535 + 1
        self.send(pdu(P_DATA, pdv(context, 3, c_store(sop_instance, self._message, sop_class))))

    def data(self, fragments: Iterable[bytes], context: int = 1) -> None:
        """Send a data set, a PDU for each fragment."""
        held: bytes | None = None
        for fragment in fragments:
            if held is not None:
                self.send(pdu(P_DATA, pdv(context, 0, held)))
            held = fragment
        self.send(pdu(P_DATA, pdv(context, 2, held or b"")))

    def store(self, sop_instance: str, data: bytes, *, sop_class: str = str(MRImageStorage), context: int = 1,
              fragment: int = 60_000) -> int:
        """C-STORE; the status."""
        self.begin(sop_instance, sop_class=sop_class, context=context)
        self.data((data[at:at + fragment] for at in range(0, len(data) or 1, fragment)), context)
        return self.status()

    def status(self) -> int:
        """The status of the next response."""
        answer = self.response()
        assert answer["responded"] == self._message
        return int(answer["status"])

    def response(self) -> dict[str, Any]:
        """The next message's command set, which must come without a data set."""
        answer, content = self.message()
        assert content is None, "a data set came where a response was waited for"
        return answer

    def message(self) -> tuple[dict[str, Any], bytes | None]:
        """The next message: command set and data set; ``ConnectionError`` when none comes."""
        parts = {1: b"", 0: b""}
        answer: dict[str, Any] | None = None
        while True:
            got = self.read()
            if got is None or got[0] != P_DATA:
                raise ConnectionError(f"no message but {got}")
            body = got[1]
            while body:
                length, _, control = struct.unpack_from(">IBB", body)
                parts[control & 1] += body[6:4 + length]
                body = body[4 + length:]
                if control == 3:
                    answer = parse(parts[1])
                    if answer["data_set"] == 0x0101:
                        assert not body and not parts[0], "something follows a message that has no data set"
                        return answer, None
                elif control == 2:
                    assert answer is not None and not body
                    return answer, parts[0]

    def echo(self, context: int = 1) -> int:
        """C-ECHO; the status."""
        self._message += 1
        self.send(pdu(P_DATA, pdv(context, 3, c_echo(self._message))))
        return self.status()

    def release(self) -> None:
        """Release, and see the connection closed by the other side."""
        self.send(pdu(RELEASE_RQ, bytes(4)))
        assert self.read() == (RELEASE_RP, bytes(4))
        assert self.read() is None
        self.socket.close()
