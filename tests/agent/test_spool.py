"""The spool without a journal: what is committed is there under the name of its content, what is aborted is not."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent import spool as spool_module
from relay_agent.spool import PARTIAL, SpaceShort, Spool, Stored

HEADER = b"header"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", 0)


def put(spool: Spool, *fragments: bytes, receiver: str = "RELAY") -> Stored:
    incoming = spool.begin(receiver, HEADER)
    for fragment in fragments:
        incoming.write(fragment)
    return incoming.commit()


def there(spool: Spool) -> list[str]:
    return [path for path, _ in spool.files()]


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=300), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_bytes_in_are_bytes_out_however_they_are_cut(fragments: list[bytes], groups: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder), 0)
        incoming = spool.begin("RELAY", HEADER)
        rest = list(fragments)
        for count in groups:  # several fragments in one call
            incoming.write(*(memoryview(bytearray(part)) for part in rest[:count]))
            rest = rest[count:]
        for part in rest:
            incoming.write(part)
        stored = incoming.commit()
        content, data_set = (spool.folder / stored.path).read_bytes(), b"".join(fragments)
        assert content == HEADER + data_set
        assert stored.digest == hashlib.sha256(data_set).digest() and stored.size == len(content)
        assert there(spool) == [stored.path]


def test_more_fragments_than_one_system_call_takes(spool: Spool) -> None:
    incoming = spool.begin("RELAY", HEADER)
    incoming.write(*(bytes((number % 256,)) for number in range(3000)))
    stored = incoming.commit()
    assert (spool.folder / stored.path).read_bytes() == HEADER + bytes(number % 256 for number in range(3000))


def test_fragments_may_be_overwritten_once_write_returns(spool: Spool) -> None:
    incoming, buffer = spool.begin("RELAY", HEADER), bytearray(b"first")
    incoming.write(memoryview(buffer))
    buffer[:] = b"other"
    stored = incoming.commit()
    assert (spool.folder / stored.path).read_bytes() == HEADER + b"first"


def test_the_name_is_receiver_hour_and_digest(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_agent.spool.time.gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0)))
    stored = put(spool, b"data")
    assert stored.path == f"RELAY/20260102/03/{hashlib.sha256(b'data').hexdigest()}.dcm"


def test_nothing_is_seen_under_its_name_before_commit(spool: Spool) -> None:
    incoming = spool.begin("RELAY", HEADER)
    incoming.write(b"data")
    assert all(path.rpartition("/")[2].startswith(f"{PARTIAL}{os.getpid()}-") for path in there(spool))
    assert there(spool) != []
    incoming.commit()
    assert [path.endswith(".dcm") for path in there(spool)] == [True]


def test_content_name_and_folders_are_synced_before_commit_returns(
        spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: the content under its final name, then the folder; and every folder made on the way."""
    synced: list[str] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    stored = put(spool, b"data")
    file = spool.folder / stored.path
    folders = [str(file.parent.parent), str(file.parent.parent.parent), str(spool.folder)]
    assert set(folders) < set(synced)
    content, folder = synced[-2:]
    assert folder == str(file.parent)
    # The descriptor was opened under the partial name, which is gone by then; its content is that of the final one.
    assert content.startswith(f"{file.parent}/{PARTIAL}") and content.endswith("(deleted)")
    synced.clear()
    put(spool, b"data")
    assert synced == [str(file), str(file.parent)]  # the copy that is already there is the one that is promised


