"""What lies on the disk and what the ledger says, looked at without the agent's own readers."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from relay_agent.ledger import balance
from tests.harness import Agent, wait_for
from tests.peers import needed


def not_permitted(what: str) -> NoReturn:
    """Skip: the machine does not let anybody do that, and installing something would not help."""
    pytest.skip(what)


def run(name: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of the peers'; its output is in the failure when it does not end with 0."""
    done = subprocess.run([needed(name), *map(str, arguments)], capture_output=True, text=True, errors="replace",
                          timeout=240, check=False)
    assert not check or done.returncode == 0, f"{done.args} gave {done.returncode}: {done.stdout}{done.stderr}"
    return done


def part10(path: Path) -> tuple[dict[int, bytes], bytes]:
    """File Meta elements and the bytes of the data set, by PS3.10 section 7.1 and nothing else."""
    raw = path.read_bytes()
    assert raw[:132] == bytes(128) + b"DICM", "no preamble"
    assert raw[132:140] == b"\2\0\0\0UL\4\0", "File Meta does not begin with its length"
    position, end = 144, 144 + struct.unpack_from("<I", raw, 140)[0]
    meta: dict[int, bytes] = {}
    last = 0
    while position < end:
        group, element, vr = struct.unpack_from("<HH2s", raw, position)
        assert group == 2 and element > last, "File Meta is out of order"
        last = element
        if vr == b"OB":
            length, position = struct.unpack_from("<I", raw, position + 8)[0], position + 12
        else:
            length, position = struct.unpack_from("<H", raw, position + 6)[0], position + 8
        assert length % 2 == 0
        meta[element] = raw[position:position + length]
        position += length
    assert position == end, "the length of File Meta is wrong"
    return meta, raw[end:]


def data_set(path: Path) -> bytes:
    """The data set's bytes of anybody's DICOM file."""
    raw = path.read_bytes()
    position = 132
    while raw[position:position + 2] == b"\2\0":
        if raw[position + 4:position + 6] in (b"OB", b"UN"):
            position += 12 + struct.unpack_from("<I", raw, position + 8)[0]
        else:
            position += 8 + struct.unpack_from("<H", raw, position + 6)[0]
    return raw[position:]


def rows(agent: Agent, sop_instance: str) -> list[Any]:
    """The ledger's rows of a SOP Instance."""
    return agent.ledger.all("SELECT * FROM instance WHERE sop_instance = ? ORDER BY id", sop_instance)


def row(agent: Agent, sop_instance: str) -> Any:
    """The one row of a SOP Instance, which comes a moment after the answer."""
    found = wait_for(lambda: rows(agent, sop_instance), say=f"{sop_instance} is not in the ledger")
    assert len(found) == 1
    return found[0]


def stored(agent: Agent, sop_instance: str) -> Path:
    """The file of a SOP Instance."""
    return agent.config.spool / str(row(agent, sop_instance)["path"])


def all_rows(agent: Agent, sop_instances: Iterable[str]) -> dict[str, Any]:
    """Rows of many instances, which must come: each exactly once."""
    wanted = set(sop_instances)

    def lacking() -> set[str]:
        return wanted - {r[0] for r in agent.ledger.all("SELECT sop_instance FROM instance")}

    try:
        wait_for(lambda: not lacking())
    except AssertionError:
        raise AssertionError(f"{len(lacking())} of {len(wanted)} that were acknowledged are not in the ledger; the "
                             f"agent says: {agent.log[-6000:]}") from None
    listed = [r for r in agent.ledger.all("SELECT * FROM instance") if r["sop_instance"] in wanted]
    assert len(listed) == len(wanted), "an instance has more than one row"
    return {r["sop_instance"]: r for r in listed}


def partials(agent: Agent) -> list[Path]:
    """Files that are still being written, or were left behind."""
    return [path for path in agent.config.spool.rglob("*") if path.is_file() and not path.name.endswith(".dcm")]


def intact(agent: Agent) -> int:
    """Every file hashes to its name and has its row, every row has its file, the sum is right; how many files."""
    def there() -> set[str]:
        return {str(path.relative_to(agent.config.spool)) for path in agent.config.spool.rglob("*.dcm")}

    def known() -> set[str]:
        return {r["path"] for r in agent.ledger.all("SELECT path FROM instance WHERE purged IS NULL")}

    wait_for(lambda: not partials(agent), say=f"left behind: {partials(agent)}")
    wait_for(lambda: known() == there(), say="ledger and spool do not become the same")
    paths = [agent.config.spool / path for path in there()]
    for path in paths:
        assert hashlib.sha256(part10(path)[1]).hexdigest() == path.stem, f"{path.name} is not what it is named"
    assert balance(agent.ledger).difference == 0
    return len(paths)


def children(pid: int) -> list[int]:
    """Processes that a process forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status_kib(pid: int, key: str) -> int:
    """A value in KiB of ``/proc/PID/status``."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def failures(log: str) -> list[dict[str, Any]]:
    """Lines of a log that tell of an exception nobody expected."""
    found = []
    for line in log.splitlines():
        assert not line.startswith("Traceback"), log[-3000:]
        entry = json.loads(line)
        if "exception" in entry or entry["level"] == "critical":
            found.append(entry)
    return found
