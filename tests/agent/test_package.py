"""Packages: zips that any reader can unpack on the way, parts that leave nothing out, digests that notice a bit."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent import package
from relay_agent.package import (
    Compression,
    Damaged,
    Item,
    TooLarge,
    blocks,
    content,
    manifest,
    parts,
    require_intact,
    zip_stream,
)
from tests.agent.box import Box, Image, parsed
from tests.agent.test_stage import sort_all
from tests.peers import needed


def item(number: int, path: Path, size: int, series: str = "1") -> Item:
    return Item(number, path, "1.2", f"1.2.{number}", series, "", "", "", size, "", "", False)


def files(folder: Path, contents: Sequence[bytes]) -> list[Item]:
    found = []
    for number, data in enumerate(contents):
        path = folder / str(number)
        path.write_bytes(data)
        found.append(item(number, path, len(data)))
    return found


def streamed(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The entries as a reader finds them that sees the bytes pass by, without the directory at the end."""
    while data[:4] == b"PK\3\4":
        _, flags, method, _, _, _, _, names, extra = struct.unpack_from("<HHHIIIIHH", data, 4)
        assert flags & 8 and method == zipfile.ZIP_DEFLATED and not extra
        name = data[30:30 + names].decode()
        inflate = zlib.decompressobj(-15)
        content = inflate.decompress(data[30 + names:])
        assert inflate.eof
        packed = len(data) - 30 - names - len(inflate.unused_data)
        signature, crc, told, size = struct.unpack_from("<IIII", inflate.unused_data)
        assert (signature, crc, told, size) == (0x08074B50, zlib.crc32(content), packed, len(content))
        data = inflate.unused_data[16:]
        yield name, content
    assert data[:4] in (b"PK\1\2", b"PK\5\6")


@given(st.lists(st.binary(max_size=2000), max_size=6), st.booleans())
def test_a_zip_holds_every_file_for_readers_with_and_without_its_end(
        tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], deflate: bool) -> None:
    items = files(tmp_path_factory.mktemp("zip"), contents)
    data = b"".join(zip_stream(items, deflate))
    expected = {f"1.2.{number}.dcm": content for number, content in enumerate(contents)}
    with zipfile.ZipFile(BytesIO(data)) as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == expected
    assert dict(streamed(data)) == expected


LARGE = [b"", b"x", bytes(5 * 2**20), random.Random(1).randbytes(3 * 2**20), random.Random(2).randbytes(2**20) * 3,
         random.Random(3).randbytes(2**20 - 1), bytes(2**20 + 1)]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Zips of nothing up to several megabytes, stored and deflated."""
    folder = tmp_path_factory.mktemp("large")
    items = files(folder, LARGE)
    for deflate in (False, True):
        (folder / f"{deflate}.zip").write_bytes(b"".join(zip_stream(items, deflate)))
    return {deflate: folder / f"{deflate}.zip" for deflate in (False, True)}


@pytest.mark.parametrize("deflate", [False, True])
def test_large_files_for_readers_with_and_without_the_end(archives: dict[bool, Path], deflate: bool) -> None:
    data = archives[deflate].read_bytes()
    assert [content for _, content in streamed(data)] == LARGE
    with zipfile.ZipFile(archives[deflate]) as found:
        assert [found.read(name) for name in found.namelist()] == LARGE


def test_deflating_makes_it_smaller_and_storing_hardly_larger(archives: dict[bool, Path]) -> None:
    size = sum(map(len, LARGE))
    assert archives[True].stat().st_size < 0.6 * size
    assert size < archives[False].stat().st_size < 1.001 * size + 2000


@pytest.mark.parametrize("deflate", [False, True])
def test_info_zip_finds_no_error(archives: dict[bool, Path], deflate: bool) -> None:
    needed("unzip")
    done = subprocess.run(["unzip", "-t", archives[deflate]], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "No errors detected" in done.stdout


JAVA = """
import java.security.MessageDigest;
import java.util.HexFormat;
import java.util.zip.*;
public class Unzip {
    public static void main(String[] arguments) throws Exception {
        try (ZipInputStream zip = new ZipInputStream(System.in)) {
            for (ZipEntry entry; (entry = zip.getNextEntry()) != null;) {
                byte[] content = zip.readAllBytes();
                byte[] digest = MessageDigest.getInstance("SHA-256").digest(content);
                System.out.println(entry.getName() + " " + HexFormat.of().formatHex(digest));
            }
        }
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("javac"), reason="no javac; too large to be installed for this alone")
def test_java_reads_it_from_a_pipe_as_xnat_does(archives: dict[bool, Path], tmp_path: Path) -> None:
    (tmp_path / "Unzip.java").write_text(JAVA, encoding="ascii")
    subprocess.run(["javac", "-d", tmp_path, tmp_path / "Unzip.java"], check=True)
    for archive in archives.values():
        with archive.open("rb") as stream:
            done = subprocess.run(["java", "-Xshare:auto", "-cp", tmp_path, "Unzip"], stdin=stream, capture_output=True,
                                  text=True, check=True)
        assert done.stdout.split() == [word for number, content in enumerate(LARGE) for word in (
            f"1.2.{number}.dcm", hashlib.sha256(content).hexdigest())]


def test_what_a_plain_zip_cannot_hold_is_told_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 2**32)
    with pytest.raises(TooLarge, match="instance 7 is larger than 4 GB"):
        next(zip_stream([item(7, path, 2**32)], True))


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(1, 100))
def test_blocks_are_the_same_bytes_in_larger_pieces(pieces: list[bytes], size: int) -> None:
    found = list(blocks(pieces, size))
    assert b"".join(found) == b"".join(pieces)
    assert all(size <= len(block) < size + 50 for block in found[:-1])