def test_what_cannot_be_synced_is_not_promised_and_leaves_nothing(
        spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    incoming = spool.begin("RELAY", HEADER)
    incoming.write(b"data")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        incoming.commit()
    assert there(spool) == []


def test_a_failing_repeat_does_not_take_the_first_copy_away(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = put(spool, b"data")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        put(spool, b"data")
    assert there(spool) == [stored.path]


def test_a_name_that_is_taken_away_again_is_nobodys_promise(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fails to sync its folder while a second one, with the same bytes, has found its file."""
    sync_folder, found, kept = spool_module.sync_folder, threading.Event(), []
    second = threading.Thread(target=lambda: kept.append(put(spool, b"data")))

    def failing(folder: str) -> None:
        if threading.current_thread() is second:
            sync_folder(folder)
            return
        second.start()
        assert found.wait(60)
        second.join(0.5)  # would be long enough to promise what goes away now
        raise OSError(5, "Input/output error")

    def watch(path: str, *arguments: int) -> int:
        if threading.current_thread() is second and path.endswith(".dcm"):
            found.set()
        return os_open(path, *arguments)

    os_open = os.open
    (spool.folder / put(spool, b"other").path).unlink()  # its folders are made
    monkeypatch.setattr(os, "open", watch)
    monkeypatch.setattr(spool_module, "sync_folder", failing)
    with pytest.raises(OSError, match="Input/output"):
        put(spool, b"data")
    second.join(60)
    assert there(spool) == [stored.path for stored in kept] and len(kept) == 1
    assert (spool.folder / kept[0].path).read_bytes() == HEADER + b"data"


@pytest.mark.parametrize("fragments", [[], [b"some"], [b"some", b"more"]])
def test_nothing_is_left_of_an_aborted_one(spool: Spool, fragments: list[bytes]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    incoming = spool.begin("RELAY", HEADER)
    for fragment in fragments:
        incoming.write(fragment)
    incoming.abort()
    assert there(spool) == [] and len(os.listdir("/proc/self/fd")) == before


def test_the_same_bytes_twice_within_the_hour_are_one_file(spool: Spool) -> None:
    first = put(spool, b"data")
    inode = (spool.folder / first.path).stat().st_ino
    assert put(spool, b"da", b"ta") == first
    assert there(spool) == [first.path] and (spool.folder / first.path).stat().st_ino == inode


def test_receivers_and_hours_keep_their_own_copies(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {put(spool, b"data").path, put(spool, b"data", receiver="OTHER").path}
    now = time.gmtime(time.time() + 3600)
    monkeypatch.setattr("relay_agent.spool.time.gmtime", lambda: now)
    paths.add(put(spool, b"data").path)
    assert len(paths) == 3 and set(there(spool)) == paths


def test_below_the_reserve_nothing_is_begun(spool: Spool) -> None:
    spool.reserve = 2**63
    with pytest.raises(SpaceShort):
        spool.begin("RELAY", HEADER)
    assert there(spool) == []


def test_a_large_object_that_runs_into_the_reserve_is_given_up(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_agent.spool._CHECK_EVERY", 1000)
    monkeypatch.setattr("relay_agent.spool._LOOK_AGAIN", 0.0)
    incoming = spool.begin("RELAY", HEADER)
    incoming.write(bytes(1500))
    spool.reserve = 2**63
    incoming.write(b"x")  # not looked at each time
    with pytest.raises(SpaceShort):
        incoming.write(bytes(1500))
    incoming.abort()
    assert there(spool) == []


def test_removing_leaves_no_empty_folders_and_does_not_mind_what_is_gone(spool: Spool) -> None:
    one, two = put(spool, b"one"), put(spool, b"two", receiver="OTHER")
    spool.remove([one.path, one.path, "RELAY/20200101/00/gone.dcm"])
    assert there(spool) == [two.path]
    assert not (spool.folder / one.path).parent.exists()


@pytest.mark.slow
def test_a_folder_that_purge_takes_away_is_made_again(spool: Spool) -> None:
    """Writers and purge work on the same folders at the same time; no writer may fail by that."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def sweep() -> None:
        while not stop.is_set():
            with suppress(OSError):  # the writer takes folders away as well
                for day in spool.folder.glob("*/*"):
                    for folder in (*day.iterdir(), day):
                        with suppress(OSError):
                            folder.rmdir()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(150):
            stored = put(spool, number.to_bytes(4, "big"))
            assert (spool.folder / stored.path).read_bytes() == HEADER + number.to_bytes(4, "big")
            spool.remove([stored.path])
    except BaseException as error:  # shown after the sweeper has stopped
        failures.append(error)
    stop.set()
    sweeper.join()
    assert failures == []
