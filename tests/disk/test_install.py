from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager

import pytest
from relay_disk import install
from relay_disk.run import Failed, Refused, log


@pytest.fixture
def told(tmp_path, monkeypatch):
    """``told(failure)``: exit status and console of an installation that ends so."""
    @contextmanager
    def stick():
        yield install.Stick("/dev/sdz2", tmp_path)

    def run(failure):
        def fail(_):
            raise failure
        monkeypatch.setattr(install, "install", fail)
        return install.unattended(), (tmp_path / "console").read_text()

    monkeypatch.setattr(install, "stick", stick)
    monkeypatch.setattr(install, "consoles", lambda: [tmp_path / "console"])
    handlers, level = [*log.handlers], log.level
    log.setLevel(logging.DEBUG)  # as the command does
    yield run
    log.handlers[:] = handlers
    log.setLevel(level)


@pytest.mark.parametrize(("failure", "status", "end"), [
    (Refused("no disk was changed"), 3, "REFUSED"), (Failed("zpool create failed"), 1, "FAILED"),
    (OSError(errno.EROFS, "Read-only file system", "recovery"), 1, "FAILED"), (KeyError("box"), 1, "FAILED")])
def test_screen_says_how_it_ended(told, tmp_path, failure, status, end):
    done, console = told(failure)
    assert done == status
    assert f"== {end}: " in console.splitlines()[-1]
    assert "Traceback" not in console
    known = isinstance(failure, Failed)
    assert ("Traceback" in (tmp_path / "install.log").read_text()) is not known, "whoever mends it needs to know where"


def test_stick_that_cannot_be_written(tmp_path, monkeypatch):
    """Before any disk is touched: its recovery key would have no place."""
    (tmp_path / "install.conf").write_text("recovery = age1...\n")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Refused, match="write protection"):
        install.install(install.Stick("/dev/sdz2", tmp_path))
