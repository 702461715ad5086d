"""The journal keeps its promise over power cuts: everything appended is there after recovery, byte for byte.

A power cut cannot be had in a unit test, so it is modelled by what the standard lets a disk forget: of files that
were written and not synced, any may be missing, empty, cut off or full of zeros; of the ring, what was written
after the last fdatasync may be there or not. What the journal synced is kept by the model, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent import journal
from relay_agent.journal import BLOCK, Journal, Pending, recover

SIZE = 32 * BLOCK


class Disk:
    """A spool and a ring on a disk that forgets what was not synced."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.ring, self.spool, self.chance = folder / "journal" / "ring-0", folder / "spool", chance
        self.spool.mkdir(parents=True)
        self.synced: set[str] = set()  # files that may not be forgotten any more
        self.placed: set[str] = set()
        self.heads: list[bytes] = []  # every first block the ring had since its last fdatasync

    def sync_file_system(self, _: Path) -> None:
        self.synced |= self.placed

    def cut_power(self) -> None:
        """Forget whatever may be forgotten."""
        for path in self.placed - self.synced:
            file = self.spool / path
            if not file.exists():
                continue
            whole = file.read_bytes()
            match self.chance.randrange(5):
                case 0:
                    file.unlink()
                case 1:
                    file.write_bytes(b"")
                case 2:
                    file.write_bytes(whole[:self.chance.randrange(len(whole))])
                case 3:
                    file.write_bytes(bytes(len(whole)))
        head = self.chance.choice([*self.heads, bytes(16)])
        with self.ring.open("r+b") as ring:
            ring.write(head)


def instance(chance: random.Random, largest: int) -> tuple[str, bytes, list[bytes]]:
    """Path, digest and parts of an invented instance."""
    header, data = chance.randbytes(chance.randrange(1, 400)), chance.randbytes(chance.randrange(largest))
    digest = hashlib.sha256(data).digest()
    middle = chance.randrange(len(data) + 1)
    return f"RELAY/20260102/{chance.randrange(3):02}/{digest.hex()}.dcm", digest, [header, data[:middle], data[middle:]]


@pytest.mark.slow
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), steps=st.lists(st.sampled_from("aaaappsc"), min_size=1, max_size=60))
def test_everything_promised_is_there_after_power_cuts(seed: int, steps: list[str]) -> None:
    """Any sequence of append, place, settle and cut, over several laps of the ring, loses nothing promised."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    disk = Disk(folder, chance)
    promised: dict[str, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "sync_file_system", disk.sync_file_system)
        ring = Journal(disk.ring, SIZE, disk.spool)
        waiting: list[Pending] = []
        for step in [*steps, "c"]:
            disk.heads.append(disk.ring.read_bytes()[:16])
            if step == "a":
                path, digest, parts = instance(chance, 6 * BLOCK)
                pending = ring.append(path, digest, parts)
                if pending is not None:
                    promised[path] = b"".join(parts)
                    waiting.append(pending)
                    disk.heads = disk.heads[-1:]
            elif step == "p" and waiting:
                pending = waiting.pop(0)
                ring.place(pending)
                disk.placed.add(pending.path)
            elif step == "s":
                ring.settle(everything=True)
            elif step == "c":
                disk.cut_power()
                disk.placed |= set(promised)
                recover(disk.ring.parent, disk.spool)
                for path, content in promised.items():
                    assert (disk.spool / path).read_bytes() == content
                disk.heads, waiting = [], []
                ring = Journal(disk.ring, SIZE, disk.spool)
    shutil.rmtree(folder)


def test_append_returns_only_after_its_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the sender depends on it: the record is written, then synced, then promised."""
    calls: list[str] = []
    real_write, real_sync = os.pwritev, os.fdatasync
    monkeypatch.setattr(os, "pwritev", lambda *a: calls.append("write") or real_write(*a))
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync") or real_sync(fd))
    (tmp_path / "spool").mkdir()
    ring = Journal(tmp_path / "ring-0", SIZE, tmp_path / "spool")
    calls.clear()
    assert ring.append(*instance(random.Random(1), BLOCK)) is not None
    assert calls == ["write", "sync"]


def test_a_record_is_not_reused_before_its_file_is_synced(tmp_path: Path) -> None:
    """A full ring refuses (the instance then goes into a file directly) until settling frees its oldest records."""
    chance = random.Random(2)
    (tmp_path / "spool").mkdir()
    ring = Journal(tmp_path / "ring-0", SIZE, tmp_path / "spool")
    taken = []
    while (pending := ring.append(*instance(chance, 4 * BLOCK))) is not None:
        taken.append(pending)
    assert sum(pending.length for pending in taken) <= SIZE - BLOCK
    for pending in taken[:2]:
        ring.place(pending)
    assert ring.append(*instance(chance, 10)) is None or len(taken) < 3
    ring.settle(everything=True)
    assert ring.append(*instance(chance, 10)) is not None


def test_a_torn_record_is_no_promise(tmp_path: Path) -> None:
    """What a power cut tore was never acknowledged: recovery leaves it out and nothing else."""
    chance = random.Random(3)
    spool = tmp_path / "spool"
    spool.mkdir()
    ring = Journal(tmp_path / "ring-0", SIZE, spool)
    whole, torn = (ring.append(*instance(chance, 3 * BLOCK)) for _ in range(2))
    assert whole is not None and torn is not None
    with (tmp_path / "ring-0").open("r+b") as file:
        file.seek(torn.offset + torn.length - BLOCK)
        file.write(bytes(BLOCK))
    assert recover(tmp_path, spool) == 1
    assert (spool / whole.path).exists() and not (spool / torn.path).exists()


def test_a_failing_disk_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the sync fails the sender must hear of it, and the ring goes on."""
    (tmp_path / "spool").mkdir()
    ring = Journal(tmp_path / "ring-0", SIZE, tmp_path / "spool")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            ring.append(*instance(random.Random(4), BLOCK))
    assert ring.append(*instance(random.Random(5), BLOCK)) is not None


@pytest.mark.parametrize("path", ["../../etc/passwd", "RELAY/20260102/03/../../../../x.dcm", "RELAY/20260102/03/x.dcm",
                                  "/RELAY/20260102/03/" + 64 * "0" + ".dcm"])
def test_a_record_in_somebodys_pixels_names_no_place_of_its_choice(tmp_path: Path, path: str) -> None:
    """Records are found by their look, and pixels may look like one; what they could do is what a sender may do."""
    spool = tmp_path / "deep" / "down" / "here" / "spool"
    spool.mkdir(parents=True)
    ring = Journal(tmp_path / "ring-0", SIZE, spool)
    forged = ring.append(path, hashlib.sha256(b"data").digest(), [b"header", b"data"])
    assert forged is not None
    before = sorted(tmp_path.rglob("*"))
    assert recover(tmp_path, spool) == 0
    assert sorted(tmp_path.rglob("*")) == before
