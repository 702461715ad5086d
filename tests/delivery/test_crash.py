"""kill -9 and lost ledgers: what was acknowledged to a scanner reaches the archive exactly once, whenever it strikes.

A power cut cannot be made here. Of what one may cost, the part that can be made honestly is: the ledger's write-ahead
log is taken away (more than `synchronous = NORMAL` may lose), or the ledger as a whole.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from relay_agent.ledger import State, Stop, balance
from relay_agent.purge import purge
from relay_agent.spool import Spool
from tests import data
from tests.central import Central
from tests.delivery.box import (
    PASSWORD,
    SOON,
    USER,
    Box,
    Pair,
    archived_files,
    arrived_exactly,
    data_sets,
    digests,
    everything,
    requests_for,
    sent_bytes,
    site,
    to,
)
from tests.harness import PATIENCE, PROJECT, Agent, running, send, wait_for
from tests.receive.scu import SCU


class Scanner(threading.Thread):
    """Sends study after study and keeps each image until it was acknowledged, as scanners do."""

    def __init__(self, box: Agent, name: str, enough: threading.Event) -> None:
        super().__init__(name=name)
        self.sent: dict[str, list[Dataset]] = {}  # by session label
        self.attempts = 0
        self._box = box
        self._enough = enough

    def run(self) -> None:
        while not self._enough.is_set():
            label = f"{self.name}x{len(self.sent)}"
            images = list(data.study(2, 6, size=(48, 48), comments=f"Project:P1 Subject:{self.name} Session:{label}"))
            self.sent[label] = images
            while images:
                self.attempts += 1
                images = self._push(images)
                time.sleep(0.1)

    def _push(self, images: list[Dataset]) -> list[Dataset]:
        """Send over one association; what was not acknowledged."""
        left = list(images)
        with contextlib.suppress(AssertionError, OSError), SCU(self._box.port, timeout=20) as scu:
            scu.associate(calling=self.name)
            while left:
                if scu.store(str(left[0].SOPInstanceUID), sent_bytes(left[0])) != 0:
                    break
                left.pop(0)
            scu.release()
        return left


@pytest.mark.slow
def test_kills_at_random_points(tmp_path: Path) -> None:
    """Receiver and worker are killed at eighteen random moments while three scanners send and everything is delivered.

    Afterwards every acknowledged instance is in the archive, once and byte for byte; no receipt is missing; and at no
    sampled moment was an instance unaccounted for.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    enough, over = threading.Event(), threading.Event()
    with site(tmp_path / "central") as central:
        central.misbehave("slow", delay=0.03)  # makes the moments in between longer
        settings = to(central.url, tmp_path / "box") + everything() + '[purge]\nretention = "1 s"\n'
        with running(Agent(tmp_path / "box", settings, stage=SOON)) as box:
            sums: list[int] = []

            def sample() -> None:
                ledger = box.ledger
                while not over.wait(0.05):
                    sums.append(balance(ledger).difference)

            scanners = [Scanner(box, name, enough) for name in ("MR1", "MR2", "CT1")]
            watcher = threading.Thread(target=sample)
            for thread in (*scanners, watcher):
                thread.start()
            try:
                for _ in range(18):
                    time.sleep(dice.uniform(0.1, 1.0))
                    victims = dice.choice((["receive"], ["work"], ["receive", "work"]))
                    box.stop(*victims, kill=True)
                    box.start(*victims)
                central.behave()
            finally:
                enough.set()
                for scanner in scanners:
                    scanner.join(120)
            sent = {label: images for scanner in scanners for label, images in scanner.sent.items()}
            count = sum(map(len, sent.values()))
            assert sum(scanner.attempts for scanner in scanners) > len(sent), "no association was hit by a kill"
            ledger = box.ledger
            wait_for(lambda: balance(ledger).delivered == count, 5 * PATIENCE, f"seed {seed}: not all of {count}")
            over.set()
            watcher.join()
            assert set(sums) == {0}
            assert len(sums) > 50
            for label, images in sent.items():
                arrived_exactly(central, images, label)
            assert central.prearchive_rows() == []
            verified = box.cli("receipt", "--verify")
            assert verified.returncode == 0, verified.stdout
            assert box.json("status")["balance"] == {
                "received": count, "delivered": count, "held": 0, "quarantined": 0, "rejected": 0, "on_its_way": 0,
                "difference": 0}
            # What is proved is purged, and what the crashes left over goes when the receiver starts again.
            box.stop(kill=True)
            spool = Spool(box.config.spool, 0)
            while purge(ledger, spool, box.config.deidentified, retention=0.0):
                pass
            box.start("receive")
            assert [path for path, _ in spool.files()] == []
            assert ledger.value("SELECT count(*) FROM instance WHERE purged IS NULL") == 0


