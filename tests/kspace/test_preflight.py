"""`relay-agent check` tries the imager: a real SSH server, with all that may be wrong on the way to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay_agent import check, cli
from relay_agent.config import load
from relay_agent.kspace import remote
from tests.kspace.imager import Imager
from tests.kspace.path import raw, settings

pytestmark = pytest.mark.slow  # a real server


@pytest.fixture
def imager(tmp_path: Path) -> Iterator[Imager]:
    with Imager(tmp_path / "imager") as found:
        yield found


@pytest.fixture(params=["sftp", "rsync"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def look(imager: Imager, **changes: Any) -> tuple[list[str], list[str]]:
    """What is well with the imager and its key, and what is not, with the remedy."""
    file = imager.folder / "config.toml"
    text = settings(source=imager.table(**changes)).replace("https://xnat.example.org", "http://127.0.0.1:1")
    file.write_text(f'data = "{imager.folder.parent / "box"}"\n{text}')
    found = [one for one in check.run(load(file)) if any(words in one.what for words in (
        "prisma", f"{imager.folder}/", "credential bare"))]
    return [one.what for one in found if one.ok], [f"{one.what} → {one.remedy}" for one in found if not one.ok]


def test_all_is_well(imager: Imager, method: str) -> None:
    imager.write("Quellenhofer.dat", raw(), age=2 * 3600 + 30)
    imager.write("other.dat", raw(uid=2), age=60)
    imager.write("notes.txt", b"no raw data")
    good, bad = look(imager, method=method)
    assert bad == []
    assert good[0] == f"{imager.folder / 'client'}: private"
    user = imager.settings()["user"]
    assert good[1].startswith(f"kspace.source prisma: {user}@127.0.0.1 port {imager.port}: takes the key and shows the "
                              f"folder over {method}, 2 files of raw data, 44 kB, the oldest written 2 h ")
    assert len(good) == 2
    assert list(imager.folder.glob("**/known_hosts")) == [], "nothing is left behind"


@pytest.mark.parametrize(("change", "words"), [
    ({"host_key": "ssh-ed25519 " + "A" * 68}, "its host key is not the one of host_key"),
    ({"key": "stranger"}, "the key is refused; have its public part entered"), ({"port": 1}, "nothing listens there"),
    ({"folder": "/nowhere"}, "the folder, or a file in it, is not there"),
    ({"host": "no-such-host.invalid"}, "cannot be resolved"), ({"key": "sshd.log"}, "no private key"),
    ({"key": "nothing"}, "No such file or directory → write the private key for the imager into it"),
    ({"key": "bare"}, "credential bare: give an absolute path"),
    ({"list_command": "no-such-program"}, "a program is missing over there")])
def test_what_is_wrong_is_told_and_what_to_do(imager: Imager, method: str, change: dict[str, Any], words: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    imager.write("Quellenhofer.dat", raw())
    if change.get("key", "bare") != "bare":
        change = {"key": str(imager.folder / change["key"])}
        (imager.folder / "sshd.log").chmod(0o600)
    _, bad = look(imager, method=method, **change)
    assert bad and any(words in one for one in bad), bad
    assert all(" → " in one and not one.endswith("→ ") for one in bad) and "Quellenhofer" not in str(bad)
    assert "the scanner overwrites its raw data after 2 d" in bad[-1]


def test_another_folder(imager: Imager, method: str) -> None:
    imager.write("notes.txt", b"no raw data")
    _, (bad,) = look(imager, method=method)
    assert "the folder holds 1 files, and none is raw data by its name → correct pull.folder" in bad


def test_its_own_list(imager: Imager) -> None:
    for text, words in (("1 wip", "a scan is running"), ("1 ok", "no scan is running")):
        good, bad = look(imager, list_command=f"echo {text}")
        assert bad == [] and good[-1].endswith(f"by the scanner's own list {words}")


def test_names_that_cannot_be_fetched(imager: Imager, method: str) -> None:
    imager.write("meas.dat", raw())
    imager.write("me\x07as.dat", raw())
    _, (bad,) = look(imager, method=method)
    assert "1 files have names with characters" in bad


def test_a_program_that_is_missing_here(imager: Imager, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote._ENVIRONMENT, "PATH", str(imager.folder))
    monkeypatch.setenv("PATH", str(imager.folder))
    _, (bad,) = look(imager, method=method)
    assert f"{method} is not installed on this box" in bad


def test_the_command(imager: Imager, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is asked of an imager without network, and one that does not answer is a finding."""
    imager.stop()
    look(imager)
    file = imager.folder / "config.toml"
    began = time.monotonic()
    assert cli.main(["check", "--config", str(file)]) == 1
    assert "nothing listens there" in capsys.readouterr().out and time.monotonic() - began < 30
    cli.main(["check", "--offline", "--config", str(file)])
    assert "nothing listens there" not in capsys.readouterr().out
