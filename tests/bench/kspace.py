"""Raw k-space: check, hash and scrub against sha256sum, memory on a sparse file, and what packing gains."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

from relay_agent.deidentify.uids import UIDs
from relay_agent.kspace import join, packing
from relay_agent.kspace.scrub import plan, scrub
from relay_agent.kspace.twix import Verdict, check
from tests.bench.corpus import Corpus
from tests.bench.results import MB, Medians, Run, Section, Table, Target, ratio, show
from tests.harness import PROJECT
from tests.kspace.synthetic import ACQEND, FIRST, REAL, File, Scan, header

ROUNDS = 3
ALONE, HASHLIB, CHECKED = "sha256sum", "SHA-256 alone, hashlib", "check + hash"
PLANNED, DIGESTED, COPIED, MADE = ("check + hash + scrub, as patches", "the same, digest of the result, too",
                                   "the same, written to a file", "the same, MD5 for XNAT, too: as the worker")
_FEW, _MANY = "32 channels, 512 samples", "2 channels, 256 samples"
_LOADS = {_FEW: (32, 512), _MANY: (2, 256)}


def _mdh(length: int, number: int, mask: int, samples: int, channels: int) -> bytes:
    lead = struct.pack("<IiII", length, 358, number, 14_760_000 + number)
    return (lead + bytes(24) + struct.pack("<QHH", mask, samples, channels)).ljust(192, b"\0")


def make(path: Path, size: int, channels: int, samples: int, sparse: bool = False) -> None:
    """A file of about ``size`` bytes that is complete; a sparse one has zeros for samples, which take no space."""
    scan = Scan(channels=channels, samples=samples)
    lead = header(File(), scan)
    step = 192 + channels * (32 + 8 * samples)
    count = (size - FIRST - len(lead)) // step
    noise = np.random.default_rng(1).normal(size=(step - 192) // 4).astype("<f4")
    block = (noise.view("<u4") & 0xFFFFFF80).tobytes().ljust(step - 192, b"\0")  # converters have fewer bits than that
    with path.open("xb") as out:
        out.seek(FIRST)
        out.write(lead)
        for number in range(count):
            out.write(_mdh(step, number, 0, samples, channels))
            if sparse:
                out.seek(step - 192, os.SEEK_CUR)
            else:
                out.write(block)
        out.write(_mdh(352, count, ACQEND, 16, 2).ljust(352, b"\0"))
        end = out.tell()
        out.seek(0)
        out.write(struct.pack("<IIiIQQ64s64s", 0, 1, 358, 1, FIRST, end - FIRST, b"Planted", b"bench"))


def _way(name: str, path: Path) -> None:
    uids = UIDs(b"key", "P1")
    if name == HASHLIB:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    elif name == CHECKED:
        assert check(path).verdict is Verdict.COMPLETE
    elif name == PLANNED:
        plan(path, uids)
        assert check(path).verdict is Verdict.COMPLETE
    else:
        out = path.with_suffix(".out") if name in (COPIED, MADE) else None
        assert scrub(path, plan(path, uids), out, md5=name == MADE).check.verdict is Verdict.COMPLETE
        if out is not None:
            out.unlink()


def _one(name: str, path: Path) -> Run:
    """One way in a process of its own on one core."""
    core = {min(os.sched_getaffinity(0))}
    command = [sys.executable, "-m", "tests.bench.kspace", name, str(path)] if name != ALONE else [name, str(path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, core))
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, largest = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 0.0
    if name != ALONE:  # without the start of the interpreter
        took, cpu, largest = json.loads(done.stdout)
    return Run("kspace", "", name, 1, path.stat().st_size, took, cpu, int(largest), 0)


def kspace(_: Corpus, folder: Path, quick: bool) -> Section:
    """Speed on one core, memory, packing."""
    runs, tables, targets = [], [], []
    for load, (channels, samples) in _LOADS.items():
        path = folder / "raw.dat"
        make(path, 50_000_000 if quick else 1_000_000_000, channels, samples)
        ways = [ALONE, HASHLIB, CHECKED, PLANNED, DIGESTED, COPIED, MADE]
        for way in ways * (1 if quick else ROUNDS):
            run = _one(way, path)
            run.load = load
            runs.append(run)
        path.unlink()
        found = {way: Medians(runs, load, way) for way in ways}
        rows = [[way, "", show(one.speed), f"{one.cpu_gb:.2f}", ratio(found[ALONE].cpu_gb, one.cpu_gb),
                 ratio(found[HASHLIB].cpu_gb, one.cpu_gb)] for way, one in found.items()]
        columns = ["way", "", "MB/s", "CPU s/GB", "of sha256sum's speed", "of hashlib's"]
        tables.append(Table(f"Raw data, {load}, one core, from the cache", columns, rows, [
            "ratios are of CPU time: what else runs on the machine disturbs it less",
            "sha256sum of Debian 12 does not use the SHA instructions of the processor, hashlib does",
            "the worker's copy has a digest of its own from its first header on, and XNAT lists MD5"]))
        targets += [Target(f"{what}, {load}, against {against}", found[against].cpu_gb / found[way].cpu_gb, 0.8)
                    for against in (ALONE, HASHLIB) for what, way in (("check + hash + scrub", PLANNED),
                                                                      ("all that the worker does", MADE))]
    path = folder / "sparse.dat"
    make(path, 1_000_000_000 if quick else 20_000_000_000, 128, 65_535, sparse=True)
    run = _one(DIGESTED, path)
    run.load = "sparse"
    runs.append(run)
    targets.append(Target(f"memory, check + hash + scrub of {show(run.bytes / 1e9)} GB", run.largest / MB, 200, False,
                          "MB"))
    path.unlink()
    packing = _packing()
    if packing.rows:
        tables.append(packing)
    return Section("kspace", tables, targets, runs)


def _packing() -> Table:
    """What the product's packing gains over zstd alone, and how fast both directions are."""
    rows = []
    for path in sorted(REAL.glob("*.dat")):
        (one,) = check(path).measurements[-1:]
        content = path.read_bytes()
        for what, data in (("file", content), ("readouts", content[one.data:one.acqend])):
            plain = zstandard.ZstdCompressor(level=1)
            blocks = [data[at:at + packing.BLOCK] for at in range(0, len(data), packing.BLOCK)]
            alone, speed = _timed(lambda data=data, plain=plain: plain.compress(data), len(data))
            packed, pack = _timed(lambda blocks=blocks: b"".join(packing.pack(blocks)), len(data))
            back, unpack = _timed(lambda packed=packed: _back(packed), len(data))
            assert back == data
            gains = f"{len(data) / len(alone):.2f}", f"{len(data) / len(packed):.2f}"
            rows.append([path.name, what, gains[0], speed, gains[1], pack, unpack])
    columns = ["file", "part", "zstd-1", "MB/s", "shuffle + zstd-1", "MB/s", "back, MB/s"]
    return Table("Packing real files, one core", columns, rows)


def _back(packed: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(packed) as plain:
        return b"".join(map(join._in_order, join._blocks(plain)))


def _timed(action: Callable[[], bytes], size: int, rounds: int = 20) -> tuple[bytes, str]:
    """What it gives, and MB of the file per second of CPU."""
    began = time.process_time()
    for _ in range(rounds):
        result = action()
    return result, show(size * rounds / (time.process_time() - began) / MB)


if __name__ == "__main__":
    start, used = time.perf_counter(), time.process_time()
    _way(sys.argv[1], Path(sys.argv[2]))
    took = [time.perf_counter() - start, time.process_time() - used]
    # Not ru_maxrss: it begins with what the parent had.
    largest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([*took, int(largest.split()[1]) * 1024]))
