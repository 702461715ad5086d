"""The console script: help with examples, exit statuses, and JSON that a program can read."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from relay_agent import __version__, cli
from relay_agent.ledger import State
from tests.agent.box import SETTINGS, Box, Image, stored
from tests.agent.test_receipt import deliver
from tests.agent.test_stage import sort_all


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser()._subparsers._group_actions  # type: ignore[union-attr]
    return dict(actions[0].choices)  # type: ignore[arg-type]


class Shell:
    """Runs commands on a box."""

    def __init__(self, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
        self.box = box
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, command: str, *arguments: object) -> int:
        try:
            status = cli.main([command, "--config", str(self.box.file), *map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return status

    def json(self, command: str, *arguments: object, status: int = 0) -> Any:
        assert self(command, *arguments, "--json") == status
        return json.loads(self.out)


@pytest.fixture
def shell(box: Box, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(box, capsys)


@pytest.fixture
def busy(shell: Shell) -> Shell:
    """Shipment 1 held, 2 delivered with a receipt, instance 4 quarantined."""
    box = shell.box
    box.receive(Image(study="9.1", sop="9.1.1"), Image(study="9.1", sop="9.1.2"), Image(study="9.2", sop="9.2.1"))
    sort_all(box)
    box.move(1, State.HELD)
    deliver(box, 2)
    box.row(stored("x"), "9.9", problem="unreadable [really]")
    return shell


# Help


@pytest.mark.parametrize("command", commands())
def test_the_help_of_every_command_has_an_example_that_parses(
        command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    examples = [line.strip() for line in lines[lines.index("example:") + 1:] if line.strip()]
    assert end.value.code == 0 and examples
    for example in examples:
        program, *arguments = example.partition("  ")[0].partition(" > ")[0].replace('"', "").split()
        assert program == "relay-agent" and arguments[0] == command
        cli._parser().parse_args(arguments)


@pytest.mark.parametrize("command", commands())
def test_every_option_is_explained(command: str) -> None:
    silent = [action.dest for action in commands()[command]._actions if action.option_strings and not action.help]
    assert silent == []


def test_the_help_lists_every_command_and_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"    {command}" in text for command in commands())
    for line in text.partition("examples:\n")[2].splitlines():
        cli._parser().parse_args(line.partition("   ")[0].partition(" > ")[0].split()[1:])


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"relay-agent {__version__}\n"


# Exit statuses


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["show", "x"], ["show"], ["reject", "1"],
                                       ["list", "--state", "x"]])
def test_wrong_use_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: ")


def test_a_configuration_that_cannot_be_used_is_2_without_a_traceback(shell: Shell) -> None:
    shell.box.file.write_text(SETTINGS + 'colour = "red"\n', encoding="utf-8")
    assert shell("status") == 2
    assert "route[1].colour is not a setting" in shell.err and shell.out == ""
    shell.box.file.unlink()
    assert shell("status") == 2 and "example-config >" in shell.err


def test_a_ledger_that_cannot_be_used_is_1_without_a_traceback(shell: Shell) -> None:
    with shell.box.ledger.write() as connection:
        connection.execute("PRAGMA user_version = 99")
    assert shell("status") == 1 and "newer release" in shell.err


@pytest.mark.parametrize("arguments", [
    ("show", 7), ("assign", 7, "--project", "P1"), ("assign", 1), ("assign", 1, "--project", "a b"),
    ("assign", 1, "--route", "x"), ("assign", 2, "--project", "P1"), ("release", 1), ("reject", 2, "--reason", "r"),
    ("retry", 2), ("retry", 1, "--quarantined"), ("receipt",), ("receipt", 1), ("upload", "--receiver", "X", "/tmp")])
def test_what_is_not_possible_is_1_with_a_sentence(busy: Shell, arguments: tuple[object, ...]) -> None:
    assert busy(*arguments) == 1  # type: ignore[arg-type]
    assert len((busy.err + busy.out).splitlines()) == 1 and "Traceback" not in busy.err


# What commands do


def test_an_empty_box(shell: Shell) -> None:
    found = shell.json("status")
    assert found["balance"] == dict.fromkeys(
        ("received", "delivered", "held", "quarantined", "rejected", "on_its_way", "difference"), 0)
    assert found["last_received"] is None and found["shipments"] == {} and found["box"] == "box"
    assert [row["name"] for row in found["destinations"]] == ["central"]
    assert shell("status") == 0 and "balances" in shell.out and "last received: never" in shell.out
    assert shell("list") == 0 and "nothing to show" in shell.out
    assert shell.json("list") == [] == shell.json("list", "--quarantined")
    assert shell.json("receipt", "--verify") == {"receipts": 0, "faults": []}


def test_status_tells_where_everything_is(busy: Shell) -> None:
    found = busy.json("status")
    assert found["balance"] == {"received": 4, "delivered": 1, "held": 2, "quarantined": 1, "rejected": 0,
                                "on_its_way": 0, "difference": 0}
    assert {state: row["instances"] for state, row in found["shipments"].items()} == {"held": 2, "delivered": 1}
    assert busy("status") == 0
    assert "received 4 = delivered 1 + held 2 + quarantined 1 + rejected 0 + on its way 0" in busy.out


def test_a_ledger_that_does_not_balance_is_a_finding(busy: Shell) -> None:
    with busy.box.ledger.write() as connection:
        connection.execute("UPDATE tally SET value = value + 1 WHERE name = 'received'")
    assert busy.json("status", status=1)["balance"]["difference"] == 1
    assert busy("status") == 1 and "ALARM" in busy.out


def test_lists_and_pages(busy: Shell) -> None:
    assert [row["shipment"] for row in busy.json("list")] == [2, 1]
    assert [row["shipment"] for row in busy.json("list", "--state", "held", "--state", "ready")] == [1]
    assert [row["shipment"] for row in busy.json("list", "--limit", 1)] == [2]
    row, = busy.json("list", "--quarantined")
    assert (row["instance"], row["reason"]) == (4, "unreadable [really]")
    assert busy("list", "--quarantined") == 0 and "unreadable [really]" in busy.out
    found = busy.json("show", 2)
    assert (found["state"], found["deliveries"][0]["state"], found["series"][0]["instances"]) == (
        "delivered", "verified", 1)
    assert busy("show", 2) == 0 and "verified at central" in busy.out


def test_decisions_are_written_with_the_persons_name(busy: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "jane")
    assert busy("assign", 1, "--project", "P9") == 0 and "will be routed again" in busy.out
    assert busy("reject", 1, "--reason", "not ours") == 0
    assert busy("retry", 1) == 0
    assert busy("reject", 1, "--reason", " ") == 1 and "say why" in busy.err
    assert busy("retry", 4, "--quarantined") == 0
    history = busy.json("show", 1)["history"]
    assert [row["what"] for row in history][-3:] == [
        "complete: assigned project", "rejected: not ours", "complete: to be routed again"]
    assert [row["actor"] for row in history][-3:] == ["jane"] * 3


def test_receipts(busy: Shell) -> None:
    page, = busy.json("receipt", 2)
    assert page["destination"] == "central" and len(page["instances"]) == 1
    assert busy("receipt", 2) == 0 and page["hash"] in busy.out
    assert busy("receipt", 1) == 1 and "no receipt yet" in busy.out
    assert busy("receipt", 99) == 1 and "there is no shipment 99" in busy.err
    assert busy("receipt", "--verify") == 0 and "1 receipts, none removed or edited" in busy.out
    with busy.box.ledger.write() as connection:
        connection.execute("UPDATE receipt SET body = replace(body, 'central', 'elsewhere')")
    assert busy.json("receipt", "--verify", status=1) == {"receipts": 1, "faults": ["receipt 1 was edited"]}


def test_uploading_a_folder_with_junk_in_it(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "cd"
    (folder / "below").mkdir(parents=True)
    (folder / "a.dcm").write_bytes(Image(sop="1.1").file())
    (folder / "below" / "b").write_bytes(Image(sop="1.2").file())
    (folder / "autorun.inf").write_text("[autorun]")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    found = shell.json("upload", folder, status=1)
    assert (found["files"], found["taken"]) == (4, 2)
    assert {Path(entry["file"]).name for entry in found["problems"]} == {"autorun.inf", "gone"}
    sort_all(shell.box)
    assert shell.json("status")["balance"] | {"difference": 0} == {
        "received": 3, "delivered": 0, "held": 0, "quarantined": 1, "rejected": 0, "on_its_way": 2, "difference": 0}
    assert shell("upload", folder / "a.dcm") == 0 and "1 of 1 files" in shell.out
    assert shell("upload", tmp_path / "empty") == 1


def test_identifying_files(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "image.dcm").write_bytes(Image(comments="Project:P1 Session:E1 AA:true", name="A.B^C").file())
    (tmp_path / "junk.dcm").write_bytes(b"junk")
    good, junk, gone = shell.json("identify", tmp_path / "image.dcm", tmp_path / "junk.dcm", tmp_path / "gone.dcm",
                                  status=1)
    assert (good["project"], good["subject"], good["session"], good["auto_archive"]) == ("P1", "A_B_C", "E1", True)
    assert good["sources"]["project"] == "(0010,4000)"
    assert "no DICOM preamble" in junk["error"] and gone["error"] == "No such file or directory"
    assert shell("identify", tmp_path / "image.dcm") == 0 and "A_B_C" in shell.out
    shell.box.file.unlink()  # no configuration is needed to try it
    assert shell("identify", tmp_path / "image.dcm") == 0


def test_the_rules_of_the_configuration_count(shell: Shell, tmp_path: Path) -> None:
    shell.box.file.write_text(SETTINGS + '[identify]\nsession_rules = ["(0008,0018):(.*):1"]\n', encoding="utf-8")
    (tmp_path / "image.dcm").write_bytes(Image(sop="1.2").file())
    assert shell.json("identify", tmp_path / "image.dcm")[0]["session"] == "1_2"


def test_checking_without_the_network(shell: Shell) -> None:
    found = shell.json("check", "--offline", status=1)
    assert all(set(row) == {"ok", "what", "remedy"} for row in found) and any(not row["ok"] for row in found)


def test_the_example_is_toml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["example-config"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["receiver"][0]["ae_title"] == "RELAY"


@pytest.mark.parametrize("command", ["show 1", "status", "list", "check --offline", "receipt --verify"])
def test_json_is_all_that_stands_on_standard_output(busy: Shell, command: str) -> None:
    name, *rest = command.split()
    busy(name, *rest, "--json")
    json.loads(busy.out)


def test_a_reader_that_goes_away_is_no_error(box: Box) -> None:
    for number in range(60):
        box.receive(Image(study=f"9.{number}", sop=f"9.{number}.1"))
    sort_all(box)
    listing = subprocess.Popen([sys.executable, "-m", "relay_agent", "list", "--json", "--config", str(box.file)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listing.stdout is not None and listing.stderr is not None
    listing.stdout.close()
    assert listing.stderr.read() == b"" and listing.wait(30) in (0, 120)
    listing.stderr.close()
