"""Pull: raw data are fetched from a scanner's back end before it overwrites them, without disturbing a scan.

The folder over there is listed now and then. When two lists are the same, in idle hours, files are fetched one after
another, oldest first, and only until something changes. What was fetched goes into the landing directory, where pick-up
takes it like any other. The ledger's ``listed`` says what is over there, and since when it waits.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from relay_agent.config import Config, ConfigError
from relay_agent.config_kspace import KSpaceSource, Pull
from relay_agent.deidentify.key import box_key
from relay_agent.journal import sync_folder
from relay_agent.kspace import room
from relay_agent.kspace.keep import hidden
from relay_agent.kspace.pickup import fits
from relay_agent.kspace.remote import Entry, Failed, Interrupted, Remote
from relay_agent.kspace.twix import NotTwix, Verdict, layout
from relay_agent.ledger import Ledger, note
from relay_agent.throttle import Closed, Throttle
from relay_agent.units import show_size

log = logging.getLogger(__name__)

_TRIES = 3  # of a file that is not whole over there; then it is taken as it is, and shown
_AGAIN = 1800.0  # seconds until the next
_LONGEST = 900.0  # between lists while the imager cannot be reached
_BEFORE, _AFTER = 12 * 3600.0, 2 * 3600.0  # a session's raw data were written so long around its arrival at most
_RETROSPECTIVE = 3_000_000  # MeasUIDs from here on are reconstructions of what was measured before
_UID = re.compile(r"MID0*(\d+)")
_STALE = 7 * 86400.0  # seconds after which the beginning of a file is given up


class Puller:
    """Fetches from one source, for ever; run() in a thread of its own."""

    def __init__(self, config: Config, ledger: Ledger, source: KSpaceSource, stop: threading.Event) -> None:
        assert source.pull is not None
        self.name = source.name
        self._config = config
        self._ledger = ledger
        self._source = source
        self._settings: Pull = source.pull
        self._stop = stop
        self._key = box_key(config, ledger)
        self._landing = config.kspace_landing / source.name
        self._remote = Remote(self._settings, config.data / "scratch" / source.name)
        self._throttle = Throttle(self._settings.bandwidth, self._settings.windows)
        self._last: list[Entry] | None = None  # the list before, None after a change
        self._failures = 0
        self.trouble = ""
        """What operators should know; empty when all is well."""

    def run(self) -> None:
        """Work until told to stop."""
        while not self._stop.is_set():
            try:
                pause = self.step()
            except Exception:  # a full disk, a locked ledger: it is done again
                log.exception("fetching raw data failed and is done again")
                pause = 60.0
            self._stop.wait(pause)

    def step(self) -> float:
        """List, and fetch what is due; seconds until the next look."""
        try:
            entries = self._look()
            if entries is None:
                return self._settings.poll
            self._landing.mkdir(parents=True, exist_ok=True)
            self._drop_stale()
            self.trouble = (f"{self._remote.strange} files of {self._source.name} have names with characters that "
                            "cannot be fetched; have them renamed over there") if self._remote.strange else ""
            for entry in self._due(entries):
                if not self._fetch(entry):
                    break
            self._failures = 0
        except Closed as closed:
            self._failures = 0
            return min(closed.seconds, self._settings.poll)
        except Interrupted:
            log.info("fetching raw data stopped: a scan runs, or its hours are over",
                     extra={"source": self._source.name})
            self._last = None
        except (Failed, ConfigError) as error:
            self._last = None
            self._failures += 1
            self.trouble = f"raw data of {self._source.name} cannot be fetched from {self._settings.host}: {error}"
            log.warning("%s", self.trouble)
            pause: float = self._settings.poll * 2 ** min(self._failures - 1, 10)
            return min(pause, max(_LONGEST, self._settings.poll))
        return self._settings.poll

    def _look(self) -> list[Entry] | None:
        """The list, when nothing has changed since the one before and no scan runs; :class:`Closed` in other hours."""
        entries = self._remote.entries()
        self._note(entries)
        calm = entries == self._last and not self._remote.scanning()
        self._last = entries
        self._throttle.limit()
        return entries if calm else None

    # The ledger

    def _note(self, entries: list[Entry]) -> None:
        """Bring ``listed`` up to date with what is over there."""
        now = time.time()
        found = {self._hidden(entry.name): entry for entry in entries if fits(entry.name, self._source)}
        with self._ledger.write() as connection:
            known = {row["name"]: row for row in connection.execute("SELECT * FROM listed WHERE source = ?",
                                                                    (self._source.name,))}
            for name, entry in found.items():
                row = known.get(name)
                new = row is None or (row["size"], row["changed"]) != (entry.size, entry.changed)
                connection.execute(
                    "INSERT INTO listed (source, name, size, changed, first_seen, last_seen, wanted) VALUES "
                    "(?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET size = excluded.size, changed = excluded.changed, "
                    "last_seen = excluded.last_seen, wanted = excluded.wanted",
                    (self._source.name, name, entry.size, entry.changed, now, now, self._wanted(connection, entry)))
                if new and row is not None:  # another file, or more of it
                    connection.execute("UPDATE listed SET fetched = NULL, attempts = 0, due = 0, error = NULL WHERE "
                                       "source = ? AND name = ?", (self._source.name, name))
                elif row is not None and self._arrived_incomplete(connection, entry, row):
                    self._put_off(connection, name, row["attempts"], "it arrived and is not whole")
            self._forget(connection, {name: row for name, row in known.items() if name not in found})

    def _forget(self, connection: sqlite3.Connection, gone: Mapping[str, sqlite3.Row]) -> None:
        lost = sum(1 for row in gone.values() if row["wanted"] and row["fetched"] is None)
        if lost:
            log.error("%d files of raw data are gone over there and were never fetched", lost,
                      extra={"source": self._source.name})
            note(connection, None, f"{lost} files of raw data of {self._source.name} are gone over there and were "
                                   "never fetched: overwritten, or deleted by somebody")
        connection.executemany("DELETE FROM listed WHERE source = ? AND name = ?",
                               [(self._source.name, name) for name in gone])

    def _arrived_incomplete(self, connection: sqlite3.Connection, entry: Entry, row: sqlite3.Row) -> bool:
        if row["fetched"] is None or row["attempts"] >= _TRIES:
            return False
        raw = connection.execute("SELECT r.verdict FROM raw r JOIN instance i ON i.id = r.instance WHERE r.origin = ? "
                                 "AND i.arrived >= ? ORDER BY r.shipment DESC LIMIT 1",
                                 (self._hidden(f"{self._source.name}/{entry.name}"), row["fetched"])).fetchone()
        return raw is not None and raw["verdict"] == Verdict.INCOMPLETE

    def _put_off(self, connection: sqlite3.Connection, name: str, attempts: int, why: str) -> None:
        connection.execute("UPDATE listed SET fetched = NULL, attempts = ?, due = ?, error = ? WHERE source = ? AND "
                           "name = ?", (attempts + 1, time.time() + _AGAIN * 2**attempts, why, self._source.name, name))

    def _wanted(self, connection: sqlite3.Connection, entry: Entry) -> bool:
        """Whether a file is to be fetched: by its size and name, and because a session of its time was received."""
        uid = _UID.search(entry.name)
        if entry.size < self._settings.smallest or (uid and int(uid[1]) >= _RETROSPECTIVE):
            return False
        if self._settings.everything:
            return True
        routes = [route.name for route in self._config.route if route.kspace]
        titles = self._source.receivers
        receivers = [one.name for one in self._config.receiver if not titles or one.ae_title in titles]
        return connection.execute(
            f"SELECT 1 FROM shipment WHERE kind = 'session' AND route IN ({', '.join('?' * len(routes))}) AND receiver "
            f"IN ({', '.join('?' * len(receivers))}) AND opened - ? <= ? AND last_arrival + ? >= ? LIMIT 1",
            (*routes, *receivers, _BEFORE, entry.changed, _AFTER, entry.changed)).fetchone() is not None

    def _due(self, entries: list[Entry]) -> list[Entry]:
        """What is to be fetched now, the oldest first: it is overwritten first."""
        names = {row["name"] for row in self._ledger.all(
            "SELECT name FROM listed WHERE source = ? AND wanted AND fetched IS NULL AND due <= ?", self._source.name,
            time.time())}
        there = {entry.name for entry in entries}
        due = [entry for entry in entries if self._hidden(entry.name) in names and not there & _locks(entry.name)]
        return sorted(due, key=lambda entry: (entry.changed, entry.name))

    def _hidden(self, name: str) -> str:
        return hidden(self._key, "file", name)

    # Fetching

    def _fetch(self, entry: Entry) -> bool:
        """Bring one file into the landing directory; False when nothing more is to be fetched now."""
        name, target = self._hidden(entry.name), self._landing / entry.name
        if target.exists():  # an earlier version, not picked up yet
            return True
        partial = self._landing / f".{name}-{entry.size}-{entry.changed:.0f}.part"
        here = partial.stat().st_size if partial.exists() else 0
        if here > entry.size:
            partial.unlink()
        left = room.left(self._config)
        if entry.size - here > left:
            self.trouble = (f"raw data of {self._source.name} wait over there, {show_size(entry.size)} the next file, "
                            f"and there is room for {show_size(left)}")
            return False
        try:
            self._remote.fetch(entry, partial, self._throttle.limit(), self._going_on())
        except Failed as error:
            if partial.exists() and partial.stat().st_size >= entry.size:
                partial.unlink()
            # Where the disk is full, the ledger may have no room either; the trouble is told all the same.
            with suppress(sqlite3.Error), self._ledger.write() as connection:
                connection.execute("UPDATE listed SET error = ? WHERE source = ? AND name = ?",
                                   (str(error), self._source.name, name))
            raise
        if entry not in self._remote.entries():
            partial.unlink()
            raise Interrupted  # it was changed while it was fetched
        attempts = self._ledger.value("SELECT attempts FROM listed WHERE source = ? AND name = ?", self._source.name,
                                      name) or 0
        problem = "" if self._source.opaque else _problem(partial)
        if problem and attempts + 1 < _TRIES:
            partial.unlink()
            log.warning("raw data over there are not whole yet: %s", problem, extra={"source": self._source.name})
            with self._ledger.write() as connection:
                self._put_off(connection, name, attempts, problem)
            return True
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(target)
        sync_folder(self._landing)
        with self._ledger.write() as connection:
            connection.execute("UPDATE listed SET fetched = ?, attempts = attempts + 1, error = NULL WHERE source = ? "
                               "AND name = ?", (time.time(), self._source.name, name))
        log.info("raw data fetched", extra={"source": self._source.name, "bytes": entry.size})
        return True

    def _going_on(self) -> Callable[[], bool]:
        """Whether to go on with a file: its hours last, and the list, looked at now and then, stays as it was."""
        looked = time.monotonic()

        def go_on() -> bool:
            nonlocal looked
            try:
                self._throttle.limit()
            except Closed:
                return False
            if self._stop.is_set():
                return False
            if time.monotonic() - looked < self._settings.poll:
                return True
            looked = time.monotonic()
            return self._remote.entries() == self._last and not self._remote.scanning()
        return go_on

    def _drop_stale(self) -> None:
        """Forget the beginnings of files that will not go on."""
        for path in self._landing.glob(".*.part"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_ctime > _STALE:
                    path.unlink()


def _locks(name: str) -> set[str]:
    """Files beside it by which somebody says that it is still written (Yarra RDS)."""
    return {f"{name}.lock", f"{name.rpartition('.')[0]}.lock"}


def _problem(path: Path) -> str:
    """Why a file is not whole, from its headers alone; empty when it may be, or is in a format of others."""
    with path.open("rb") as file:
        try:
            return layout(file.fileno(), path.stat().st_size).problem
        except NotTwix:
            return ""
