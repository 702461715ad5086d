"""What the disk may still hold of raw data. DICOM comes first: raw data stop while there is room for it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime, timedelta

from relay_agent.config import Config
from relay_agent.config_destinations import XNAT
from relay_agent.ledger import Ledger, State
from relay_agent.throttle import Closed, Throttle

_WEEK = 7 * 86400.0
_DAY = 86400.0


def left(config: Config) -> int:
    """Bytes that raw data may still take; 0: nothing more is fetched or copied."""
    folder = config.kspace_spool if config.kspace_spool.exists() else config.data
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize - config.kspace.reserve
    if config.kspace.quota is not None:
        free = min(free, config.kspace.quota - used(config))
    return max(free, 0)


def used(config: Config) -> int:
    """Bytes on the disk of all raw data: landed, kept, made to leave."""
    total = 0
    for folder, _, names in os.walk(config.kspace_spool.parent):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


@dataclass(frozen=True, slots=True)
class Outlook:
    """Whether the disk will hold what the scanners produce before raw data can leave again."""

    left: int
    freed: int  # bytes that will be purged by then
    there: int  # bytes that are to be fetched and still lie on the scanners
    daily: int  # bytes of raw data a day, mean of the last week or since the first
    window: float  # seconds until raw data may leave; 0: at any time

    @property
    def expected(self) -> int:
        """Bytes that will come before the next window has opened and a day has passed in which to send."""
        return self.there + int(self.daily * (self.window + _DAY) / _DAY)

    @property
    def short(self) -> bool:
        """Whether that is more than there is room for."""
        return self.expected > self.left + self.freed


def outlook(config: Config, ledger: Ledger, now: float | None = None) -> Outlook:
    """The outlook as the ledger and the windows have it now."""
    now = time.time() if now is None else now
    row = ledger.one("SELECT coalesce(sum(i.size), 0) AS bytes, min(i.arrived) AS first FROM instance i JOIN raw r ON "
                     "r.instance = i.id WHERE i.arrived > ?", now - _WEEK)
    assert row is not None
    days = min(max(now - (row["first"] or now), _DAY), _WEEK) / _DAY
    takers = {name for route in config.route if route.kspace for name in route.destinations}
    window = max((_until_open(one, now) for one in config.destination if one.name in takers and isinstance(one, XNAT)),
                 default=0.0)
    freed = ledger.value("SELECT sum(bytes) FROM shipment WHERE kind = 'raw' AND state = ? AND changed <= ?",
                         State.DELIVERED, now + window + _DAY - config.purge.retention)
    there = ledger.value("SELECT sum(size) FROM listed WHERE wanted AND fetched IS NULL")
    return Outlook(left(config), freed or 0, there or 0, round(row["bytes"] / days), window)


def _until_open(destination: XNAT, now: float) -> float:
    """Seconds until the windows of a destination and those of its raw data are open at the same time."""
    moment = datetime.fromtimestamp(now)
    throttle = Throttle(None, destination.kspace.windows, Throttle(None, destination.windows, now=lambda: moment),
                        now=lambda: moment)
    while True:  # they have a time in common, so this ends within two days
        try:
            throttle.limit()
        except Closed as closed:
            moment += timedelta(seconds=closed.seconds)
        else:
            return (moment - datetime.fromtimestamp(now)).total_seconds()
