"""The commands: exit statuses, JSON, and nothing of the patient in what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relay_agent import cli
from relay_agent.deidentify.uids import UIDs
from tests.kspace.synthetic import FRAME, PERSON, File, Scan, build
from tests.kspace.test_match import dicom


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "meas.dat"
    path.write_bytes(build(File()))
    return path


def run(*arguments: object) -> int:
    return cli.main(["kspace", *map(str, arguments)])


def silent(text: str) -> bool:
    return not [one for one in PERSON.planted() if one.decode() in text]


def test_check(raw, tmp_path, capsys):
    assert run("check", raw) == 0
    out = capsys.readouterr().out
    assert "complete" in out
    assert "VE11" in out
    assert "t1_mprage" in out
    assert silent(out)
    cases = {"aborted.dat": (build(File(scans=(Scan(acqend=False),))), 2), "cut.dat": (raw.read_bytes()[:-900], 2),
             "other.dat": (b"no raw data", 3)}
    for name, (content, status) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert run("check", path) == status
    capsys.readouterr()
    assert run("check", "--json", raw, tmp_path / "cut.dat", tmp_path / "other.dat") == 3
    out = capsys.readouterr().out
    rows = json.loads(out)
    assert [row["verdict"] for row in rows] == ["complete", "incomplete", "not TWIX"]
    assert rows[0]["measurements"][0]["readouts"] == 6
    assert silent(out)
    assert run("check", tmp_path / "absent.dat") == 4


def test_scrub(raw, tmp_path, capsys):
    out, key = tmp_path / "out.dat", tmp_path / "key"
    key.write_bytes(b"of this box")
    assert run("scrub", "--project", "P1", "--key", key, "--keep", "age", raw, out) == 0
    assert UIDs(b"of this box", "P1").new(FRAME).encode() in out.read_bytes()
    assert PERSON.name.encode() not in out.read_bytes()
    assert PERSON.age.encode() in out.read_bytes()
    assert silent(capsys.readouterr().out)
    assert run("scrub", raw, out) == 4  # is there already
    assert run("scrub", raw, tmp_path / "nowhere" / "out.dat") == 4
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert run("scrub", "--json", raw, tmp_path / "again.dat") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["versions"] == ["VE11"]
    assert silent(captured.out + captured.err)


def test_scrub_leaves_nothing_when_it_holds(tmp_path, capsys):
    raw, other = tmp_path / "raw.dat", tmp_path / "other.dat"
    raw.write_bytes(build(File(family="XA", software="syngo MR XA99")))
    other.write_bytes(b"no raw data")
    assert run("scrub", raw, tmp_path / "out.dat") == 4
    assert "XA99" in capsys.readouterr().err
    assert run("scrub", other, tmp_path / "out.dat") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.dat", "raw.dat"]
    assert run("scrub", "--version", "XA99", raw, tmp_path / "out.dat") == 0


def test_match(raw, tmp_path, capsys):
    dicom(tmp_path / "dicom", 7, patient=PERSON.id)
    assert run("match", raw, "--dicom", tmp_path / "dicom") == 0
    assert "series 7" in capsys.readouterr().out
    assert run("match", "--json", raw, "--dicom", tmp_path / "dicom") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "matched"
    assert row["candidates"][0]["series"] == [{"uid": "1.2.3.7", "number": 7}]
    (tmp_path / "empty").mkdir()
    assert run("match", raw, "--dicom", tmp_path / "empty") == 1
    assert "there is no DICOM in it" in capsys.readouterr().err
    assert run("match", raw, "--dicom", tmp_path / "absent") == 4
    assert "absent: no such folder" in capsys.readouterr().err
    raw.write_bytes(raw.read_bytes()[:-900])
    assert run("match", raw, "--dicom", tmp_path / "dicom") == 0
    assert "matched (incomplete: it ends before" in capsys.readouterr().out
    raw.write_bytes(b"no raw data")
    assert run("match", raw, "--dicom", tmp_path / "dicom") == 1
    assert "unmatched (not TWIX: " in capsys.readouterr().out
