"""Staging: every instance in exactly one shipment, in an order that never lets the newer overtake the older."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent import dicom, stage
from relay_agent.book import missing_files, reconcile
from relay_agent.ledger import State, balance
from relay_agent.spool import PARTIAL
from relay_agent.stage import Landing, Stager, take_in
from tests.agent.box import SETTINGS, Box, Image

QUIET, LONGEST = 300.0, 43200.0


def sort_all(box: Box) -> None:
    stager = Stager(box.config, box.ledger, box.spool)
    while stager.sort():
        pass


# Grouping

IMAGES = st.builds(lambda study, number, version: Image(
    study=f"2.{study}", series=f"2.{study}.{number % 2}", sop=f"2.{study}.{number % 2}.{number}", version=version),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
EVENTS = st.lists(st.tuples(st.sampled_from(["RELAY", "OTHER"]), IMAGES) | st.sampled_from(["sort", "end", "deliver"]),
                  min_size=1, max_size=25)


@pytest.mark.slow
@settings(max_examples=40)
@given(EVENTS)
def test_any_interleaving_of_anything_is_sorted_in_order(events: list[tuple[str, Image] | str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder))
        arrived: Counter[tuple[str, Image]] = Counter()
        ended: dict[int, set[int]] = {}  # what was in each shipment when its gathering ended
        for event in events:
            if event == "sort":
                Stager(box.config, box.ledger, box.spool).sort()
            elif isinstance(event, str):
                state = State.COMPLETE if event == "end" else State.DELIVERED
                for row in box.ledger.all("SELECT id FROM shipment WHERE state = 'gathering'"):
                    box.move(row["id"], state)
                    ended[row["id"]] = {r["id"] for r in box.ledger.all("SELECT id FROM instance WHERE shipment = ?",
                                                                        row["id"])}
            else:
                receiver, image = event
                arrived[event] += 1
                box.receive(image, receiver=receiver)
        sort_all(box)

        rows = box.ledger.all("SELECT i.*, s.study_uid, s.receiver AS whose, s.supplement FROM instance i JOIN "
                              "shipment s ON s.id = i.shipment ORDER BY i.id")
        # Every instance is exactly once in a shipment of its study and receiver, with its bytes.
        found = Counter()
        for row in rows:
            assert row["whose"] == row["receiver"]
            image = next(image for receiver, image in arrived if receiver == row["receiver"]
                         and (box.spool.folder / row["path"]).read_bytes().endswith(image.data_set()))
            assert (row["study_uid"], row["series_uid"], row["sop_instance"]) == (image.study, image.series, image.sop)
            found[row["receiver"], image] += row["copies"]
        assert found == arrived and len(rows) == len(arrived)
        # One base and its supplements, numbered without gaps.
        for group in box.ledger.all("SELECT count(*) AS n, max(supplement) AS last FROM shipment "
                                    "GROUP BY study_uid, receiver"):
            assert group["last"] == group["n"] - 1
        # Versions of one instance are in different shipments, the newer never in an earlier one.
        first: dict[tuple[str, str], int] = {}
        last: dict[tuple[str, str], int] = {}
        for row in rows:
            key = row["receiver"], row["sop_instance"]
            assert row["conflict"] == first.get(key)
            assert row["supplement"] > last.get(key, -1)
            first.setdefault(key, row["id"])
            last[key] = row["supplement"]
        # Nothing joins a shipment after its gathering has ended, and nothing leaves one.
        for shipment, members in ended.items():
            assert {row["id"] for row in rows if row["shipment"] == shipment} == members
        assert balance(box.ledger).difference == 0
        # Without an end in between there are no more shipments than versions.
        if not ended:
            for (study, receiver), count in Counter((r["study_uid"], r["receiver"]) for r in box.ledger.all(
                    "SELECT study_uid, receiver FROM shipment")).items():
                versions = Counter(image.sop for whose, image in arrived if (whose, image.study) == (receiver, study))
                assert count == max(versions.values())


def test_more_than_a_batch_is_sorted_in_several_rounds(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_agent.stage._BATCH", 3)
    box.receive(*(Image(sop=f"1.2.{number}") for number in range(7)))
    stager = Stager(box.config, box.ledger, box.spool)
    assert [stager.sort() for _ in range(4)] == [3, 3, 1, 0]
    assert box.ledger.value("SELECT instances FROM shipment") == 7


def quarantined(box: Box) -> list[str]:
    return [row[0] for row in box.ledger.all("SELECT problem FROM instance WHERE problem IS NOT NULL")]


def test_what_cannot_be_sorted_is_quarantined_and_does_not_stop_the_rest(box: Box) -> None:
    def put(content: bytes, sop: str) -> None:
        incoming = box.spool.begin("RELAY", b"")
        incoming.write(content)
        box.row(incoming.commit(), sop)

    put(b"no DICOM at all", "1.1")
    put(Image(sop="1.3").file(), "1.4")
    put(Image(sop="1.5", study="").file(), "1.5")
    put(Image(sop="1.6").file(), "1.6")
    box.receive(Image(sop="1.7"))
    (box.spool.folder / box.ledger.value("SELECT path FROM instance WHERE sop_instance = '1.6'")).unlink()
    sort_all(box)
    found = quarantined(box)
    assert any("no DICOM preamble" in problem for problem in found)
    assert any("not the one it was sent under" in problem for problem in found)
    assert any("no Study Instance UID" in problem for problem in found)
    assert any("the file cannot be read (No such file" in problem for problem in found)
    assert box.ledger.value("SELECT count(*) FROM instance WHERE sop_instance = '1.7' AND shipment IS NOT NULL") == 1
    assert balance(box.ledger).quarantined == len(found)


@pytest.mark.filterwarnings("ignore:.* for VR UI")
@pytest.mark.parametrize("uid", ["1/2", "../1.2", "1.2 3", "1.2\\1.3", "1" * 65, "ä"])
@pytest.mark.parametrize("field", ["study", "series", "sop"])
def test_what_is_no_uid_does_not_travel_as_a_name(box: Box, field: str, uid: str) -> None:
    file = box.folder / "file.dcm"
    file.write_bytes(replace(Image(), **{field: uid}).file())
    assert take_in(file, "RELAY", box.spool, box.ledger, "upload") is None
    sort_all(box)
    assert "Instance UID in the data set is not a UID" in quarantined(box)[0]


# The end of gathering


class Gathering:
    """A box with one shipment, and the time as it is told to the stager."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.stager = Stager(box.config, box.ledger, box.spool)
        self.association("open")

    def association(self, what: str) -> None:
        with self.box.ledger.write() as connection:
            if what == "open":
                connection.execute("INSERT INTO association (id, receiver, calling_ae, peer, opened, process) "
                                   "VALUES (7, 'RELAY', 'S', '127.0.0.1', 0, 1)")
            else:
                connection.execute("UPDATE association SET closed = 1, ended = 'released' WHERE id = 7")

    def arrive(self, number: int, association: int = 0) -> None:
        self.box.receive(Image(sop=f"1.{number}"), association=association)
        self.stager.sort()

    def at(self, *moments: float) -> list[int]:
        return [self.stager.complete(moment) for moment in moments]


