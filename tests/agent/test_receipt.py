"""Receipts: complete, and chained so that what is done to one of them shows."""

from __future__ import annotations

import json
import sqlite3

import pytest

from relay_agent import receipt
from relay_agent.destinations import Proof, Retry
from relay_agent.ledger import State, Stop
from relay_agent.package import Manifest, manifest
from relay_agent.verify import verify
from tests.agent.box import SETTINGS, Box, Image
from tests.agent.test_stage import sort_all


class Proving:
    """A destination that proves what it is told to."""

    def __init__(self, lacking: int = 0) -> None:
        self.lacking = lacking

    def prove(self, found: Manifest, location: str) -> list[Proof]:
        items = found.items[:len(found.items) - self.lacking]
        return [Proof(item.sop_instance, "md5", f"{item.sop_instance}.dcm", item.size) for item in items]


def deliver(box: Box, shipment: int, destination: str = "central", lacking: int = 0) -> None:
    with box.ledger.write() as connection:
        connection.execute("INSERT OR IGNORE INTO delivery (shipment, destination, state, changed) VALUES (?, ?, ?, 0)",
                           (shipment, destination, Stop.WAITING))
    box.move(shipment, State.READY)
    found = manifest(box.config, box.ledger, shipment)
    verify(box.config, box.ledger, Proving(lacking), destination, found,  # type: ignore[arg-type]
           "/archive/1", ["200 OK"], 2)


@pytest.fixture
def delivered(box: Box) -> Box:
    """A box with three receipts."""
    for number in range(3):
        box.receive(Image(study=f"9.{number}", sop=f"9.{number}.1"), Image(study=f"9.{number}", sop=f"9.{number}.2"))
    sort_all(box)
    for shipment in (1, 2, 3):
        deliver(box, shipment)
    return box


def faults(box: Box) -> list[str]:
    return list(receipt.faults(box.ledger))


def change(box: Box, *statements: str) -> None:
    with box.ledger.write() as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_box_without_receipts_has_no_faults(box: Box) -> None:
    assert faults(box) == []


def test_untouched_receipts_have_no_faults_and_follow_each_other(delivered: Box) -> None:
    assert faults(delivered) == []
    rows = delivered.ledger.all("SELECT previous, hash FROM receipt ORDER BY id")
    assert [row["previous"] for row in rows] == [receipt.FIRST, *(row["hash"] for row in rows[:-1])]


def test_a_receipt_says_what_was_proved_of_every_instance(delivered: Box) -> None:
    found = receipt.read(delivered.ledger.all("SELECT * FROM receipt WHERE shipment = 2")[0])
    assert (found["receipt"], found["destination"], found["attempts"]) == (2, "central", 2)
    assert found["location"] == "/archive/1"
    assert found["config_sha256"] == receipt.config_hash(delivered.config) and found["server_said"] == ["200 OK"]
    rows = {row["sop_instance"]: row for row in delivered.ledger.all("SELECT * FROM instance WHERE shipment = 2")}
    assert {told["sop_instance"] for told in found["instances"]} == set(rows)
    for told in found["instances"]:
        row = rows[told["sop_instance"]]
        assert told["received_data_set_sha256"] == row["digest"].hex()
        assert (told["sent_sha256"], told["sent_md5"]) == (row["sent_sha256"].hex(), row["sent_md5"].hex())
        assert told["proved_by"] == "md5" and told["sent_size"] == told["server_size"] == row["sent_size"]


def test_an_edited_receipt_shows(delivered: Box) -> None:
    change(delivered, "UPDATE receipt SET body = replace(body, '9.1.2', '9.1.7') WHERE id = 2")
    assert faults(delivered) == ["receipt 2 was edited"]


