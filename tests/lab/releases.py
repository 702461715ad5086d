"""Releases that never were: today's agent with a few words changed, as what comes next or went wrong."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from tests.box.conftest import PROJECT

RELEASE = PROJECT / "build/relay-agent.tar"
Change = tuple[str, str, str]  # file, words, other words

VERSION = ("relay_agent/__init__.py", '__version__ = "', '__version__ = "9.')
# What a release does wrong: it cannot receive; it works no more; it migrates the ledger, then works no more.
DEAF = ("relay_agent/receive.py", "    return _Master(config)",
        "    raise SystemExit('this release is deaf')\n    return _Master(config)")
IDLE = ("relay_agent/worker.py", "        reconcile(",
        "        raise SystemExit('this release is idle')\n        reconcile(")
NEWER = ("relay_agent/ledger.py", "\n)\n\n\nclass LedgerError",
         "\n    'CREATE TABLE later (id INTEGER PRIMARY KEY)',\n)\n\n\nclass LedgerError")


def release(name: str, *changes: Change) -> Path:
    """A release in which each file's text was replaced by another one."""
    target = PROJECT / f"build/lab/releases/{name}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(RELEASE) as today, tarfile.open(target, "w") as made:
        for member in today:
            content = today.extractfile(member)
            data = content.read() if content else b""
            if Path(member.name).name.startswith("relay_agent-"):
                data = _changed(data, (VERSION, *changes))
                member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return target


def _changed(wheel: bytes, changes: tuple[Change, ...]) -> bytes:
    result = io.BytesIO()
    left = list(changes)
    with zipfile.ZipFile(io.BytesIO(wheel)) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            text = old.read(entry)
            for change in changes:
                if entry.filename == change[0] and change[1].encode() in text:
                    text = text.replace(change[1].encode(), change[2].encode(), 1)
                    left.remove(change)
            new.writestr(entry, text)
    assert not left, f"the source has not these words any more: {left}"
    return result.getvalue()