@pytest.fixture
def gathering(box: Box) -> Gathering:
    return Gathering(box)


def test_a_session_is_complete_when_it_was_quiet(gathering: Gathering) -> None:
    gathering.arrive(1)
    assert gathering.at(0, QUIET - 1) == [0, 0]
    assert gathering.box.state() == State.GATHERING
    assert gathering.at(QUIET, QUIET) == [1, 0]
    assert gathering.box.state() == State.COMPLETE


def test_every_arrival_starts_the_wait_again_and_a_repeat_does_not(gathering: Gathering) -> None:
    gathering.arrive(1)
    assert gathering.at(0) == [0]
    gathering.arrive(2)
    assert gathering.at(QUIET - 1, QUIET, 2 * QUIET - 2) == [0, 0, 0]
    gathering.arrive(2)
    assert gathering.at(2 * QUIET - 1) == [1]


def test_an_open_association_keeps_its_session_open_and_no_other(gathering: Gathering) -> None:
    gathering.arrive(1, association=7)
    gathering.box.receive(Image(study="9", sop="9.1"))
    gathering.stager.sort()
    assert gathering.at(0, QUIET, 10 * QUIET) == [0, 1, 0]
    assert (gathering.box.state(1), gathering.box.state(2)) == (State.GATHERING, State.COMPLETE)
    gathering.association("close")
    assert gathering.at(10 * QUIET) == [1]


def test_after_the_longest_time_nothing_is_waited_for(gathering: Gathering) -> None:
    gathering.arrive(1, association=7)
    assert gathering.at(0, LONGEST - 60, LONGEST) == [0, 0, 1]
    assert gathering.box.ledger.value("SELECT what FROM event ORDER BY id DESC") == \
        "complete: gathered for the longest time"


