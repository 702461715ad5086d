"""The self-test, against a real receiver, worker and central XNAT: what an update of a box relies on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from relay_agent import selftest
from tests.delivery.box import SOON, archived_files, everything, site, table, to
from tests.harness import Agent, running


def agent(folder: Path, url: str, test: dict[str, Any] | None, allow: str = "RELAY-CHECK@127.0.0.1") -> Agent:
    settings = to(url, folder) + everything()
    if test is not None:
        settings += table("route", name="test", calling_ae=[selftest.CALLING_AE], destinations=["central"], **test)
    settings = settings.replace('name = "all"', 'name = "all"\nmodality = ["CT"]')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receiver = table("receiver", ae_title="RELAY", address="127.0.0.1", port=port, allow=[allow])
    return Agent(folder, settings, receivers=receiver, stage=SOON)


def test_an_invented_image_is_proved_to_have_arrived(tmp_path: Path) -> None:
    with site(tmp_path / "central") as there, \
            running(agent(tmp_path / "box", there.url, {"assign_project": "P2"})) as box:
        assert any(entry["ok"] and "RELAY answers C-ECHO" in entry["what"] for entry in box.json("check"))
        done = box.cli("self-test", "--patience", "60")
        assert done.returncode == 0, done.stdout
        row = box.ledger.one("SELECT * FROM shipment")
        [file] = archived_files(there, row["session"], "P2")
        assert dcmread(file).StudyDescription == "Self-test of a relay"
        assert box.json("status")["last_delivered"]


@pytest.mark.parametrize(("test", "allow", "words"), [
    (None, "*", "add one that leads to a project for tests"),
    ({"review": True, "assign_project": "P2"}, "*", "asks for review"),
    ({"assign_project": "nowhere"}, "*", "not into the project of the route"),
    ({"assign_project": "P2"}, "MR1", "add it to allow"),
])
def test_it_says_where_it_stopped(tmp_path: Path, test: dict[str, Any] | None, allow: str, words: str) -> None:
    with site(tmp_path / "central") as there, running(agent(tmp_path / "box", there.url, test, allow)) as box:
        done = box.cli("self-test", "--patience", "5")
        assert done.returncode == 1
        assert words in done.stdout


def test_a_receiver_that_does_not_know_the_box_answers_nevertheless(tmp_path: Path) -> None:
    with running(agent(tmp_path / "box", "http://127.0.0.1:1", None, "MR1"), "receive") as box:
        found = [entry for entry in box.json("check", "--offline") if "RELAY" in entry["what"]]
        assert [entry["ok"] for entry in found] == [True]
        assert "rejects this box as a caller" in found[0]["what"]
