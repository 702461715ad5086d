"""Snapshots of the ledger: whole while it is written, and back in place of one that this release cannot read."""

from __future__ import annotations

import gc
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from relay_agent import snapshot
from relay_agent.book import reconcile
from relay_agent.ledger import MIGRATIONS, Ledger, LedgerError, State, balance
from tests.agent.box import Box, Image
from tests.agent.test_cli import Shell, shell
from tests.agent.test_stage import sort_all

__all__ = ["shell"]


@pytest.fixture
def copy(box: Box) -> Path:
    """Where snapshots go."""
    return box.folder / "ledger.before"


def migrate(box: Box) -> None:
    """What a newer release does: another schema, and rows that only it knows."""
    box.ledger.close()
    with closing(sqlite3.connect(box.config.ledger)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        connection.execute("ALTER TABLE secret ADD COLUMN made REAL")
        connection.execute("INSERT INTO secret (name, value, made) VALUES ('uid', x'1234', 1.0)")
        connection.commit()
    with pytest.raises(LedgerError, match="newer release"):
        Ledger(box.config.ledger)
    gc.collect()  # its connection


def test_a_snapshot_is_whole_while_the_ledger_is_written(box: Box, copy: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            box.receive(Image(study=f"1.{number}", sop=f"1.{number}.1"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            snapshot.take(box.config.ledger, copy)
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
                assert connection.execute("SELECT value FROM tally WHERE name = 'received'").fetchone() == \
                    connection.execute("SELECT count(*) FROM instance").fetchone()
    finally:
        stop.set()
        writer.join()
    assert sorted(path.name for path in copy.parent.glob("ledger*")) == ["ledger.before"]  # one file, nothing beside it


def test_what_can_be_read_is_left_alone(box: Box, copy: Path) -> None:
    snapshot.take(box.config.ledger, copy)
    box.receive(Image())
    assert snapshot.restore(box.config.ledger, copy) is None
    assert box.ledger.value("SELECT count(*) FROM instance") == 1


def test_nothing_that_was_received_since_is_lost(box: Box, copy: Path) -> None:
    """A newer release migrated the ledger, received and made a key; then it was taken back."""
    box.receive(Image(study="1.1", sop="1.1.1"))
    sort_all(box)
    box.move(1, State.HELD)
    snapshot.take(box.config.ledger, copy)
    box.receive(Image(study="1.2", sop="1.2.1"), calling="MR2")
    migrate(box)
    kept = snapshot.restore(box.config.ledger, copy)
    assert kept is not None
    assert snapshot.schema(kept) == len(MIGRATIONS) + 1  # nothing is thrown away, either
    ledger = Ledger(box.config.ledger)
    assert reconcile(ledger, box.spool, box.config) == 1
    assert [row[0] for row in ledger.all("SELECT sop_instance FROM instance ORDER BY id")] == ["1.1.1", "1.2.1"]
    assert ledger.value("SELECT calling_ae FROM instance WHERE sop_instance = '1.2.1'") == "MR2"
    assert ledger.value("SELECT state FROM shipment") == State.HELD
    assert ledger.value("SELECT value FROM secret") == b"\x12\x34"  # or the same patient would get another pseudonym
    assert balance(ledger).difference == 0
    assert "restored from a snapshot" in ledger.value("SELECT what FROM event ORDER BY id DESC LIMIT 1")


def test_a_damaged_or_missing_ledger(box: Box, copy: Path) -> None:
    snapshot.take(box.config.ledger, copy)
    box.ledger.close()
    box.config.ledger.write_bytes(b"no database" * 1000)
    kept = snapshot.restore(box.config.ledger, copy)
    assert kept is not None
    assert kept.read_bytes().startswith(b"no database")
    assert Ledger(box.config.ledger).value("SELECT count(*) FROM instance") == 0
    box.config.ledger.unlink()
    assert snapshot.restore(box.config.ledger, copy) is not None
    assert Ledger(box.config.ledger).value("SELECT count(*) FROM instance") == 0


def test_it_is_not_replaced_while_it_is_in_use(box: Box, copy: Path) -> None:
    snapshot.take(box.config.ledger, copy)
    migrate(box)
    with closing(sqlite3.connect(box.config.ledger)) as service:
        service.execute("SELECT * FROM instance").fetchall()
        with pytest.raises(LedgerError, match="stop relay-receive and relay-work first"):
            snapshot.restore(box.config.ledger, copy)
    assert snapshot.schema(box.config.ledger) == len(MIGRATIONS) + 1


def test_what_is_no_snapshot(box: Box, copy: Path) -> None:
    copy.write_bytes(b"something else")
    migrate(box)
    with pytest.raises(LedgerError, match="is no snapshot"):
        snapshot.restore(box.config.ledger, copy)
    assert snapshot.schema(box.config.ledger) == len(MIGRATIONS) + 1


def test_commands(shell: Shell, copy: Path) -> None:
    assert shell("backup", copy) == 0
    assert shell("restore", copy) == 0
    assert "nothing to restore" in shell.out
    migrate(shell.box)
    assert shell("restore", copy) == 0
    assert "entered again from the files" in shell.out
    assert shell("backup", shell.box.folder / "nowhere" / "copy") == 1
    assert "is there room" in shell.err
