"""The log: its forms, and that nobody else's words get into it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from relay_agent import log
from relay_agent.config import ConfigError
from relay_agent.destinations import Retry, Stopped
from relay_agent.ledger import LedgerError

Lines = Callable[[], list[dict[str, Any]]]
ours = logging.getLogger("relay_agent.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process as it was: logging is everybody's."""
    loggers = [logging.getLogger(name) for name in (None, "pydicom", "pynetdicom", "py.warnings")]
    states = [(logger, dict(vars(logger))) for logger in loggers]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    logging.raiseExceptions = True
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    for logger, state in states:
        vars(logger).update(state)
    logging.getLogger().setLevel(logging.getLogger().level)  # also forgets what loggers remember of levels


@pytest.fixture
def stream() -> io.StringIO:
    out = io.StringIO()
    log.setup("info", out)
    return out


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_object_a_line(lines: Lines) -> None:
    ours.info("sent %d\nparts", 3, extra={"shipment": 12, "spool": Path("/x"), "time": "not this"})
    ours.debug("below the level")
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "relay_agent.test", "message": "sent 3\nparts", "shipment": 12,
                    "spool": "/x"}


class Secretive:
    def __str__(self) -> str:
        return "PLANTED"

    __repr__ = __str__


def test_an_extra_field_of_unknown_kind_shows_only_its_kind(stream: io.StringIO, lines: Lines) -> None:
    ours.info("it", extra={"what": Secretive()})
    assert lines()[0]["what"] == "Secretive"


def test_arguments_that_do_not_fit_cost_neither_the_record_nor_a_secret(
        stream: io.StringIO, lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    ours.error("%d instances", "PLANTED")
    assert lines()[0]["message"] == "%d instances"
    assert "PLANTED" not in stream.getvalue() + "".join(capsys.readouterr())


def test_an_exception_shows_its_kind_and_frames_but_not_its_words(stream: io.StringIO, lines: Lines) -> None:
    try:
        try:
            int("PLANTED")
        except ValueError as error:
            raise KeyError("PLANTED") from error
    except KeyError:
        ours.exception("it failed")
    (line,) = lines()
    assert [caught["type"] for caught in line["exception"]] == ["KeyError", "ValueError"]
    assert line["exception"][0]["frames"][0].startswith(f"{__file__}:")
    assert "PLANTED" not in stream.getvalue()


@pytest.mark.parametrize("kind", [ConfigError, LedgerError, Retry, Stopped])
def test_our_own_exceptions_may_speak(lines: Lines, kind: type[Exception]) -> None:
    try:
        raise kind("do this")
    except kind:
        ours.exception("it failed")
    assert lines()[0]["exception"][0]["message"] == "do this"


def test_our_own_exception_does_not_speak_for_its_cause(stream: io.StringIO, lines: Lines) -> None:
    try:
        try:
            int("PLANTED")
        except ValueError as error:
            raise Retry("later") from error
    except Retry:
        ours.exception("it failed")
    assert [caught.get("message") for caught in lines()[0]["exception"]] == ["later", None]
    assert "PLANTED" not in stream.getvalue()


def test_of_others_only_that_something_failed(stream: io.StringIO, lines: Lines) -> None:
    foreign = logging.getLogger("urllib3.connectionpool")
    foreign.warning("retrying /subjects/PLANTED")
    foreign.error("%s", "PLANTED", extra={"url": "PLANTED"})
    logging.getLogger("relay_agentic").warning("PLANTED")
    (line,) = lines()
    assert line["logger"] == "urllib3.connectionpool"
    assert line["message"].startswith("withheld, it may quote data (test_log.py:")
    assert "PLANTED" not in stream.getvalue()


def _planted() -> Dataset:
    """A data set read from bytes, with values that their VR does not allow."""
    def element(tag: bytes, vr: bytes, value: bytes) -> bytes:
        return tag + vr + len(value).to_bytes(2, "little") + value

    data = (element(b"\x08\0\x18\0", b"UI", b"1.2.PLANTEDUID") + element(b"\x10\0\x20\0", b"LO", b"PLANTED" * 10)
            + element(b"\x10\0\x30\0", b"DA", b"PLANTEDxx ") + element(b"\x20\0\x13\0", b"IS", b"PLANTEDnum"))
    return pydicom.dcmread(io.BytesIO(bytes(128) + b"DICM" + element(b"\2\0\x10\0", b"UI", b"1.2.840.10008.1.2.1\0")
                                      + data), force=True)


def _provoke() -> None:
    dataset = _planted()
    for tag in list(dataset.keys()):
        try:
            str(dataset[tag].value)
        except Exception:
            logging.getLogger("pydicom").exception("PLANTED")
    logging.getLogger("pydicom").critical("PLANTED")
    logging.getLogger("pynetdicom.acse").critical("PLANTED")
    warnings.warn("PLANTED", UserWarning, stacklevel=1)


@pytest.mark.filterwarnings("ignore:The value length")  # one that quotes no value
def test_the_planted_values_do_provoke_pydicom(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="PLANTED") as caught:
        _provoke()
    assert {"pydicom"} <= {record.name for record in caplog.records}
    assert len([w for w in caught if "PLANTED" in str(w.message)]) >= 3  # pydicom's, and the last one


@pytest.mark.parametrize("level", [
    "debug", *(pytest.param(level, marks=pytest.mark.slow) for level in ("info", "error"))])
def test_pydicom_and_warnings_stay_silent(tmp_path: Path, level: str) -> None:
    """In a process of its own, where no test tool stands between a warning and standard error."""
    script = tmp_path / "provoke.py"
    script.write_text(f"""
import sys, threading
sys.path[:0] = {[str(Path(__file__).parents[2]), str(Path(__file__).parent)]!r}
from relay_agent import log
log.setup({level!r})
import logging, test_log
test_log._provoke()
import pydicom.config
pydicom.config.debug(False)
test_log._provoke()
class Late:
    def __del__(self):
        raise ValueError("PLANTED")
Late()
thread = threading.Thread(target=int, args=("PLANTED",))
thread.start()
thread.join()
logging.getLogger("relay_agent").error("the end")
int("PLANTED")
""")
    done = subprocess.run([sys.executable, "-W", "always", script], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 1
    assert "PLANTED" not in done.stdout + done.stderr
    shown = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in shown] == ["nobody caught this", "nobody caught this", "the end",
                                                   "nobody caught this"]
    assert shown[1]["exception"][0]["type"] == "ValueError"


def test_systemd_priorities_only_on_the_journals_own_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.setup("debug", journal)
        for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
            ours.log(level, "it")
        journal.seek(0)
        assert [line[:4] for line in journal] == ["<2>{", "<3>{", "<4>{", "<6>{", "<7>{"]
    other = io.StringIO()
    log.setup("debug", other)
    ours.info("it")
    assert other.getvalue().startswith("{")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_at_a_terminal() -> None:
    terminal = Terminal()
    log.setup("info", terminal)
    ours.warning("it", extra={"shipment": 12, "destination": "central"})
    try:
        raise Retry("later") from ValueError("PLANTED")
    except Retry:
        ours.exception("it failed")
    first, second, *rest = terminal.getvalue().splitlines()
    assert first.endswith(" WARNING  it shipment=12 destination=central")
    assert second.endswith(" ERROR    it failed")
    assert rest[0] == "  Retry later"
    assert rest[1].startswith(f"    at {__file__}:")
    assert rest[2:] == ["  ValueError"]


def test_setting_up_twice_writes_once(stream: io.StringIO) -> None:
    log.setup("info", stream)
    ours.info("it")
    assert len(stream.getvalue().splitlines()) == 1