@pytest.mark.parametrize("jump", [-86400 * 365, -3600, 3600, 86400 * 365])
def test_a_clock_that_jumps_changes_nothing(gathering: Gathering, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    gathering.arrive(1)
    assert gathering.at(0) == [0]
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    assert gathering.at(QUIET - 1) == [0]
    gathering.arrive(2)
    assert gathering.at(QUIET, 2 * QUIET - 1, 2 * QUIET) == [0, 0, 1]


def test_a_restart_starts_the_wait_again_and_remembers_the_age(gathering: Gathering) -> None:
    gathering.arrive(1)
    with gathering.box.ledger.write() as connection:
        connection.execute("UPDATE shipment SET opened = ?", (time.time() - LONGEST + 2 * QUIET,))
    gathering.stager = Stager(gathering.box.config, gathering.box.ledger, gathering.box.spool)
    assert gathering.at(5000, 5000 + QUIET - 1) == [0, 0]
    gathering.arrive(2, association=7)
    assert gathering.at(5000 + QUIET, 5000 + 2 * QUIET - 1, 5000 + 2 * QUIET + 1) == [0, 0, 1]
    assert "longest" in gathering.box.ledger.value("SELECT what FROM event ORDER BY id DESC")


def test_a_supplement_is_not_complete_before_what_it_adds_to(gathering: Gathering) -> None:
    """It would be held, as nobody knows yet where its session goes, and then wait for a person."""
    gathering.arrive(1)
    gathering.box.receive(Image(sop="1.1", version=1))
    gathering.stager.sort()
    assert gathering.box.ledger.value("SELECT count(*) FROM shipment") == 2
    assert gathering.at(0) == [0]
    gathering.arrive(2)  # joins the first
    assert gathering.at(QUIET / 2, QUIET) == [0, 0]
    assert gathering.at(2 * QUIET) == [2]
    assert (gathering.box.state(1), gathering.box.state(2)) == (State.COMPLETE, State.COMPLETE)


# What a crash leaves


def test_a_file_without_a_row_is_entered_and_sorted(box: Box) -> None:
    box.receive(Image(sop="1.1"))
    incoming = box.spool.begin("RELAY", Image(sop="1.2").file()[:-len(Image(sop="1.2").data_set())])
    incoming.write(Image(sop="1.2").data_set())
    incoming.commit()
    assert [reconcile(box.ledger, box.spool, box.config) for _ in range(2)] == [1, 0]
    sort_all(box)
    row = box.ledger.one("SELECT * FROM instance WHERE sop_instance = '1.2'")
    assert row is not None and row["shipment"] and (row["via"], row["calling_ae"]) == ("recovered", "SCANNER")


def test_a_file_that_was_cut_off_is_removed_and_told_of(box: Box) -> None:
    incoming = box.spool.begin("RELAY", Image().file()[:-len(Image().data_set())])
    incoming.write(Image().data_set())
    path = incoming.commit().path
    os.truncate(box.spool.folder / path, len(Image().file()) - 20)
    assert reconcile(box.ledger, box.spool, box.config) == 0
    assert not (box.spool.folder / path).exists() and balance(box.ledger).received == 0
    assert "cut off" in box.ledger.value("SELECT what FROM event")


def test_partial_files_go_with_their_process(box: Box) -> None:
    folder = box.spool.folder / "RELAY" / "20260101" / "00"
    folder.mkdir(parents=True)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True,
                          check=True).stdout.strip()
    for name in (f"{gone}-aa", f"{os.getpid()}-bb", "1-cc", "word-dd"):
        (folder / f"{PARTIAL}{name}").touch()
    reconcile(box.ledger, box.spool, box.config)
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{PARTIAL}{os.getpid()}-bb", f"{PARTIAL}1-cc"])


def test_a_lost_file_is_noticed_and_a_repeat_takes_its_place(box: Box) -> None:
    box.receive(Image())
    path = box.spool.folder / box.ledger.value("SELECT path FROM instance")
    assert missing_files(box.ledger, box.spool) == []
    path.unlink()
    assert missing_files(box.ledger, box.spool) == [1]
    box.receive(Image())
    assert missing_files(box.ledger, box.spool) == []
    assert box.ledger.value("SELECT copies FROM instance") == 2


