"""Objects and moments that were made to get something past de-identification, or to stop it."""

from __future__ import annotations

import hashlib
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from relay_agent import dicom, review
from relay_agent.dataset import EXPLICIT, PIXELS, Dataset, element_head
from relay_agent.deidentify import make as making
from relay_agent.deidentify import work
from relay_agent.deidentify.make import Made, Numbers, Refusal, Task
from relay_agent.deidentify.recipe import Recipe, Step
from relay_agent.deidentify.work import Deidentifier
from relay_agent.ledger import State, balance
from relay_agent.route import apply, decide
from tests.agent.box import MR, SETTINGS, Box, Image
from tests.agent.test_stage import sort_all
from tests.harness import wait_for

SCRIPT = '''version "6.6"
(0010,0010) := subject
(0008,0018) := hashUID[(0008,0018)]
(0020,000D) := hashUID[(0020,000D)]
(0020,000E) := hashUID[(0020,000E)]
'''
NAME = b"PLANTED^NAME"
END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def element(tag: int, vr: str, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return element_head(tag, vr, len(value), EXPLICIT) + value


def item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def image(extra: bytes = b"", at: int = 0x00200012) -> bytes:
    """A data set with more bytes at the place of an element."""
    data = Dataset()
    for tag, text in ((0x00080016, MR), (0x00080018, "1.2.3.1.1"), (0x00080060, "MR"),
                      (0x00100010, NAME.decode()), (0x0020000D, "1.2.3"), (0x0020000E, "1.2.3.1"), (0x00200013, "1")):
        data.put_text(tag, text)
    encoded = [(element.tag, b"".join(_one(element.tag, element.vr, element.value))) for element in data]
    return b"".join(part for _, part in sorted([*encoded, (at, extra)]))


def _one(tag: int, vr: str, value: bytes) -> tuple[bytes, bytes]:
    return element_head(tag, vr, len(value), EXPLICIT), value


def made(folder: Path, data_set: bytes, script: str = SCRIPT, syntax: str = "1.2.840.10008.1.2.1"
         ) -> tuple[Made | Refusal, bytes]:
    """What becomes of a data set, and the bytes that would leave."""
    source, target = folder / "in.dcm", folder / "out.dcm"
    source.write_bytes(dicom.file_header(MR, "1.2.3.1.1", syntax, "A", "B") + data_set)
    recipe = Recipe((Step("p.das", script),), (), "P1", "S1", "S1_MR1", (), ())
    task = Task(1, hashlib.sha256(data_set).digest(), source, target)
    result = making.make(recipe, b"key", Numbers(folder / "ledger", b"key"), datetime(2026, 1, 2), task)
    return result, target.read_bytes() if isinstance(result, Made) else b""


HIDDEN = {
    "behind the end of a sequence's items": (0x00081140, element(0x00081140, "SQ", END + NAME)),
    "in the fragments of a value that is no image": (
        0x00189005, struct.pack("<HH2sHI", 0x0018, 0x9005, b"OB", 0, 0xFFFFFFFF) + item(NAME) + END),
    "as text beside the pixels": (PIXELS, element(0x7FE00099, "LO", NAME)),
    "behind the pixels": (PIXELS, b"".join((
        element(0x00280002, "US", b"\1\0"), element(0x00280010, "US", b"\4\0"), element(0x00280011, "US", b"\4\0"),
        element(0x00280100, "US", b"\x10\0"), element(PIXELS, "OW", bytes(32) + NAME)))),
    "as UTF-16 in a text": (0x00204000, element(0x00204000, "LT", "Planted".encode("utf-16-le"))),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_a_name_in_a_place_that_nobody_sees_is_found(tmp_path: Path, place: str) -> None:
    at, extra = HIDDEN[place]
    result, _ = made(tmp_path, image(extra, at))
    assert isinstance(result, Refusal) and not result.rejected and not result.damaged
    assert "PLANTED" not in result.why.upper()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_of_an_element_that_is_there_twice_only_the_one_that_is_seen_goes_on(tmp_path: Path, depth: int) -> None:
    """The first was no part of what scripts and search saw, and was copied with the item that nobody changed."""
    extra = element(0x00081030, "LO", NAME) + element(0x00081030, "LO", b"BRAIN")
    for _ in range(depth):
        extra = element(0x00081140, "SQ", item(extra))
    result, out = made(tmp_path, image(extra, 0x00081030))
    assert isinstance(result, Made), result
    assert b"PLANTED" not in out and b"BRAIN" in out


def test_a_deflated_data_set_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """Cut at the end of an element, it would pass for all there was."""
    packer = zlib.compressobj(wbits=-15)
    whole = packer.compress(image()) + packer.flush(zlib.Z_SYNC_FLUSH)
    result, _ = made(tmp_path, whole, syntax="1.2.840.10008.1.2.1.99")
    assert isinstance(result, Refusal) and "ends too early" in result.why


@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2 3", "1." + "2" * 64])
@pytest.mark.parametrize("tag", ["(0008,0018)", "(0020,000d)", "(0020,000e)"])
def test_a_script_that_makes_no_uid_of_a_uid_fails(tmp_path: Path, tag: str, uid: str) -> None:
    result, _ = made(tmp_path, image(), SCRIPT + f'{tag} := "{uid}"\n')
    assert isinstance(result, Refusal) and tag in result.why and "no UID" in result.why


def test_a_fault_of_ours_refuses_the_instance_and_quotes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    """Raised, it was tried again for ever, and no other shipment was ever de-identified."""
    def fails(*_: object) -> None:
        raise KeyError(NAME.decode())

    monkeypatch.setattr(making, "deidentify", fails)
    result, _ = made(tmp_path, image())
    assert isinstance(result, Refusal) and "KeyError at test_hostile.py" in result.why
    assert "PLANTED" not in result.why


def test_a_full_disk_is_no_verdict_about_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making.File, "write", full)
    with pytest.raises(OSError, match="No space"):
        made(tmp_path, image())


# ------------------------------------------------------------------------------------------------ processes


CHILD = """
import multiprocessing, os, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from relay_agent.deidentify.work import confine

def noisy():
    warnings.warn_explicit("value 'PLANTED'", UserWarning, "pydicom/valuerep.py", 1)
    return os.getpid()

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), confine, (Path(sys.argv[1]), "debug"))
    print(pool.submit(noisy).result(), flush=True)
    time.sleep(60)
"""


def test_child_processes_quote_no_value_and_do_not_outlive_the_worker(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout and process.stderr
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: _is_gone(child), 10)
        assert "PLANTED" not in process.stderr.read()


def _is_gone(process: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True


# ------------------------------------------------------------------------------------------------ the thread


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A box whose shipment 1, with two series, has to be de-identified; the work is done in this process."""
    (tmp_path / "p1.das").write_text(SCRIPT, encoding="utf-8")
    found = Box(tmp_path / "box", SETTINGS + f'scripts = ["{tmp_path / "p1.das"}"]\n[deidentify]\nprocesses = 1\n')
    found.receive(Image(), Image(sop="1.2.3.2.1", series="1.2.3.2"))
    sort_all(found)
    found.move(1, State.COMPLETE)
    apply(found.ledger, 1, decide(found.config, found.ledger, found.spool, 1))
    assert found.state() == State.DEIDENTIFY
    return found


def deidentifier(box: Box) -> Deidentifier:
    return Deidentifier(box.config, box.ledger, threading.Event())


def test_a_process_that_was_killed_once_is_tried_once_more(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that is short of memory kills an innocent process; an image that kills its decoder does it again."""
    one = deidentifier(box)

    def killed(*_: object) -> list[Refusal]:
        raise BrokenProcessPool

    monkeypatch.setattr(one, "_make", killed)
    assert one.step() and box.state() == State.DEIDENTIFY
    assert one.step() and box.state() == State.HELD
    assert "ended abnormally" in box.ledger.value("SELECT reason FROM shipment")


def test_a_ledger_that_cannot_be_written_at_the_start_does_not_end_the_thread(box: Box, monkeypatch: pytest.MonkeyPatch
                                                                              ) -> None:
    one = deidentifier(box)
    tried = []

    def begin() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(one, "_begin", begin)
    monkeypatch.setattr(one._stop, "wait", lambda _: None)
    monkeypatch.setattr(one, "step", lambda: one._stop.set() or True)
    one.run()
    assert len(tried) == 2


def test_what_a_person_does_meanwhile_stands(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assigned anew while the scripts run: what they made or rejected under the old labels counts for nothing."""
    one = deidentifier(box)
    numbers = [row["id"] for row in box.ledger.all("SELECT id FROM instance")]

    def slow(*_: object) -> list[Refusal]:
        review.assign(box.config, box.ledger, 1, "jane", subject="S2")
        assert apply(box.ledger, 1, decide(box.config, box.ledger, box.spool, 1))
        return [Refusal(numbers[0], "rejected by the script", True)]

    monkeypatch.setattr(one, "_make", slow)
    one.step()
    assert box.state() == State.DEIDENTIFY and box.ledger.value("SELECT count(*) FROM shipment") == 1
    assert balance(box.ledger).difference == 0


def test_what_was_set_apart_meanwhile_is_not_made_a_part_again(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    one = deidentifier(box)
    keep, numbers = one._keep, [row["id"] for row in box.ledger.all("SELECT id FROM instance ORDER BY id")]

    def late(shipment: int, results: list[Made]) -> None:
        box.move(1, State.HELD)
        review.exclude(box.ledger, 1, ["1.2.3.2"], "jane", "a screen capture")
        keep(shipment, results)

    monkeypatch.setattr(one, "_keep", late)
    one.step()
    assert [row["instance"] for row in box.ledger.all("SELECT instance FROM made WHERE shipment = 1")] == numbers[:1]


def test_nothing_is_still_writing_when_a_round_has_failed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next round's files are deleted and written once more behind its back."""
    monkeypatch.setattr(work, "_BATCH", 1)
    one = deidentifier(box)
    running: list[bool] = []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def waited(futures: list[object]) -> None:
        real(futures)
        running.extend(future.running() for future in futures)  # type: ignore[attr-defined]

    real = work.wait
    monkeypatch.setattr(work, "wait", waited)
    monkeypatch.setattr(one, "_keep", full)
    with pytest.raises(OSError, match="No space"):
        one.step()
    assert running == [False, False]


def again(box: Box) -> None:
    """What the worker does with what is complete."""
    for row in box.ledger.all("SELECT id FROM shipment WHERE state IN ('gathering', 'complete') ORDER BY id"):
        box.move(row["id"], State.COMPLETE)
        apply(box.ledger, row["id"], decide(box.config, box.ledger, box.spool, row["id"]))


def test_a_shipment_that_cannot_be_worked_on_does_not_hold_up_the_others(box: Box, monkeypatch: pytest.MonkeyPatch
                                                                         ) -> None:
    """One object of 20 GB and a disk with room for 10."""
    box.receive(Image(study="9", sop="9.1"))
    box.receive(Image(study="8", sop="8.1"))
    sort_all(box)
    again(box)
    one, tried = deidentifier(box), []

    def make(row: sqlite3.Row, *_: object) -> list[Refusal]:
        tried.append(row["id"])
        if row["id"] < 3:
            raise OSError(28, "No space left on device")
        return []

    monkeypatch.setattr(one, "_make", make)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            one.step()
    one.step()
    with pytest.raises(OSError, match="No space"):
        one.step()
    assert tried == [1, 2, 3, 1] and box.state(3) == State.COMPLETE


def work_all(box: Box) -> None:
    one = deidentifier(box)
    with ThreadPoolExecutor(1) as one._pool:  # processes, which other tests here look at, take half a second to start
        while one.step():
            pass
    again(box)


def test_a_supplement_whose_uids_would_overwrite_what_was_delivered_is_held(box: Box, tmp_path: Path) -> None:
    (tmp_path / "p1.das").write_text(SCRIPT + '(0008,0018) := "1.2.3.4.5"\n', encoding="utf-8")
    box.receive(Image(study="9", sop="9.1"))
    sort_all(box)
    box.receive(Image(study="9", sop="9.1", version=2))  # a newer version: it may, and has to, overwrite the other
    sort_all(box)
    box.move(1, State.REJECTED)
    again(box)
    work_all(box)
    box.receive(Image(study="9", sop="9.2"))
    sort_all(box)
    again(box)
    work_all(box)
    assert [box.state(number) for number in (2, 3, 4)] == [State.READY, State.READY, State.HELD]
    assert "overwrite each other" in box.ledger.value("SELECT reason FROM shipment WHERE id = 4")


def test_retrying_does_not_get_a_set_past_that_would_overwrite_itself(box: Box, tmp_path: Path) -> None:
    """It was looked at once, right after it was made; then it counted as made."""
    (tmp_path / "p1.das").write_text(SCRIPT + '(0008,0018) := "1.2.3.4.5"\n', encoding="utf-8")
    work_all(box)
    for _ in range(2):
        assert box.state() == State.HELD
        review.retry(box.ledger, 1, "jane")
        again(box)
    (tmp_path / "p1.das").write_text(SCRIPT, encoding="utf-8")
    review.retry(box.ledger, 1, "jane")
    again(box)
    work_all(box)
    assert box.state() == State.READY


def test_a_power_cut_does_not_take_the_key_of_what_may_have_been_sent(box: Box, tmp_path: Path) -> None:
    """It takes the ledger's write-ahead log; another key would give what was sent already other UIDs."""
    work_all(box)
    shutil.copy(box.ledger.path, tmp_path / "after.db")
    with closing(sqlite3.connect(tmp_path / "after.db")) as after:
        left = after.execute("SELECT value FROM secret").fetchall()
    assert [bytes(row["value"]) for row in box.ledger.all("SELECT value FROM secret")] == [row[0] for row in left]
