"""From the stick, when a box does not start: look, check, open read-only, bring away what was not delivered."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from relay_disk import boot, pool
from relay_disk import key as keys
from relay_disk.disks import Disk, scan
from relay_disk.plan import candidates
from relay_disk.run import Failed, ask, log, tried

PLACE = Path("/run/relay-rescue")
_DATA = pool.DATASETS[0]
_SETTLED = ("delivered", "purged")


def show() -> str:
    """Every disk and what is on it; nothing is opened, nothing changed."""
    lines = []
    for disk in candidates(scan()):
        lines.append(f"{disk}: {disk.holds}")
        lines += [f"    {part.number}: {part.role or part.name or 'no name'}, {part.content or 'nothing known'}"
                  for part in disk.parts]
    return "\n".join(lines) or "no disk is built in"


def check(relay: str = "") -> list[str]:
    """Faults found without changing anything; the pool needs no key for that."""
    disks = [disk for disk in scan() if disk.relay and relay in ("", disk.relay)]
    faults = []
    for disk in disks:
        faults += _smart(disk)
        part = boot.esp(disk)
        if part and not boot.digest(part.path):
            faults.append(f"{disk}: its boot partition holds nothing that starts")
    for root in sorted({array for disk in disks for array in disk.arrays}) or [
            part.path for disk in disks if (part := disk.part("root")) and part.content == "ext4"]:
        if not tried("fsck.ext4", "-n", root):
            faults.append(f"the file system of the OS on {root} has faults; install anew and keep the pool")
    if not pool.imported():
        pool.bring(pool.find(relay), "-o", "readonly=on")
    state = pool.state()
    if state["state"] != "ONLINE" or int(state.get("error_count") or 0):
        faults.append(f"the pool is {state['state']}: {state.get('status', 'zpool status -v')}")
    return faults


def _smart(disk: Disk) -> list[str]:
    """Words when the disk itself says that it fails; no answer is no fault, for some disks have none."""
    try:
        ask("smartctl", "--health", "--quietmode=errorsonly", disk.path)
    except Failed as error:
        return [f"{disk}: {error}"] if "FAILED" in str(error) else []
    return []


def unlock(given: str, relay: str = "") -> Path:
    """Open the pool read-only below :data:`PLACE`, with the recovery key."""
    key = keys.parse(given)
    if not pool.imported():
        pool.bring(pool.find(relay), "-o", "readonly=on")
    if pool.locked():
        pool.load(key)
    pool.mount(PLACE, "ro")
    return PLACE


def close() -> None:
    """Let everything go again."""
    pool.unmount(PLACE)
    if pool.imported():
        pool.export()


def settled(ledger: Path) -> list[str]:
    """Files below the spool that were proved to have arrived everywhere, as the ledger knows.

    It is read from a copy with its write-ahead log, for the pool is open read-only.
    """
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        for part in ("", "-wal"):
            source = ledger.with_name(ledger.name + part)
            if source.exists():
                shutil.copy(source, folder)
        connection = sqlite3.connect(Path(folder) / ledger.name)
        try:
            rows = connection.execute("SELECT path FROM instance JOIN shipment ON shipment.id = instance.shipment "
                                      "WHERE shipment.state IN (?, ?)", _SETTLED).fetchall()
        except sqlite3.DatabaseError as error:
            raise Failed(f"the ledger cannot be read ({error}); bring everything away: --all") from None
        finally:
            connection.close()
    return [row[0] for row in rows]


def copy(below: Path, target: Path, recipients: Sequence[str], everything: bool = False) -> Path:
    """Bring away the agent's data but what was delivered, as one file encrypted to the coordinating site.

    What the ledger does not know is brought away too; only what it knows to have arrived is left out.
    """
    data = below / _DATA.place.relative_to("/")
    ledger = data / "ledger.sqlite"
    gone = [] if everything or not ledger.exists() else settled(ledger)
    path = target / f"relay-data-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.age"
    encrypt = ["age", "--encrypt", *(word for recipient in recipients for word in ("--recipient", recipient))]
    if not recipients:
        raise Failed("say whom the data are for: --recipient age1...; they are never written in the open")
    with tempfile.NamedTemporaryFile("w", dir="/run") as names:
        names.writelines(f"./{folder}spool/{name}\n" for name in gone for folder in ("", "kspace/"))
        names.flush()
        archive = ["tar", "--create", "--directory", str(data), "--anchored", "--no-wildcards",
                   f"--exclude-from={names.name}", "--xattrs", "."]
        log.info("writing %s, without %d files that were delivered", path, len(gone))
        with path.open("xb") as file, subprocess.Popen(archive, stdout=subprocess.PIPE) as source:
            encrypted = subprocess.run(encrypt, stdin=source.stdout, stdout=file, check=False, stderr=subprocess.PIPE)
            if encrypted.returncode and source.stdout:
                source.stdout.close()
    if encrypted.returncode or source.returncode:
        path.unlink()
        words = encrypted.stderr.decode(errors="replace").strip() or "tar failed"
        raise Failed(f"not written: {words}; is {target} full?")
    ask("sync", str(path))
    return path
