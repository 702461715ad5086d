"""An exam with its raw data on the whole path: both arrive in one session, de-identified, matched, with receipts."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from pydicom import dcmread

from relay_agent import receipt
from relay_agent.kspace import facts, join, match
from relay_agent.kspace.twix import Verdict, check
from relay_agent.ledger import State, balance
from relay_agent.purge import purge
from relay_agent.spool import Spool
from tests import data
from tests.central import Central
from tests.delivery.box import IMPORT, SOON, Box, Pair, archived_files, everything, site, to
from tests.harness import Agent, wait_for
from tests.kspace.path import exam
from tests.kspace.synthetic import PERSON, File, Scan, build, parts

WHOLE = {"kspace": {"single_request": "1 GB"}}
MORE = """
[kspace]
reserve = "20 MB"
incomplete_after = "1 s"
[[kspace.source]]
name = "prisma"
"""
PROFILE = {"scripts": ["ps3.15"], "headers": {"0010,0010": "{subject}", "0010,0020": "{session}"}, "kspace": {
    "keep": ["age"]}}


def land(box: Box, content: bytes, name: str = "meas_MID00358.dat") -> None:
    """What a sender does that names a file when it is whole."""
    folder = box.config.kspace_landing / "prisma"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{name}").write_bytes(content)
    (folder / f".{name}").rename(folder / name)


def raw_shipment(box: Box, state: State, seconds: float = 240) -> Any:
    """Wait until the one raw shipment is in a state; its row."""
    return wait_for(lambda: box.ledger.one("SELECT s.*, r.sha256, r.score FROM shipment s JOIN raw r ON r.shipment = "
                                           "s.id WHERE s.state = ?", state), seconds,
                    f"raw {state}: {[dict(row) for row in box.ledger.all('SELECT * FROM shipment')]}")


def resource(central: Central, label: str = "KSPACE") -> Path:
    """The folder of the one resource of that label on the central's disk."""
    (folder,) = [path for path in central.store.root.rglob(label) if path.is_dir()]
    return folder


def nothing_planted(*places: Path) -> None:
    """No value of the person is in any file there."""
    looked = 0
    for place in places:
        for path in place.rglob("*"):
            if path.is_file():
                looked += 1
                content = path.read_bytes().lower()
                found = [value for value in PERSON.planted() if value.lower() in content]
                assert not found, f"{found} in {path}"
    assert looked


def test_one_exam_arrives_in_one_session(pair: Pair, tmp_path: Path) -> None:
    box, central = pair(route=PROFILE, more=MORE, destination=WHOLE)
    made = File(scans=(Scan(uid=357, readouts=3, protocol="AdjCoilSens", seed=3), Scan()))
    content = build(made)
    land(box, content)  # before its DICOM
    waiting = raw_shipment(box, State.WAITING)
    assert "no session was found" in waiting["reason"]
    images = exam()
    box.take(images)
    row = raw_shipment(box, State.DELIVERED)
    assert row["score"] == 230 and row["session"] == "S1_MR1"
    folder = resource(central)
    assert folder.relative_to(central.store.root).parts[-3:] == ("SCANS", "2", "KSPACE")
    found, beside = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".dat", ".json"))
    assert hashlib.sha256(found.read_bytes()).digest() == row["sha256"]
    assert check(found).verdict == Verdict.COMPLETE
    for begin, end in parts(made):
        assert found.read_bytes()[begin:end] == content[begin:end]
    told = json.loads(beside.read_text())
    assert (told["verdict"], told["kept"], told["protocol"]) == ("complete", ["age"], "t1_mprage")
    assert told["original"]["sha256"] == hashlib.sha256(content).hexdigest()
    nothing_planted(central.store.root)
    # What arrived still belongs together, for whoever has only that.
    dicom = archived_files(central)
    assert len(dicom) == len(images)
    said = facts.raw(found, check(found))
    again = match.match(said, facts.sessions(dicom))
    assert again.state is match.State.MATCHED
    assert {match.FRAME_EQUAL, match.ON_ITS_IMAGES} <= set(again.candidates[0].reasons)
    assert told["match"]["series"][0]["uid"] in {str(dcmread(path).SeriesInstanceUID) for path in dicom}
    # DICOM first.
    asked = [request for request in list(central.requests) if request["method"] in ("POST", "PUT")]
    imports = [number for number, one in enumerate(asked) if one["path"] == IMPORT]
    puts = [number for number, one in enumerate(asked) if "/resources/KSPACE" in one["path"]]
    assert imports and puts and max(imports) < min(puts)
    # Receipts of both; then nothing is left here.
    session = box.ledger.value("SELECT session FROM raw")
    assert len(box.proved(session)["instances"]) == len(images)
    proof = box.proved(row["id"])
    assert [one["sop_instance"] for one in proof["instances"]] == [found.name, beside.name]
    assert proof["instances"][0]["sent_sha256"] == row["sha256"].hex()
    assert proof["instances"][0]["received_data_set_sha256"] == hashlib.sha256(content).hexdigest()
    sums = box.balances()
    assert sums.delivered == len(images) + 1
    raw = box.config.kspace_deidentified
    assert purge(box.ledger, Spool(box.config.spool, 0), box.config.deidentified, retention=0.0, raw=raw) == 2
    assert not [path for path in raw.parent.rglob("*") if path.is_file()]
    box.balances()


