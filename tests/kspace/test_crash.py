"""The worker killed at any moment: every raw file is in the box once, whole, and in one shipment."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest

from relay_agent.config_text import toml
from relay_agent.ledger import State, balance
from tests import data
from tests.harness import Agent, wait_for
from tests.kspace.path import exam
from tests.kspace.synthetic import PERSON, File, Scan, build

SETTINGS = """
[[destination]]
name = "central"
url = "http://127.0.0.1:9"
credential = {secret}
[[route]]
name = "all"
destinations = ["central"]
[route.kspace]
[kspace]
reserve = "20 MB"
incomplete_after = "1 s"
[[kspace.source]]
name = "prisma"
"""
ROUNDS, FILES = 12, 3


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    chance = random.Random(7)
    agent = Agent(tmp_path, SETTINGS.format(secret=toml(str(tmp_path / "secret"))),
                  stage='[stage]\nquiet = "300 ms"\nlanding_stable = "100 ms"\nrescan = "300 ms"')
    landing = agent.config.kspace_landing / "prisma"
    landing.mkdir(parents=True)
    images = data.write(exam(), tmp_path / "medium")
    assert agent.cli("upload", *map(str, images)).returncode == 0
    digests: set[str] = set()
    try:
        for number in range(ROUNDS):
            agent.start("work")
            for position in range(FILES):
                uid = 100 * number + position
                content = build(File(scans=(Scan(uid=uid, readouts=40, seed=uid),)))
                digests.add(hashlib.sha256(content).hexdigest())
                (landing / f".{uid}").write_bytes(content)
                (landing / f".{uid}").rename(landing / f"meas_MID{uid}.dat")
            time.sleep(chance.uniform(0.8, 4.5))
            agent.stop("work", kill=True)
        agent.start("work")
        ledger = agent.ledger
        wait_for(lambda: ledger.value("SELECT count(*) FROM shipment s JOIN raw r ON r.shipment = s.id WHERE s.state = "
                                      "? AND r.path IS NOT NULL", State.WAITING) >= len(digests), 240,
                 f"all scrubbed: {agent.cli('status').stdout}\n{agent.log[-3000:]}")
    finally:
        for service in list(agent.processes):
            agent.stop(service, kill=True)
    rows = ledger.all("SELECT s.*, r.path AS made, r.sha256, i.path, i.copies FROM shipment s JOIN raw r ON r.shipment "
                      "= s.id JOIN instance i ON i.id = r.instance WHERE s.kind = 'raw'")
    assert sorted(row["study_uid"] for row in rows) == sorted(digests), "each once, none more"
    assert {row["copies"] for row in rows} == {1}
    assert balance(ledger).difference == 0
    assert balance(ledger).received == len(digests) + len(images)
    assert not [path for path in landing.rglob("*") if path.is_file()]
    kept = [path for path in agent.config.kspace_spool.rglob("*") if path.is_file()]
    assert sorted(path.stem for path in kept) == sorted(digests)
    for row in rows:
        stored, made = agent.config.spool / row["path"], agent.config.data / row["made"]
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == row["study_uid"]
        assert hashlib.sha256(made.read_bytes()).digest() == row["sha256"]
        assert PERSON.name.encode() not in made.read_bytes()
    assert PERSON.name not in agent.log and PERSON.id not in agent.log
