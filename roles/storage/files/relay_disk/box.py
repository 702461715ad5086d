"""The installed box: opens its pool at every start, or says how a person can."""

from __future__ import annotations

import time
from pathlib import Path

from relay_disk import boot, pool
from relay_disk import key as keys
from relay_disk.disks import Disk, scan
from relay_disk.run import Failed, consoles, do, log, tell, tried

_ISSUE = Path("/run/issue.d/05-relay-disk.issue")
_UNIT = "relay-pool.service"
_PATIENCE = 120  # seconds


def own(disks: list[Disk]) -> str:
    """Id of the installation that this system runs from."""
    found = {disk.relay for disk in disks if "/" in disk.used and disk.relay}
    if len(found) != 1:
        raise Failed("this system does not run from the disk of a relay box")
    return found.pop()


def open_pool() -> None:
    """As the unit does at start: finish what a power cut left of the installation, then import and load the key."""
    end = time.monotonic() + _PATIENCE
    while True:  # on a slow or busy machine udev knows the partitions' names later
        disks = scan(look_inside=False)
        try:
            relay = own(disks)
            break
        except Failed:
            if time.monotonic() > end:
                raise
            time.sleep(1)
    if boot.finish([disk for disk in disks if disk.relay == relay]):
        log.info("the installation is finished now")
    try:
        if not pool.imported():
            pool.bring(pool.find(relay))
        if pool.locked():
            pool.load(pool.own_key())
    except Failed as error:
        _say_locked(relay, error)
        raise
    if _ISSUE.exists():
        _ISSUE.unlink()
        tried("agetty", "--reload")


def _say_locked(relay: str, error: Failed) -> None:
    """On every console, and above every log-in: whoever stands there has no account and no journal."""
    lines = [f"LOCKED: the data of this box (relay {relay}) cannot be opened, so it takes no images. Nothing is lost.",
             f"  why: {error}",
             f"  what to do: tell the coordinating site. It has the recovery key of relay {relay}, and gives it,",
             "  logged in on this box, to: sudo relay-disk unlock"]
    tell(*consoles())
    for line in lines:
        log.error("%s", line)
    _ISSUE.parent.mkdir(parents=True, exist_ok=True)
    _ISSUE.write_text("\n".join(lines).replace("\\", "\\\\") + "\n")
    tried("agetty", "--reload")


def unlock(given: str) -> None:
    """Open the pool with the recovery key, and start what waits for it."""
    if not pool.imported():
        pool.bring(pool.find(own(scan(look_inside=False))))
    if pool.locked():
        pool.load(keys.parse(given))
    # Units that were given up are started as at any start of the box. A target that is reached already has only what it
    # wants itself started, so each is named: mounts, the journal's way to its disk, and all else.
    tried("systemctl", "reset-failed")
    do("systemctl", "start", _UNIT)
    do("systemctl", "start", "local-fs.target")
    do("systemctl", "start", "sysinit.target")
    do("systemctl", "start", "--no-block", "multi-user.target")
    log.info("open. At the next start it is locked again, unless the key is sealed anew: relay-disk seal")


def seal(given: str) -> None:
    """Seal the key to this machine's TPM as it is now: after a new main board, or when Secure Boot was turned on.

    ZFS gives no key back, so a person gives it.
    """
    key = keys.parse(given)
    do("zfs", "load-key", "-n", pool.POOL, given=key)
    keys.prove_tpm()
    pool.put(pool.SEALED, keys.seal(key))
    if keys.OPEN_KEY.exists():
        keys.OPEN_KEY.unlink()
    log.info("sealed to %s", keys.binding())


def recovery() -> str:
    """The recovery key of this pool, encrypted for the coordinating site."""
    value = pool.get(pool.RECOVERY)
    if not value:
        raise Failed("this pool has no recovery key")
    return keys.unpacked(value)