def test_an_edited_receipt_with_a_hash_that_fits_shows_in_the_next(delivered: Box) -> None:
    row = delivered.ledger.one("SELECT * FROM receipt WHERE id = 2")
    assert row is not None
    body = json.dumps({**json.loads(row["body"]), "location": "/elsewhere"}, sort_keys=True)
    with delivered.ledger.write() as connection:
        connection.execute("UPDATE receipt SET body = ?, hash = ? WHERE id = 2",
                           (body, receipt.chain(row["previous"], body)))
    assert faults(delivered) == ["receipt 3 does not follow receipt 2: one of the two was exchanged"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_receipt_that_was_removed_shows(delivered: Box, number: int) -> None:
    change(delivered, f"DELETE FROM receipt WHERE id = {number}")
    assert faults(delivered) == [f"receipt {number} is missing", f"shipment {number} was verified at central and has "
                                 "no receipt"]


def test_the_last_receipt_is_missed_by_its_delivery(delivered: Box) -> None:
    change(delivered, "DELETE FROM receipt WHERE id = 3")
    assert faults(delivered) == ["shipment 3 was verified at central and has no receipt"]


def test_two_that_were_exchanged_show(delivered: Box) -> None:
    change(delivered, "UPDATE receipt SET id = 7 WHERE id = 1", "UPDATE receipt SET id = 1 WHERE id = 2",
           "UPDATE receipt SET id = 2 WHERE id = 7")
    assert any("exchanged" in fault for fault in faults(delivered))


def test_the_first_receipt_cannot_be_replaced_by_one_that_follows_nothing(delivered: Box) -> None:
    change(delivered, "DELETE FROM receipt WHERE id = 1", "UPDATE receipt SET id = id - 1")
    assert any("receipt 1 does not follow receipt 0" in fault for fault in faults(delivered))


@pytest.mark.parametrize(("lacking", "words"), [(1, "do not cover every instance"), (2, "do not cover every instance")])
def test_nothing_is_recorded_when_proofs_are_lacking(box: Box, lacking: int, words: str) -> None:
    box.receive(Image(sop="1.1"), Image(sop="1.2"))
    sort_all(box)
    with pytest.raises(Retry, match=words):
        deliver(box, 1, lacking=lacking)
    assert box.state() == State.READY and faults(box) == []
    assert box.ledger.value("SELECT state FROM delivery") == Stop.WAITING


@pytest.mark.parametrize("statement", ["UPDATE shipment SET state = 'rejected'", "UPDATE shipment SET state = 'held'",
                                       "UPDATE instance SET problem = 'damaged' WHERE id = 2",
                                       "UPDATE instance SET shipment = 1"])
def test_a_shipment_that_changed_meanwhile_gets_no_receipt(box: Box, statement: str) -> None:
    box.receive(Image(sop="1.1"), Image(sop="1.2"))
    sort_all(box)
    box.move(1, State.READY)
    found = manifest(box.config, box.ledger, 1)
    box.receive(Image(sop="1.3"))
    change(box, statement)
    with pytest.raises(Retry, match="changed while it was delivered"):
        verify(box.config, box.ledger, Proving(), "central", found, "", [], 1)  # type: ignore[arg-type]
    assert box.state() != State.DELIVERED and box.ledger.all("SELECT * FROM receipt") == []


def test_delivered_means_verified_everywhere(box: Box) -> None:
    box.receive(Image())
    sort_all(box)
    change(box, *(f"INSERT INTO delivery (shipment, destination, state, changed) VALUES (1, '{name}', 'waiting', 0)"
                  for name in ("central", "pacs")))
    deliver(box, 1, "central")
    assert box.state() == State.READY
    deliver(box, 1, "pacs")
    assert box.state() == State.DELIVERED and faults(box) == []


def test_a_receipt_cannot_be_written_without_its_delivery(box: Box) -> None:
    """The receipt, the delivery's state and the shipment's are one transaction."""
    box.receive(Image())
    sort_all(box)
    change(box, "CREATE TRIGGER broken BEFORE UPDATE OF state ON delivery BEGIN SELECT raise(ABORT, 'disk'); END")
    with pytest.raises(sqlite3.IntegrityError, match="disk"):
        deliver(box, 1)
    assert box.ledger.all("SELECT * FROM receipt") == [] and box.state() == State.READY


def test_the_hash_of_the_settings_is_theirs_and_not_the_files(box: Box) -> None:
    before = receipt.config_hash(box.config)
    assert receipt.config_hash(Box(box.folder, "# a remark\n" + SETTINGS).config) == before
    assert receipt.config_hash(Box(box.folder, SETTINGS, 'log_level = "debug"').config) != before