@contextlib.contextmanager
def central_process(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The stand-in as a process of its own, for it to be killed."""
    ready = folder / "port"
    ready.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "tests.central", "--data", str(folder / "central"), "--port",
                                str(port), "--port-file", str(ready), "--user", f"{USER}:{PASSWORD}"], cwd=PROJECT,
                               stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: ready.exists() and ready.read_text(encoding="ascii"), say="the central starts")
        yield process, int(ready.read_text(encoding="ascii"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_central_is_killed_and_comes_back(tmp_path: Path) -> None:
    """The server dies under uploads and commits and returns with what it had; nothing is lost or arrives twice."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    sessions = {f"S{number}_MR1": list(data.study(3, 4, comments=f"Project:P1 Subject:S{number} "
                                                  f"Session:S{number}_MR1")) for number in range(12)}
    count = sum(map(len, sessions.values()))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        process, port = first.enter_context(central_process(tmp_path))
        settings = to(f"http://127.0.0.1:{port}", tmp_path / "box", streams=2, bandwidth="2 Mbit/s") + everything()
        box = stack.enter_context(Box(tmp_path / "box", settings).working())
        box.take([image for images in sessions.values() for image in images])
        kills = 0
        while box.balances().delivered < count and kills < 6:
            time.sleep(dice.uniform(0.3, 0.9))
            process.send_signal(signal.SIGKILL)
            kills += 1
            first.close()
            process, port = first.enter_context(central_process(tmp_path, port))
        assert kills >= 2
        wait_for(lambda: box.balances().delivered == count, say=f"seed {seed}: {box.status()}")
        first.close()
        central = Central(tmp_path / "central", users={USER: PASSWORD})  # to look at what it kept
        try:
            for label, images in sessions.items():
                arrived_exactly(central, images, label)
        finally:
            central.start().stop()
        assert box.ledger.value("SELECT count(*) FROM receipt") == len(sessions)


def in_state(box: Agent, state: str, instances: int) -> None:
    """Wait until so many instances are in a state, without a connection of our own that would hold the old ledger."""
    def found() -> bool:
        with contextlib.closing(sqlite3.connect(box.config.ledger, timeout=60)) as ledger:
            [(count,)] = ledger.execute("SELECT sum(instances) FROM shipment WHERE state = ?", (state,))
        return bool(count == instances)

    wait_for(found, say=state)


def forget(box: Agent, *names: str) -> None:
    """Delete files of the ledger."""
    for name in names:
        (box.config.data / name).unlink(missing_ok=True)


def test_the_ledger_loses_its_last_commits(tmp_path: Path) -> None:
    """One session delivered, one on its way, and all that the ledger's log held is gone: both end delivered, once."""
    first, second = ([*data.study(2, 4, comments=f"Project:P1 Subject:{label} Session:{label}_MR1")]
                     for label in ("S1", "S2"))
    with site(tmp_path / "central") as central, \
            running(Agent(tmp_path / "box", to(central.url, tmp_path / "box") + everything(), stage=SOON)) as box:
        assert set(send(box.port, first)) == {0}
        in_state(box, "delivered", len(first))
        central.misbehave("busy-503")
        assert set(send(box.port, second)) == {0}
        in_state(box, "ready", len(second))
        box.stop(kill=True)
        forget(box, "ledger.sqlite-wal", "ledger.sqlite-shm")
        assert "ready" not in box.json("status")["shipments"], "nothing was lost, so this tried nothing"
        uploads = len(requests_for(central))
        central.behave()
        box.start()
        in_state(box, "delivered", len(first) + len(second))
        arrived_exactly(central, first, "S1_MR1")
        arrived_exactly(central, second, "S2_MR1")
        assert len(requests_for(central)) - uploads == 2, "what was delivered before was sent again"
        assert box.cli("receipt", "--verify").returncode == 0
        assert box.json("status")["balance"]["difference"] == 0


