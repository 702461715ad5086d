"""Joining over there: right, or not at all and said; with the library, the program, and Python alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_agent.destinations.pieces import FOLDER, MANIFEST, Piece, Step, cover, manifest
from relay_agent.kspace import join, packing
from relay_agent.package import Item
from tests.harness import PROJECT
from tests.peers import needed

NAME = "MID00358_0123456789ab.dat"
CONTENT = bytes(range(256)) * 16_000 + b"end"  # some MiB, no multiple of 4


def resource(folder: Path, packed: bool, cuts: tuple[int, ...] = (2**20, 3 * 2**20)) -> Path:
    """A downloaded resource with the file in pieces."""
    parts = folder / f"{NAME}{FOLDER}"
    parts.mkdir(parents=True)
    edges = [0, *cuts, len(CONTENT)]
    pieces = [Piece(start, end, packed) for start, end in itertools.pairwise(edges)]
    digests = []
    for piece in pieces:
        plain = [CONTENT[at:min(at + packing.BLOCK, piece.end)] for at in range(piece.start, piece.end, packing.BLOCK)]
        travels = b"".join(packing.pack(plain) if packed else plain)
        (parts / piece.name).write_bytes(travels)
        digests.append((len(travels), hashlib.md5(travels).hexdigest()))
    item = Item(1, Path(), "", NAME, "", "", "", "", len(CONTENT), hashlib.md5(CONTENT).hexdigest(),
                hashlib.sha256(CONTENT).hexdigest(), False)
    (parts / MANIFEST).write_bytes(manifest(item, pieces, digests))
    return folder


@given(st.binary(max_size=3000))
def test_shuffle_and_back(block: bytes) -> None:
    assert join._in_order(packing.shuffle(block)) == block


@pytest.mark.parametrize("packed", [False, True])
def test_joined(tmp_path: Path, packed: bool) -> None:
    folder = resource(tmp_path / "KSPACE", packed)
    assert join.main([str(folder)]) == 0
    assert (folder / NAME).read_bytes() == CONTENT
    assert join.main([str(folder), "--remove"]) == 0  # a second time: it is there
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize("packed", [False, True])
def test_alone_without_anything_installed(tmp_path: Path, packed: bool) -> None:
    """The one file, on a Python without site packages; packed pieces by the program zstd."""
    folder = resource(tmp_path / "KSPACE", packed)
    if packed:
        needed("zstd")
    shutil.copy(PROJECT / "relay_agent/kspace/join.py", tmp_path / "join.py")
    done = subprocess.run([sys.executable, "-I", "-S", str(tmp_path / "join.py"), str(folder), "--remove"],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / NAME).read_bytes() == CONTENT
    without = resource(tmp_path / "again", True)
    done = subprocess.run([sys.executable, "-I", "-S", str(tmp_path / "join.py"), str(without)], env={"PATH": ""},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "install zstd" in done.stderr
    assert not (without / NAME).exists()


def _names(path: Path, name: str) -> None:
    told = json.loads((path / MANIFEST).read_text())
    told["pieces"][0]["name"] = name
    (path / MANIFEST).write_text(json.dumps(told))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("wrong", "words"), [
    (lambda parts: next(iter(sorted(parts.glob("0*")))).unlink(), "is missing"),
    (lambda parts: os.truncate(sorted(parts.glob("0*"))[1], 1000), "is damaged"),
    (lambda parts: (parts / MANIFEST).write_text("{"), "cannot be read"),
    (lambda parts: (parts / MANIFEST).unlink(), "still to come"),
    (lambda parts: _names(parts, "../../secret"), "names other folders"),
    (lambda parts: (parts.parent / NAME).write_bytes(b"other"), "has other content"),
    (lambda parts: (parts / MANIFEST).write_text((parts / MANIFEST).read_text().replace('"sha256": "', '"sha256": "0')),
     "the whole is not what was sent")])
def test_not_joined(tmp_path: Path, packed: bool, wrong, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resource(tmp_path / "KSPACE", packed)
    parts = folder / f"{NAME}{FOLDER}"
    wrong(parts)
    assert join.main([str(folder), "--remove"]) == 1
    assert words in capsys.readouterr().err
    assert parts.exists()
    assert not (folder / NAME).exists() or (folder / NAME).read_bytes() == b"other"
    assert not list(folder.glob(".*"))


def test_command(tmp_path: Path) -> None:
    folder = resource(tmp_path / "KSPACE", True)
    done = subprocess.run([sys.executable, "-m", "relay_agent", "kspace", "join", str(folder), "--remove"], cwd=PROJECT,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / NAME).read_bytes() == CONTENT


# Pieces

SIZES = st.integers(1, 60)


@given(st.lists(st.tuples(SIZES, SIZES), max_size=12), SIZES)
def test_cover(edges: list[tuple[int, int]], size: int) -> None:
    """Pieces and gaps follow each other from the first byte to the last, and pieces are of those given."""
    pieces = [Piece(min(pair) - 1, max(pair)) for pair in edges]
    chosen, gaps = cover(pieces, size)
    parts = sorted([(piece.start, piece.end) for piece in chosen] + gaps)
    assert parts[0][0] == 0 and parts[-1][1] == size
    assert all(one[1] == after[0] for one, after in itertools.pairwise(parts))
    assert set(chosen) <= set(pieces)
    again, left = cover([*pieces, *(Piece(*gap) for gap in gaps)], size)
    assert left == [] and again


@given(st.integers(0, 10**13), st.integers(1, 10**12), st.booleans())
def test_names_tell_their_bytes_and_sort(start: int, length: int, packed: bool) -> None:
    piece = Piece(start, start + length, packed)
    assert Piece.parse(piece.name) == piece
    assert Piece.parse(f"x{piece.name}") is None and Piece.parse(MANIFEST) is None
    assert Piece(start + length, start + length + 1).name > piece.name
    assert piece.name < MANIFEST


def test_step_finds_a_limit_and_grows_again() -> None:
    step = Step(25.0, 256 * 2**20)
    assert step.size == 8 * 2**20
    for _ in range(10):
        step.passed(step.size, step.size / 3e6)  # 24 Mbit/s
    assert 70e6 < step.size < 76e6
    for _ in range(3):  # three streams are cut at once
        step.cut(64 * 2**20)
    assert step.size == 32 * 2**20
    for _ in range(20):
        step.passed(step.size, step.size / 3e6)
    assert 70e6 < step.size < 76e6
    for _ in range(40):
        step.cut(step.size)
    assert step.size == 2**20
