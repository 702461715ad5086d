"""Package: the manifest of a shipment, and its instances as bounded zip streams built while they are sent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from isal import isal_zlib
from pydicom import dcmread

from relay_agent import dicom
from relay_agent.config import Config
from relay_agent.kspace import keep, sidecar
from relay_agent.kspace.twix import Verdict
from relay_agent.ledger import Ledger

_BLOCK = 2**20
_ENTRIES = 2**16 - 1  # what a plain zip can count
_ENTRY = 2**32 - 2**24  # what it can hold of one, with room for data that deflating makes larger
_STORE = 0  # zlib's level for deflate blocks that are only stored


class Damaged(Exception):
    """A file in the spool is not what was received; the message names the instance's number in the ledger.

    No ``OSError``, because inside a request those count as failures of the line.
    """

    def __init__(self, instance: int, path: Path, what: str) -> None:
        self.instance = instance
        super().__init__(f"the file of instance {instance} {what}. Keep the scanner's copy, look after the disk, send "
                         "the session again, then 'retry'")
        self.path = path


@dataclass(frozen=True, slots=True)
class Item:
    """One instance of a shipment as it is to be sent; digests are of the whole file.

    Of raw data: the file and its sidecar, ``sop_instance`` is the name of the file over there.
    """

    id: int
    path: Path
    sop_class: str
    sop_instance: str
    series_uid: str
    series_number: str
    instance_number: str
    transfer_syntax: str
    size: int
    md5: str
    sha256: str
    replaces: bool  # another version of it was sent before
    received_as: str = ""  # SOP Instance UID as received, where scripts gave it another
    content: str = ""  # see content(); empty until it is needed


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a shipment consists of and where it belongs."""

    shipment: int
    study_uid: str
    supplement: int
    project: str
    subject: str
    session: str
    auto_archive: bool | None
    items: tuple[Item, ...]
    recipe: str | None = None  # hash of what de-identified it
    kind: str = "session"  # or raw
    scan: str = ""  # raw: number of the series that it belongs to; empty: to the session as a whole
    series_uid: str = ""  # raw: that series, as it was delivered
    resource: str = ""  # raw: label of the resource; KSPACE is the one of the scan

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


def manifest(config: Config, ledger: Ledger, shipment: int) -> Manifest:
    """The manifest: of what was made of the shipment, or, without scripts, of what was received.

    Digests of the files are taken once and kept in the ledger.

    Raises :class:`Damaged` when a data set is not the one that was received.
    """
    head = ledger.one("SELECT * FROM shipment WHERE id = ?", shipment)
    if head is None:
        raise KeyError(shipment)
    if head["kind"] == "raw":
        return _raw(config, ledger, head)
    made = bool(head["recipe"])
    items = _made(ledger, config.data, shipment) if made else _received(ledger, config.spool, shipment)
    studies = {row[0] for row in ledger.all("SELECT DISTINCT study_uid FROM made WHERE shipment = ?", shipment)}
    archive = None if head["auto_archive"] is None else bool(head["auto_archive"])
    return Manifest(shipment, studies.pop() if made and studies else head["study_uid"], head["supplement"],
                    head["project"] or "", head["subject"] or "", head["session"] or "", archive, items, head["recipe"])


def _raw(config: Config, ledger: Ledger, head: sqlite3.Row) -> Manifest:
    """Of raw data: the file as it leaves, and its sidecar."""
    raw = ledger.one("SELECT * FROM raw WHERE shipment = ?", head["id"])
    session = ledger.one("SELECT * FROM shipment WHERE id = ?", raw["session"]) if raw is not None else None
    if raw is None or session is None or raw["path"] is None:
        raise KeyError(head["id"])
    study, series, number = sidecar.delivered(ledger, session, raw["series_uid"])
    beside = sidecar.path_of(config, head["id"], raw["name"])
    sizes = _whole(beside, raw["instance"])
    items = tuple(Item(raw["instance"], path, "", path.name if path == beside else raw["name"], "", "", "", "", size,
                       md5.hex(), sha256.hex(), False) for path, md5, sha256, size in (
        (config.data / raw["path"], raw["md5"], raw["sha256"], raw["size"]), (beside, *sizes)))
    resource = "KSPACE"
    if not raw["series_uid"]:
        if keep.is_adjustment(raw):
            resource = "KSPACE_ADJ"
        elif not raw["by_hand"] and raw["verdict"] in (Verdict.COMPLETE, Verdict.ABORTED):
            resource = "KSPACE_UNMATCHED"
    return Manifest(head["id"], study, 0, head["project"], head["subject"], head["session"], None, items,
                    head["recipe"], "raw", number, series, resource)


