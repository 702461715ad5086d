"""Log: one JSON object a line to the journal, or plain lines to a terminal, and never a word of anybody else's.

Libraries quote the values they stumble over, in log records, warnings and exceptions alike. So only this package's
own messages are written; of everything else no more than what kind it was and where in the code it happened.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from relay_agent.config import ConfigError
from relay_agent.destinations import DeliveryError
from relay_agent.ledger import LedgerError

log = logging.getLogger(__name__)

_OURS = "relay_agent"
_MUTED = ("pydicom", "pynetdicom", "py.warnings")  # too many, and of no use without their words
_SPEAKABLE = (ConfigError, DeliveryError, LedgerError)  # their texts are written for operators
_STANDARD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
_PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # sd-daemon(3)


def setup(level: str, stream: TextIO | None = None) -> None:
    """Write records of ``level`` (``debug`` … ``error``) and above to ``stream``, by default standard error.

    Also takes over warnings and what nobody caught, in any thread. May be called again.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Plain() if stream.isatty() else _JSON(priorities=_is_journal(stream)))
    handler.addFilter(_may_pass)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _MUTED:
        logger = logging.getLogger(name)
        logger.disabled = True  # and not by its level, which pydicom sets again
        # Of the loggers below it: without any handler, logging itself would print to standard error.
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
    logging.captureWarnings(True)  # before anybody can print one to standard error, text and all
    warnings.filterwarnings("ignore", module=r"pydicom|pynetdicom")  # cheaper than throwing them away later
    logging.raiseExceptions = False  # a record that cannot be formatted would be printed with its arguments
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda event: _uncaught(event.exc_type, event.exc_value, event.exc_traceback)
    threading.excepthook = lambda event: _uncaught(event.exc_type, event.exc_value, event.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, (KeyboardInterrupt, SystemExit)):
        log.critical("nobody caught this", exc_info=(kind, error or kind(), trace))


def _is_journal(stream: TextIO) -> bool:
    """Whether systemd connected this very stream to the journal (systemd.exec(5), ``$JOURNAL_STREAM``)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OURS


def _may_pass(record: logging.LogRecord) -> bool:
    """Ours, and of others only that something failed."""
    return _is_ours(record) or record.levelno >= logging.ERROR


def _message(record: logging.LogRecord) -> str:
    if not _is_ours(record):
        return f"withheld, it may quote data ({Path(record.pathname).name}:{record.lineno})"
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit: a fault of ours, which must not cost the record
        return str(record.msg)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """The fields given as ``extra``; others' may quote data as well."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD} if _is_ours(record) else {}


def _exceptions(error: BaseException | None) -> Iterator[dict[str, Any]]:
    """The exception and what it came from, last first: kind, frames, and the text only where it is one of ours."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        shown: dict[str, Any] = {"type": type(error).__name__, "frames": frames}
        if isinstance(error, _SPEAKABLE):
            shown["message"] = str(error)
        yield shown
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _caught(record: logging.LogRecord) -> list[dict[str, Any]]:
    return list(_exceptions(record.exc_info[1])) if record.exc_info else []


class _JSON(logging.Formatter):
    """One object a line, behind systemd's priority prefix where the journal reads it."""

    def __init__(self, priorities: bool) -> None:
        super().__init__()
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "logger": record.name,
                                "message": _message(record)}
        line |= {key: value for key, value in _extra(record).items() if key not in line}
        if caught := _caught(record):
            line["exception"] = caught
        text = json.dumps(line, default=_plain)
        return f"<{_priority(record.levelno)}>{text}" if self._priorities else text


class _Plain(logging.Formatter):
    """For people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(f" {key}={value if isinstance(value, str) else json.dumps(value, default=_plain)}"
                         for key, value in _extra(record).items())
        lines = [f"{moment} {record.levelname:8} {_message(record)}{fields}"]
        for caught in _caught(record):
            lines += [f"  {caught['type']} {caught.get('message', '')}".rstrip(),
                      *(f"    at {frame}" for frame in caught["frames"])]
        return "\n".join(lines)


def _plain(value: object) -> str:
    """For what JSON has no form: a path as text, of anything else only what kind it is."""
    return str(value) if isinstance(value, Path) else type(value).__name__


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITY if level >= least), 7)
