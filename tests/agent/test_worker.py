"""The worker's loop: what waits for others waits elsewhere."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay_agent import commitment, worker
from relay_agent.ledger import State
from relay_agent.worker import Worker
from tests.agent.box import SETTINGS, Box, Image
from tests.harness import wait_for

CALLER = SETTINGS.replace('allow = ["*"]', 'allow = ["*"]\ncommitment_to = ["SCANNER@127.0.0.1:{port}"]')
STAGE = '[stage]\nquiet = "1 s"\nlongest = "1 min"\n'


def asked(box: Box, number: int = 1) -> None:
    """A request for commitment by SCANNER, long enough ago to be answered."""
    with box.ledger.write() as connection:
        connection.execute(
            "INSERT INTO commitment (receiver, calling_ae, transaction_uid, instances, requested) "
            "VALUES (?, ?, ?, ?, ?)",
            ("RELAY", "SCANNER", f"1.2.{number}", '[["1.2.840.10008.5.1.4.1.1.4", "1.2.3"]]', time.time() - 100))


@contextmanager
def working(box: Box) -> Iterator[Worker]:
    one = Worker(box.config)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield one
    finally:
        one.stop()
        thread.join(60)
        assert not thread.is_alive()


def test_a_caller_that_is_waited_for_does_not_hold_up_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, SETTINGS.replace("https://xnat.example.org", "https://127.0.0.1:9") + STAGE)
    waiting, over = threading.Event(), threading.Event()

    def report_due(*_: object) -> int:
        waiting.set()
        over.wait(120)
        return 0

    monkeypatch.setattr(worker, "report_due", report_due)
    monkeypatch.setattr(worker, "_REPORT", 0.1)
    with working(box):
        assert waiting.wait(60)
        box.receive(Image())
        wait_for(lambda: box.ledger.value("SELECT state FROM shipment WHERE id = 1") not in (None, "gathering"))
        over.set()


@pytest.mark.parametrize("said", [b"", b"\2\0\0\0\0\x99", b"\2\0\0\0\0\x99" + bytes(20)])
def test_a_caller_that_falls_silent_is_waited_for_once_and_not_for_ever(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """pynetdicom's requestor waited for ever for the rest of a PDU."""
    monkeypatch.setattr(commitment, "_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def speak() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                    connections[-1].sendall(said)
                except OSError:
                    return

        threading.Thread(target=speak, daemon=True).start()
        box = Box(tmp_path, CALLER.format(port=listener.getsockname()[1]))
        for number in range(5):
            asked(box, number)
        assert commitment.report_due(box.config, box.ledger, box.spool) == 0
        assert len(connections) == 1, "one of five is tried; the others would only wait as long"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_files_that_cannot_be_taken_in_are_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path)
    told: list[str] = []
    monkeypatch.setattr(worker.alert, "tell", lambda config, ledger, found, *_: told.extend(c.title for c in found))
    one = Worker(box.config)
    try:
        one._tell()
        assert told == []
        one._landing._failing["Doe^John.dcm"] = "Permission denied"
        one._tell()
        assert told == ["landing: files"]
    finally:
        one._landing.close()


def test_a_shipment_that_cannot_be_decided_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    box = Box(tmp_path, SETTINGS + STAGE)
    box.receive(Image(study="1"), Image(study="2", sop="2.1"))
    one = Worker(box.config)
    real = worker.decide

    def decide(config: object, ledger: object, spool: object, shipment: int) -> object:
        if shipment == 1:
            raise RuntimeError
        return real(config, ledger, spool, shipment)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "decide", decide)
    one._stager.sort()
    for shipment in (1, 2):
        box.move(shipment, State.COMPLETE)
    with pytest.raises(RuntimeError):
        one.step()
    assert (box.state(1), box.state(2)) == (State.COMPLETE, State.READY)
    one._landing.close()
