#!/usr/bin/env python3
"""Joins raw data that came in pieces. Needs Python 3.9 and nothing else; packed pieces need zstandard or zstd.

    python3 join.py FOLDER [--remove]

FOLDER is where a resource of an XNAT was downloaded to, or where it lies in XNAT's archive; folders below it are looked
through, too. Each NAME.parts with a manifest.json becomes NAME beside it: pieces are compared with their digests, the
whole with its SHA-256, and only then it gets its name. --remove deletes the pieces after that. In the archive itself,
XNAT is told afterwards:

    curl -X POST "$XNAT/data/services/refresh/catalog?options=append,delete,checksum&resource=/archive/experiments/..."

Exit status: 0 all joined, 1 something is not there or damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FOLDER, MANIFEST = ".parts", "manifest.json"  # as relay_agent.destinations.pieces
BLOCK = 2**20  # as relay_agent.kspace.packing, the same for ENCODING
ENCODING = "shuffle4-1MiB+zstd"


class Damaged(Exception):
    """A piece or the whole is not what the manifest says; nothing was written."""


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="join", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--remove", action="store_true", help="delete the pieces that were joined")
    options = parser.parse_args(arguments)
    return run(options.folder, options.remove)


def run(folder: Path, remove: bool) -> int:
    """Join everything below a folder, and say so; the exit status."""
    status = 0
    manifests = sorted(folder.rglob(f"*{FOLDER}/{MANIFEST}"))
    for path in manifests:
        try:
            target = join(path)
            if remove:
                shutil.rmtree(path.parent)
            print(f"{target}: joined, digests agree")
        except (Damaged, OSError) as error:
            print(f"{path.parent}: {error}", file=sys.stderr)
            status = 1
    for parts in sorted(set(folder.rglob(f"*{FOLDER}")) - {path.parent for path in manifests}):
        print(f"{parts}: no {MANIFEST} yet, so pieces are still to come", file=sys.stderr)
        status = 1
    return status


def join(path: Path) -> Path:
    """Make the file that a manifest describes; its path. Raises :class:`Damaged`, ``OSError``."""
    try:
        told = json.loads(path.read_bytes())
        whole, pieces = told["file"], told["pieces"]
        target = path.parent.parent / Path(whole["name"]).name
        if any(Path(piece["name"]).name != piece["name"] for piece in pieces):
            raise Damaged("its manifest names other folders")
    except (ValueError, KeyError, TypeError):
        raise Damaged("its manifest cannot be read") from None
    if target.exists():
        if _sha256(target) != whole["sha256"]:
            raise Damaged(f"{target.name} is there already and has other content")
        return target
    work = target.with_name(f".{target.name}.joining")
    digest, size = hashlib.sha256(), 0
    try:
        with work.open("wb") as out:
            for piece in pieces:
                for block in _content(path.parent / piece["name"], piece):
                    out.write(block)
                    digest.update(block)
                    size += len(block)
            out.flush()
            os.fsync(out.fileno())
        if (size, digest.hexdigest()) != (whole["size"], whole["sha256"]):
            raise Damaged("the whole is not what was sent")
        work.rename(target)
    finally:
        work.unlink(missing_ok=True)
    return target


def _content(path: Path, piece: dict[str, Any]) -> Iterator[bytes]:
    """What is in a piece, after it was compared with its digest."""
    if not path.exists():
        raise Damaged(f"piece {path.name} is missing")
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        for block in _blocks(file):
            md5.update(block)
        if md5.hexdigest() != piece["md5"]:
            raise Damaged(f"piece {path.name} is damaged")
        file.seek(0)
        if piece["encoding"] == "none":
            yield from _blocks(file)
        elif piece["encoding"] == ENCODING:
            with _unpacked(file) as plain:
                yield from map(_in_order, _blocks(plain))
        else:
            raise Damaged(f"piece {path.name} is packed in a way that this program does not know; take a newer one")


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Blocks of exactly BLOCK bytes, but for the last."""
    block = bytearray()
    while read := file.read(BLOCK - len(block)):
        block += read
        if len(block) == BLOCK:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _in_order(block: bytes) -> bytes:
    """The words of 4 bytes, from all first bytes, all second ones, and so on."""
    count = len(block) // 4
    out = bytearray(block)
    for byte in range(4):
        out[byte:4 * count:4] = block[byte * count:(byte + 1) * count]
    return bytes(out)


@contextlib.contextmanager
def _unpacked(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """What a zstd frame holds, by the library or by the program."""
    try:
        import zstandard  # noqa: PLC0415 - only who unpacks needs it
    except ImportError:
        program = shutil.which("zstd")
        if program is None:
            raise Damaged("its pieces are packed; install zstd, or zstandard for Python") from None
        with subprocess.Popen([program, "-dcq"], stdin=file, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode:
            raise Damaged("a packed piece cannot be unpacked") from None
        return
    try:
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as plain:
            yield plain
    except zstandard.ZstdError:
        raise Damaged("a packed piece cannot be unpacked") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
