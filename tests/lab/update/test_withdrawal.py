"""A box that goes: last of all, for it does not come back."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing

from tests.box.conftest import PROJECT
from tests.lab.conftest import OTHER, OTHERS_ADDRESS, ansible, variables
from tests.lab.studies import Study, delivered


def retire(**values: object):
    return ansible("playbooks/retire.yml", f"--limit={OTHER},localhost", variables(**values))


def test_retired(other, peer, wait_for):
    """Not by mistake, not with anything undelivered; then all is gone but the ledger, which came here whole."""
    assert retire().returncode != 0
    study = Study("last")
    assert study.send(peer("scanner"), OTHERS_ADDRESS)
    assert wait_for(lambda: delivered([study], other), 120)
    held = Study("held", comments="nobody knows")
    assert held.send(peer("scanner"), OTHERS_ADDRESS)

    def balance():
        return json.loads(other.check_output("relay-agent status --json < /dev/null"))["balance"]
    assert wait_for(lambda: balance()["held"] == len(held.images), 120)
    other.check_output("touch /var/lib/relay-agent/kspace/landing/prisma/notes.txt")  # nothing that is picked up
    played = retire(retire=OTHER, retire_patience=20)
    assert played.returncode != 0
    assert f"{len(held.images)} held" in played.stdout, played.stdout[-3000:]
    assert "1 files in landing directories" in " ".join(played.stdout.split())
    for unit in ("relay-receive.service", "srv-share-landing.mount"):
        assert other.service(unit).is_running
    last = balance()
    played = retire(retire=OTHER, retire_patience=20,
                    retire_undelivered={"on_its_way": 0, "held": last["held"], "quarantined": last["quarantined"],
                                         "landing": 1})
    assert played.returncode == 0, played.stdout[-4000:]
    assert other.run("find /var/lib/relay-agent /etc/relay-agent -type f").stdout == ""
    assert not other.file("/opt/relay-agent").exists
    for unit in ("relay-receive.service", "relay-work.service", "srv-share-landing.mount"):
        assert not other.service(unit).is_running
        assert not other.service(unit).is_enabled
    ledger, certificate = (PROJECT / f"build/retired/{OTHER}.{kind}" for kind in ("sqlite", "txt"))
    text = certificate.read_text()
    assert hashlib.sha256(ledger.read_bytes()).hexdigest() in text
    assert f"Received:       {last['received']} instances" in text
    with closing(sqlite3.connect(ledger)) as kept:
        assert kept.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for each in (study, held):
        each.forget()