# Parts

ITEMS = st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 50)), max_size=40).map(
    lambda entries: [item(number, Path(), size, series) for number, (series, size) in enumerate(entries)])


@pytest.mark.slow
@given(ITEMS, st.integers(1, 120))
def test_every_item_is_in_one_part_of_its_series_that_is_not_too_large(items: list[Item], largest: int) -> None:
    found = parts(items, largest)
    assert sorted((entry for part in found for entry in part), key=lambda entry: entry.id) == items
    for part in found:
        assert len({entry.series_uid for entry in part}) == 1
        assert len(part) == 1 or sum(entry.size for entry in part) <= largest
        assert [entry.id for entry in part] == sorted(entry.id for entry in part)
    for one, next_ in pairwise(found):  # none is smaller than it has to be
        if one[0].series_uid == next_[0].series_uid:
            assert sum(entry.size for entry in (*one, next_[0])) > largest


def test_a_part_has_no_more_entries_than_a_zip_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert package._ENTRIES < 2**16
    monkeypatch.setattr(package, "_ENTRIES", 3)
    assert [len(part) for part in parts([item(number, Path(), 1) for number in range(7)], 1000)] == [3, 3, 1]


# Manifests


@pytest.fixture
def session(box: Box) -> Box:
    box.receive(*(Image(sop=f"1.{number}", series=f"2.{number % 2}") for number in range(4)))
    sort_all(box)
    return box


def test_a_manifest_has_every_instance_with_the_digests_of_its_file(session: Box) -> None:
    found = manifest(session.config, session.ledger, 1)
    assert sorted(entry.sop_instance for entry in found.items) == ["1.0", "1.1", "1.2", "1.3"]
    for entry in found.items:
        data = entry.path.read_bytes()
        assert (entry.size, entry.md5, entry.sha256) == (
            len(data), hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
        assert parsed(data).SOPInstanceUID == entry.sop_instance and not entry.replaces
    assert found.size == sum(entry.size for entry in found.items)
    with pytest.raises(KeyError):
        manifest(session.config, session.ledger, 2)


def test_digests_are_taken_once(session: Box) -> None:
    first = manifest(session.config, session.ledger, 1)
    for entry in first.items:
        entry.path.unlink()
    assert manifest(session.config, session.ledger, 1) == first


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_a_flipped_bit_anywhere_in_the_data_set_is_noticed(
        tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    box = Box(tmp_path_factory.mktemp("flipped"))
    box.receive(Image())
    sort_all(box)
    path = box.spool.folder / box.ledger.value("SELECT path FROM instance")
    whole = path.read_bytes()
    start = len(whole) - len(Image().data_set())
    position, bit = data.draw(st.integers(start, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:position] + bytes((whole[position] ^ 1 << bit,)) + whole[position + 1:])
    with pytest.raises(Damaged, match="instance 1"):
        manifest(box.config, box.ledger, 1)
    path.write_bytes(whole)
    assert manifest(box.config, box.ledger, 1).items[0].sha256 == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"",
                                    lambda data: data[:100]])