def _whole(path: Path, number: int) -> tuple[bytes, bytes, int]:
    """MD5, SHA-256 and size of a small file."""
    content = b"".join(_read(path, number))
    return hashlib.md5(content, usedforsecurity=False).digest(), hashlib.sha256(content).digest(), len(content)


def _made(ledger: Ledger, data: Path, shipment: int) -> tuple[Item, ...]:
    rows = ledger.all("SELECT m.*, i.conflict, i.sop_instance AS received_as FROM made m JOIN instance i ON "
                      "i.id = m.instance WHERE m.shipment = ? ORDER BY m.series_uid, m.instance", shipment)
    return tuple(Item(row["instance"], data / row["path"], row["sop_class"], row["sop_instance"], row["series_uid"],
                      row["series_number"] or "", row["instance_number"] or "", row["transfer_syntax"], row["size"],
                      row["md5"].hex(), row["sha256"].hex(), row["conflict"] is not None, row["received_as"])
                 for row in rows)


def _received(ledger: Ledger, spool: Path, shipment: int) -> tuple[Item, ...]:
    rows = ledger.all("SELECT * FROM instance WHERE shipment = ? AND problem IS NULL ORDER BY series_uid, id", shipment)
    todo = [row for row in rows if row["sent_md5"] is None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside the GIL
        found = list(pool.map(lambda row: _digests(spool / row["path"], row["id"], row["digest"]), todo))
    new = [(*digests, row["id"]) for digests, row in zip(found, todo, strict=True)]
    if new:
        with ledger.write() as connection:
            connection.executemany("UPDATE instance SET sent_md5 = ?, sent_sha256 = ?, sent_size = ? WHERE id = ?", new)
        return _received(ledger, spool, shipment)
    return tuple(Item(row["id"], spool / row["path"], row["sop_class"], row["sop_instance"], row["series_uid"],
                      row["series_number"] or "", row["instance_number"] or "", row["transfer_syntax"],
                      row["sent_size"], row["sent_md5"].hex(), row["sent_sha256"].hex(), row["conflict"] is not None,
                      row["sop_instance"])
                 for row in rows)


def set_digest(ledger: Ledger, row: sqlite3.Row | Mapping[str, Any]) -> str:
    """SHA-256 of what would be shipped and where to (labels, route, every instance): a person approves just this."""
    if row["kind"] == "raw":
        parts = ledger.all("SELECT name, hex(sha256) FROM raw WHERE shipment = ?", row["id"])
    else:
        table, name = ("made", "sha256") if row["recipe"] else ("instance", "digest")
        parts = ledger.all(f"SELECT sop_instance, hex({name}) FROM {table} WHERE shipment = ? ORDER BY 1, 2", row["id"])
    facts = [row["project"], row["subject"], row["session"], row["route"], [list(part) for part in parts]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digests(path: Path, number: int, received: bytes) -> tuple[bytes, bytes, int]:
    """MD5 (XNAT's catalogue), SHA-256 and size of the file; proves on the way that the data set is intact."""
    md5, sha256, data_set = hashlib.md5(usedforsecurity=False), hashlib.sha256(), hashlib.sha256()
    size = 0
    try:
        offset = dicom.read_meta(path).offset
    except dicom.NotDICOM:
        raise Damaged(number, path, _CHANGED) from None
    except FileNotFoundError:
        raise Damaged(number, path, _MISSING) from None
    for block in _read(path, number, offset):
        md5.update(block)
        sha256.update(block)
        if size:
            data_set.update(block)
        size += len(block)
    if data_set.digest() != received:
        raise Damaged(number, path, _CHANGED)
    return md5.digest(), sha256.digest(), size


_CHANGED, _MISSING = "is not what was received", "is missing from the spool"


def _read(path: Path, number: int, first: int = _BLOCK) -> Iterator[bytes]:
    """A file of the spool in blocks; the first one may have another size."""
    try:
        with path.open("rb", buffering=0) as file:
            block = file.read(first)
            while block:
                yield block
                block = file.read(_BLOCK)
    except FileNotFoundError:
        raise Damaged(number, path, _MISSING) from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damaged(number, path, "cannot be read, the disk is failing") from None
        raise


def require_intact(items: Iterable[Item]) -> None:
    """Raise :class:`Damaged` when a file is not any more what it was when its digests were taken."""
    for item in items:
        sha256 = hashlib.sha256()
        for block in _read(item.path, item.id):
            sha256.update(block)
        if sha256.hexdigest() != item.sha256:
            raise Damaged(item.id, item.path, _CHANGED)


def content(path: Path) -> bytes:
    """:func:`relay_agent.dicom.content_digest` of a file."""
    return dicom.content_digest(dcmread(path, force=True))


def parts(items: Iterable[Item], largest: int) -> list[tuple[Item, ...]]:
    """Items by series, in parts of at most ``largest`` bytes (a single larger item is one) and a zip's entries."""
    out: list[tuple[Item, ...]] = []
    for _, series in groupby(sorted(items, key=lambda i: (i.series_uid, i.id)), key=lambda i: i.series_uid):
        part: list[Item] = []
        size = 0
        for item in series:
            if part and (size + item.size > largest or len(part) == _ENTRIES):
                out.append(tuple(part))
                part, size = [], 0
            part.append(item)
            size += item.size
        out.append(tuple(part))
    return out


class Compression:
    """Chooses per part what is faster over this line: deflate (ISA-L) or stored blocks.

    Deflating pays when the line moves bytes slower than the compressor makes them; both are measured on the parts
    themselves.
    """

    def __init__(self, mode: Literal["auto", "deflate", "store"]) -> None:
        self._mode = mode
        self._lock = threading.Lock()
        self._speed = {False: 0.0, True: 0.0}  # bytes of DICOM per second, by whether deflated
        self._parts = 0
        self._trial: bool | None = None  # the way that one part under way tries

    def deflate(self) -> bool:
        """Whether the next part is deflated. The first is stored; then one part at a time tries the other way."""
        if self._mode != "auto":
            return self._mode == "deflate"
        with self._lock:
            self._parts += 1
            faster = self._speed[True] > self._speed[False]
            half_known = max(self._speed.values()) > 0 and not min(self._speed.values())
            # The slower way is tried again now and then: lines change by the hour.
            if (half_known and self._trial is None) or self._parts % 16 == 0:
                self._trial = not faster
                return not faster
            return faster

    def learn(self, deflated: bool, size: int, seconds: float) -> None:
        """Tell how long a part took."""
        with self._lock:
            if deflated is self._trial:
                self._trial = None
            if size > 2**20 or not self._speed[deflated]:
                self._speed[deflated] = size / max(seconds, 1e-6)


_ZIP_TIME = 0x21 << 16  # 1 January 1980, as there is no truth to tell
_LOCAL, _DESCRIPTOR, _CENTRAL, _END = 0x04034B50, 0x08074B50, 0x02014B50, 0x06054B50
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8


class TooLarge(ValueError):
    """An instance of about 4 GiB or more, which a plain zip cannot hold."""


def zip_stream(items: Sequence[Item], deflate: bool) -> Iterator[bytes]:
    """A zip of ``<SOP Instance UID>.dcm`` entries, made while it is read; nothing is written to disk.

    Entries are always of method "deflated" (stored blocks when not ``deflate``): a reader that works on a stream,
    as XNAT's does, cannot tell where a stored entry with its size behind it ends.
    """
    directory = bytearray()
    position = 0
    for item in items:
        if item.size > _ENTRY:
            raise TooLarge(f"instance {item.id} is larger than 4 GB and cannot travel in a zip")
        name = f"{item.sop_instance}.dcm".encode()
        start = position
        head = struct.pack("<IHHHIIIIHH", _LOCAL, 20, _FLAGS, 8, _ZIP_TIME, 0, 0, 0, len(name), 0) + name
        position += len(head)
        yield head
        crc = size = packed = 0
        compressor = (isal_zlib.compressobj(1, isal_zlib.DEFLATED, -15) if deflate
                      else zlib.compressobj(_STORE, zlib.DEFLATED, -15))
        for block in _read(item.path, item.id):
            crc = isal_zlib.crc32(block, crc)
            size += len(block)
            out = compressor.compress(block)
            if out:
                packed += len(out)
                yield out
        out = compressor.flush()
        packed += len(out)
        sizes = struct.pack("<III", crc, packed, size)
        position += packed + 16
        yield out + struct.pack("<I", _DESCRIPTOR) + sizes
        directory += struct.pack("<IHHHHI", _CENTRAL, 20, 20, _FLAGS, 8, _ZIP_TIME) + sizes + struct.pack(
            "<HHHHHII", len(name), 0, 0, 0, 0, 0, start) + name
    count = len(items)
    yield bytes(directory) + struct.pack("<IHHHHIIH", _END, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                                         len(directory), position, 0)


def blocks(stream: Iterable[bytes], size: int = _BLOCK) -> Iterator[bytes]:
    """The same bytes in blocks of about ``size``: few writes keep TLS and the network fast."""
    gathered: list[bytes] = []
    length = 0
    for piece in stream:
        gathered.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(gathered)
            gathered, length = [], 0
    if gathered:
        yield b"".join(gathered)


