"""What an operator does with raw data by hand: upload, list, show, assign, status, check."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from relay_agent import cli
from relay_agent.ledger import State
from tests import data
from tests.kspace.path import RawBox, exam, raw, settings
from tests.kspace.synthetic import PERSON

PULL = """[kspace.source.pull]
host = "192.0.2.2"
user = "relay"
key = "imager-key"
host_key = "ssh-ed25519 AAAA"
folder = "/data/raw"
"""


@pytest.fixture
def box(tmp_path: Path) -> RawBox:
    return RawBox(tmp_path)


def run(box: RawBox, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main([*arguments, "--config", str(box.file)])
    found = capsys.readouterr()
    return status, found.out + found.err


def told(box: RawBox, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(run(box, capsys, *arguments, "--json")[1])


def test_a_medium_with_both(box, capsys, tmp_path):
    medium = tmp_path / "medium"
    data.write(exam(), medium / "DICOM")
    (medium / "raw").mkdir()
    (medium / "raw/meas_MID358.dat").write_bytes(raw())
    (medium / "raw/meas_MID359.dat").write_bytes(raw(359)[:15_000])
    found = told(box, capsys, "upload", str(medium))
    assert (found["files"], found["taken"]) == (8, 7)
    (problem,) = found["problems"]
    assert problem["file"].endswith("meas_MID359.dat") and problem["problem"].startswith("incomplete: ")
    assert problem["problem"].endswith("; it is kept, and held")
    assert (medium / "raw/meas_MID358.dat").exists(), "a medium is only read"
    assert not [path for path in box.config.kspace_spool.rglob(".partial*")]
    box.dicom([])
    box.work()
    assert sorted(row["state"] for row in box.raws()) == [State.HELD, State.WAITING]
    assert told(box, capsys, "upload", str(medium / "raw/meas_MID358.dat"))["taken"] == 1
    assert len(box.raws()) == 2


def test_a_source_by_name(box, capsys, tmp_path):
    path = tmp_path / "P1.7"
    path.write_bytes(b"raw data of another vendor")
    assert run(box, capsys, "upload", "--source", "nobody", str(path))[0] == 1
    status, text = run(box, capsys, "upload", "--source", "prisma", str(path))
    assert status == 1 and "not TWIX" in text, "taken in, and told that it will be held"
    assert len(box.raws()) == 1


def test_raw_data_where_there_is_no_source(tmp_path, capsys):
    file, path = tmp_path / "config.toml", tmp_path / "meas.dat"
    text = settings().partition("[[kspace.source]]")[0]
    file.write_text(f'data = "{tmp_path}"\n{text}')
    path.write_bytes(raw())
    assert cli.main(["upload", "--config", str(file), str(path)]) == 1
    assert "add a [[kspace.source]]" in capsys.readouterr().out


def test_how_long_it_waits_is_shown(box, capsys):
    box.land(raw())
    box.work()
    assert re.search(r"waits until: \d{4}-\d\d-\d\dT[\d:+]+, then for a person", run(box, capsys, "show", "1")[1])
    box.dicom(exam())
    box.work()
    assert "then for a person" not in run(box, capsys, "show", "1")[1]


def test_an_operator_sees_and_decides(box, capsys):
    box.dicom(exam())
    box.land(raw()[:-3000], "cut.dat")
    box.land(raw(400), "whole.dat")
    box.work()
    page = run(box, capsys, "list")[1]
    assert "raw" in page and "session" in page
    whole = next(row["id"] for row in box.raws() if row["verdict"] == "complete")
    page = run(box, capsys, "show", str(whole))[1]
    for words in ("MID00400", "complete", "score 230", "frame of reference", "scrubbed", "t1_mprage", "candidates"):
        assert words in page
    page = run(box, capsys, "show", str(whole), "--changes")[1]
    assert "replaced" in page and "measurement 1, Config" in page and PERSON.name not in page
    found = told(box, capsys, "show", str(whole))
    assert found["kind"] == "raw" and found["raw"]["score"] == 230 and found["study"] is None
    status, page = run(box, capsys, "status")
    assert status == 0
    for words in ("raw data", "room for raw data", "prisma"):
        assert words in page
    assert told(box, capsys, "status")["kspace"]["states"]["waiting"]["files"] == 1
    status, text = run(box, capsys, "assign", str(whole), "--to", "1", "--series", "1")
    assert status == 0 and f"shipment {whole} belongs to shipment 1" in text
    box.work()
    assert "by hand" in run(box, capsys, "show", str(whole))[1]
    assert box.shipment(whole)["series_uid"].endswith(".1")
    status, text = run(box, capsys, "assign", str(whole), "--project", "P2")
    assert status == 1 and "--to SHIPMENT" in text
    status, text = run(box, capsys, "assign", "1", "--to", str(whole))
    assert status == 1 and "is a session" in text
    status, text = run(box, capsys, "reject", str(whole), "--reason", "no consent")
    assert status == 0 and box.shipment(whole)["state"] == State.REJECTED
    run(box, capsys, "retry", str(whole))
    box.work()
    assert box.shipment(whole)["state"] == State.WAITING


def test_check_tells_what_is_hardly_meant(tmp_path, capsys):
    for number, (text, words) in enumerate((
            (settings(raw="scrub = false"), "what identifies the patient"),
            (settings().replace("[route.kspace]", ""), "no route delivers them"),
            (settings().partition("[[kspace.source]]")[0], "there is no source of them"),
            (settings(kspace='quota = "0 B"'), "0 B are free for raw data"),
            (settings(raw="adjustments = true", source=PULL), "files below 1 MB are not fetched"))):
        file = tmp_path / f"{number}.toml"
        file.write_text(f'data = "{tmp_path}"\n{text}')
        cli.main(["check", "--offline", "--config", str(file)])
        assert words in capsys.readouterr().out