def test_in_pieces_that_are_joined_over_there(pair: Pair, tmp_path: Path) -> None:
    box, central = pair(route=PROFILE, more=MORE, destination={"kspace": {"compression": "zstd"}})
    content = build(File(scans=(Scan(readouts=400, channels=8, samples=256),)))
    box.take(exam())
    land(box, content)
    row = raw_shipment(box, State.DELIVERED)
    nothing_planted(central.store.root)
    joined = tmp_path / "joined"
    shutil.copytree(resource(central), joined)
    assert not list(joined.rglob("*.dat")), "it came in pieces"
    assert join.main([str(joined), "--remove"]) == 0
    (arrived,) = joined.rglob("*.dat")
    assert hashlib.sha256(arrived.read_bytes()).digest() == row["sha256"]
    assert check(arrived).verdict == Verdict.COMPLETE
    assert box.proved(row["id"])["instances"][0]["sent_sha256"] == row["sha256"].hex()


def test_the_worker_is_killed_while_raw_data_are_sent(tmp_path: Path) -> None:
    chance = random.Random(11)
    content = build(File(scans=(Scan(readouts=600, channels=8, samples=256),)))
    with site(tmp_path / "central") as central:
        fast = to(central.url, tmp_path / "box", bandwidth="24 Mbit/s", part_size="1 MiB", kspace={"piece_time": "1 s"})
        agent = Agent(tmp_path / "box", fast + everything(**PROFILE) + MORE, stage=SOON)
        images = data.write(exam(), tmp_path / "medium")
        raw = tmp_path / "meas.dat"
        raw.write_bytes(content)
        assert agent.cli("upload", *map(str, images), str(raw)).returncode == 0
        ledger = agent.ledger
        try:
            for number in range(8):
                agent.start("work")
                if number == 0:
                    wait_for(lambda: ledger.value("SELECT 1 FROM delivery d JOIN shipment s ON s.id = d.shipment WHERE "
                                                  "s.kind = 'raw' AND d.sent > 0"), 120, "raw data are on their way")
                else:
                    time.sleep(chance.uniform(1.5, 4))
                agent.stop("work", kill=True)
            agent.start("work")
            agent.wait_state("delivered", len(images) + 1)
        finally:
            for service in list(agent.processes):
                agent.stop(service, kill=True)
        joined = tmp_path / "joined"
        shutil.copytree(resource(central), joined)
        join.main([str(joined), "--remove"])
        (arrived,) = joined.rglob("*.dat")
        sha256 = ledger.value("SELECT sha256 FROM raw")
        assert hashlib.sha256(arrived.read_bytes()).digest() == sha256
        assert balance(ledger).difference == 0 and balance(ledger).delivered == len(images) + 1
        assert list(receipt.faults(ledger)) == []
        assert ledger.value("SELECT count(*) FROM receipt") == 2
        assert PERSON.name not in agent.log and PERSON.id not in agent.log