def test_the_copy_of_another_hour_is_surplus(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.receive(Image())
    later = time.gmtime(time.time() + 7200)
    monkeypatch.setattr("relay_agent.spool.time.gmtime", lambda: later)
    box.receive(Image())
    assert [path for path, _ in box.spool.files()] == [box.ledger.value("SELECT path FROM instance")]


def test_what_was_purged_is_not_kept_when_it_is_sent_again(box: Box) -> None:
    box.receive(Image())
    box.spool.remove([box.ledger.value("SELECT path FROM instance")])
    with box.ledger.write() as connection:
        connection.execute("UPDATE instance SET purged = 1, path = 'RELAY/20200101/00/x.dcm'")
    box.receive(Image())
    assert list(box.spool.files()) == [] and balance(box.ledger).received == 1


# By hand and from the landing directory


@pytest.mark.parametrize(("content", "problem"), [
    (Image().file(), None), (b"text", "preamble"), (b"", "preamble"),
    (bytes(128) + b"DICM" + b"\xff" * 40, "cannot be used"),
    (dicom.file_header(dicom.DICOMDIR, "1.2", "1.2.840.10008.1.2.1", "S", "R"), "DICOMDIR")])
def test_files_are_taken_in_or_quarantined_and_never_changed(box: Box, content: bytes, problem: str | None) -> None:
    file = box.folder / "file"
    file.write_bytes(content)
    told = take_in(file, "RELAY", box.spool, box.ledger, "upload")
    assert (told is None) == (problem is None) and (problem or "") in (told or "")
    row = box.ledger.one("SELECT path, problem FROM instance")
    assert row is not None and row["problem"] == told
    assert (box.spool.folder / row["path"]).read_bytes() == file.read_bytes() == content


def test_the_landing_directory_is_emptied_when_its_files_stopped_growing(tmp_path: Path) -> None:
    box = Box(tmp_path, SETTINGS + '[stage]\nlanding_stable = "30 s"\n')
    landing = Landing(box.config, box.ledger, box.spool)
    try:
        folder = box.config.landing / "RELAY" / "visit 1"
        folder.mkdir()
        (folder / "a.dcm").write_bytes(Image().file()[:100])
        landing.touched.set()
        assert landing.scan(lambda: 0) == 0
        (folder / "a.dcm").write_bytes(Image().file())  # it grows: the wait starts again
        assert [landing.scan(lambda now=now: now) for now in (29.0, 58.0)] == [0, 0]
        assert landing.scan(lambda: 60.0) == 1
        assert box.ledger.value("SELECT via FROM instance") == "landing"
        assert list(box.config.landing.rglob("*")) == [box.config.landing / "RELAY"]
    finally:
        landing.close()


def test_what_cannot_be_taken_in_is_trouble_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, SETTINGS + '[stage]\nlanding_stable = "1 s"\nrescan = "1 s"\n')
    landing = Landing(box.config, box.ledger, box.spool)

    def refused(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    try:
        for name in ("Doe^John.dcm", "Doe^Jane.dcm", "Roe.dcm"):
            (box.config.landing / name).write_bytes(Image(sop=f"1.2.{len(name)}").file())
        with monkeypatch.context() as patch:
            patch.setattr(stage, "take_in", refused)
            assert [landing.scan(lambda now=now: now) for now in (0.0, 2.0)] == [0, 0]
        assert landing.trouble == "3 × Permission denied"
        (box.config.landing / "Roe.dcm").unlink()
        again = time.monotonic() + 10
        assert landing.scan(lambda: again) == 2 and landing.trouble == ""
        with monkeypatch.context() as patch:  # a folder that cannot be read; root could
            patch.setattr(os, "walk", lambda top, onerror: onerror(PermissionError(13, "Permission denied", "x")) or [])
            landing.scan(lambda: again + 20)
        assert landing.trouble == "1 × Permission denied"
        landing.scan(lambda: again + 30)
        assert landing.trouble == ""
    finally:
        landing.close()


def test_links_in_the_landing_directory_are_not_followed(box: Box) -> None:
    landing = Landing(box.config, box.ledger, box.spool)
    try:
        (box.folder / "elsewhere.dcm").write_bytes(Image().file())
        (box.config.landing / "link.dcm").symlink_to(box.folder / "elsewhere.dcm")
        assert [landing.scan(lambda now=now: now) for now in (0.0, 100.0, 200.0)] == [0, 0, 0]
        assert (box.folder / "elsewhere.dcm").exists()
    finally:
        landing.close()