def test_a_file_that_was_cut_or_grew_is_damaged(session: Box, change: object) -> None:
    path = session.spool.folder / session.ledger.value("SELECT path FROM instance WHERE id = 3")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(Damaged, match="instance 3"):
        manifest(session.config, session.ledger, 1)


def test_a_file_that_changed_since_its_digests_were_taken_is_damaged(session: Box) -> None:
    items = manifest(session.config, session.ledger, 1).items
    require_intact(items)
    whole = items[1].path.read_bytes()
    items[1].path.write_bytes(b"x" + whole[1:])  # the preamble: no data set digest covers it
    with pytest.raises(Damaged, match=f"instance {items[1].id}"):
        require_intact(items)


def test_a_newer_version_is_marked(session: Box) -> None:
    session.receive(Image(sop="1.0", series="2.0", version=1))
    sort_all(session)
    assert [entry.replaces for entry in manifest(session.config, session.ledger, 2).items] == [True]


def test_content_is_what_a_servers_script_leaves_alone(tmp_path: Path) -> None:
    def digest(pixels: bytes, name: str) -> bytes:
        data = parsed(Image().file())
        data.PatientName, data.Rows, data.Columns, data.BitsAllocated, data.PixelRepresentation = name, 1, 2, 16, 0
        data.add_new(0x7FE00010, "OW", pixels)
        data.save_as(tmp_path / "image.dcm")
        return content(tmp_path / "image.dcm")

    assert digest(b"abcd", "one") == digest(b"abcd", "two") != digest(b"abce", "one")


# Compression


class Line:
    """How long a part takes when deflated and when not, in seconds for each megabyte."""

    def __init__(self, deflated: float, stored: float) -> None:
        self.deflated, self.stored = deflated, stored
        self.chooser = Compression("auto")

    def send(self, count: int) -> list[bool]:
        chosen = []
        for _ in range(count):
            way = self.chooser.deflate()
            self.chooser.learn(way, 10 * 2**20, 10 * (self.deflated if way else self.stored))
            chosen.append(way)
        return chosen


@pytest.mark.parametrize(("deflated", "stored", "better"), [(1.0, 2.0, True), (2.0, 1.0, False), (0.01, 1.0, True)])
def test_the_faster_way_is_found_and_the_other_tried_now_and_then(deflated: float, stored: float, better: bool) -> None:
    line = Line(deflated, stored)
    first, second, *rest = line.send(66)
    assert {first, second} == {True, False}
    assert 0 < sum(way is not better for way in rest) <= 4


def test_a_line_that_changes_is_noticed() -> None:
    line = Line(1.0, 2.0)
    line.send(20)
    line.deflated, line.stored = 3.0, 0.5
    assert line.send(40)[20:].count(False) >= 18


def test_small_parts_teach_nothing_after_the_first() -> None:
    chooser = Compression("auto")
    for way, seconds in ((True, 1.0), (False, 2.0)):
        chooser.learn(way, 10 * 2**20, seconds)
    for _ in range(100):
        chooser.learn(True, 1000, 60.0)
    assert [chooser.deflate() for _ in range(15)] == [True] * 15


@pytest.mark.parametrize("mode", ["deflate", "store"])
def test_what_is_told_is_done(mode: str) -> None:
    chooser = Compression(mode)  # type: ignore[arg-type]
    chooser.learn(mode != "deflate", 10 * 2**20, 0.001)
    assert {chooser.deflate() for _ in range(40)} == {mode == "deflate"}