def test_the_ledger_is_gone_altogether(tmp_path: Path) -> None:
    """Without its ledger the box takes up everything in its spool, finds at the server what is there, sends the rest.

    Of a session that came in two versions the archive keeps the later one: the earlier one stops and is a person's to
    reject, since nobody remembers any more that it was replaced.
    """
    study, series = generate_uid(), generate_uid()
    older = [data.instance(study=study, series=series, number=number) for number in range(1, 5)]
    newer = [data.instance(study=study, series=series, number=number, sop=older[number - 1].SOPInstanceUID,
                           StudyDescription="CORRECTED") for number in range(1, 5)]
    there, lacking = ([*data.study(2, 4, comments=f"Project:P1 Subject:{label} Session:{label}_MR1")]
                      for label in ("S2", "S3"))
    with site(tmp_path / "central") as central:
        box = Agent(tmp_path / "box", to(central.url, tmp_path / "box") + everything(), stage=SOON)
        with running(box):
            assert set(send(box.port, older + there)) == {0}
            in_state(box, "delivered", 12)
            assert set(send(box.port, newer)) == {0}
            in_state(box, "delivered", 16)
            central.misbehave("busy-503")
            assert set(send(box.port, lacking)) == {0}
            in_state(box, "ready", 8)
        forget(box, "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
        central.behave()
        uploads = len(requests_for(central))
        with running(box):
            in_state(box, "delivered", 16)
            arrived_exactly(central, there, "S2_MR1")
            arrived_exactly(central, lacking, "S3_MR1")
            [stopped] = [number for number in range(1, 5)
                         if [d["state"] for d in box.json("show", str(number))["deliveries"]] == ["stopped"]]
            assert data_sets(archived_files(central)) == digests(newer)
            assert len(requests_for(central)) - uploads == 3, "what was there was sent again"
            status = box.json("status")
            assert (status["balance"]["received"], status["balance"]["difference"], status["conflicts"]) == (24, 0, 4)
            assert box.cli("reject", str(stopped), "--reason", "replaced, as the archive shows").returncode == 0
            in_state(box, "delivered", 20)
            arrived_exactly(central, newer)
            assert box.cli("receipt", "--verify").returncode == 0


def test_the_worker_is_stopped_under_a_hanging_server(tmp_path: Path) -> None:
    """SIGTERM must not wait for a server that never answers: updates and shutdowns would be killed half-way."""
    with site(tmp_path / "central") as central:
        central.misbehave("black-hole", path="/import$", skip=1)
        settings = to(central.url, tmp_path / "box", timeout="2 min") + everything()
        images = list(data.study(2, 3))
        with running(Box(tmp_path / "box", settings), "work") as box:
            box.take(images)
            wait_for(lambda: central.faults.listing()[0]["struck"] > 0, say="the upload hangs")
            process = box.processes["work"]
            process.terminate()
            assert process.wait(60) == 0
            box.all_here(images)
            central.behave()
            box.start("work")
            box.wait(Stop.VERIFIED)
            arrived_exactly(central, images)


def test_a_restart_in_the_middle_of_a_session(pair: Pair) -> None:
    """A worker that starts again goes on where it was: what is in the prearchive is not sent again."""
    box, central = pair(destination={"streams": 1})
    central.misbehave("busy-502", path="/import$", skip=2)
    images = list(data.study(4, 2))
    box.take(images)
    box.wait_words("answered 502")
    there = len(central.prearchive_instances("P1"))
    assert there == 4
    box.worker.stop()
    central.behave()
    with Box(box.folder, box.file.read_text(encoding="utf-8").partition("[[destination]]")[1]
             + box.file.read_text(encoding="utf-8").partition("[[destination]]")[2]).working() as again:
        again.wait(Stop.VERIFIED)
        assert again.wait_shipment(State.DELIVERED)["instances"] == 8
    sent = [request for request in requests_for(central) if request["status"] == 200]
    assert len(sent) == 4, "a series that was there was sent again"
    arrived_exactly(central, images)
    assert data_sets(archived_files(central)) == digests(images)
