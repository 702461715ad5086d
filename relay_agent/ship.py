"""Ship: brings shipments to one destination, for ever, each on its own; raw data beside sessions and after them."""

from __future__ import annotations

import contextlib
import logging
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from relay_agent import package
from relay_agent.config import Config, ConfigError
from relay_agent.destinations import Destination, Retry, Stopped, Waiting
from relay_agent.destinations.factory import open_destination
from relay_agent.destinations.xnat_raw import XNATRaw
from relay_agent.ledger import Ledger, State, Stop, move, note
from relay_agent.package import Damaged, Item, Manifest, TooLarge, parts
from relay_agent.route import Lapsed, require_current
from relay_agent.throttle import Closed
from relay_agent.verify import verify

log = logging.getLogger(__name__)

_PART, _SMALL_PART = 256 * 2**20, 8 * 2**20
_LOOK_AGAIN = 900.0  # seconds between looks at a session that waits in the prearchive
_TURN = 1.0  # seconds between looks whether sessions are due
_ROUNDS = 2  # sending again what a destination took and does not hold, before the back-off


class Shipper:
    """Delivers to one destination, one shipment at a time over several streams; run() in a thread of its own."""

    kind = "session"

    def __init__(self, config: Config, ledger: Ledger, name: str, stop: threading.Event,
                 there: Destination | None = None) -> None:
        self._config = config
        self._settings = config.destination_named(name)
        self._ledger = ledger
        self._name = name
        self._stop = stop
        self._failures = 0
        self._streams = ThreadPoolExecutor(self._settings.streams, thread_name_prefix=f"ship-{name}")
        self.there: Destination = there or open_destination(config, name)

    def run(self, work: threading.Event) -> None:
        """Deliver what is due until told to stop; ``work`` wakes it early."""
        while not self._stop.is_set():
            try:
                pause = self.step()
            except Exception:  # the ledger is full or locked: nothing is lost, it is tried again
                log.exception("delivering failed", extra={"destination": self._name})
                pause = 10.0
            if pause:
                work.wait(pause)
                work.clear()
        self._streams.shutdown(cancel_futures=True)

    def step(self) -> float:
        """Work on the most urgent delivery; seconds until the next look (0: at once)."""
        row = self._next(self.kind)
        if row is None:
            self.there.idle()
            return 1.0
        shipment = row["shipment"]
        try:
            try:
                self._deliver(row)
            except (Lapsed, Damaged, TooLarge, Stopped):
                self._require_due(row)  # a file that is made anew meanwhile is no damage
                raise
        except Closed as closed:
            self._put_off(row, f"waits for its time window, in {closed.seconds / 60:.0f} min", closed.seconds, 0)
        except Waiting as waiting:
            self._failures = 0
            self._update(row, state=Stop.ARRIVED, due=time.time() + _LOOK_AGAIN, error=str(waiting),
                         location=waiting.location, failing_since=None)
        except Stopped as stopped:
            log.error("delivery stopped: %s", stopped, extra={"shipment": shipment, "destination": self._name})
            self._update(row, state=Stop.STOPPED, error=str(stopped), attempts=row["attempts"] + 1)
            with self._ledger.write() as connection:
                note(connection, shipment, f"stopped at {self._name}: {stopped}")
        except Lapsed as lapsed:
            log.warning("routed again: %s", lapsed, extra={"shipment": shipment})
            with self._ledger.write() as connection:
                connection.execute("DELETE FROM delivery WHERE shipment = ? AND state <> ?", (shipment, Stop.VERIFIED))
                move(connection, shipment, State.COMPLETE, str(lapsed))
        except (Damaged, TooLarge) as error:
            why = self._set_aside(error) if isinstance(error, Damaged) else str(error)
            log.error("shipment held: %s", why, extra={"shipment": shipment})
            with self._ledger.write() as connection:
                move(connection, shipment, State.HELD, why, reason=why)
        except (Retry, ConfigError) as error:
            return self._fail(row, error)
        else:
            self._failures = 0
            log.info("verified", extra={"shipment": shipment, "destination": self._name})
        return 0.0

    def _next(self, kind: str) -> sqlite3.Row | None:
        now = time.time()  # what was put off later than now, was so by a clock that has been set back since
        return self._ledger.one(
            "SELECT d.*, s.study_uid, s.receiver, s.supplement, s.changed AS ready FROM delivery d JOIN shipment s "
            "ON s.id = d.shipment WHERE d.destination = ? AND d.state IN ('waiting', 'arrived') AND (d.due <= ? OR "
            "d.changed > ?) AND s.state = ? AND s.kind = ? "
            "AND NOT EXISTS (SELECT 1 FROM shipment e LEFT JOIN delivery f ON f.shipment = e.id AND f.destination = "
            "d.destination WHERE e.study_uid = s.study_uid AND e.receiver = s.receiver AND "
            "e.supplement < s.supplement AND e.state NOT IN (?, ?, ?) AND (f.state IS NULL OR f.state <> 'verified')) "
            "ORDER BY d.due, d.shipment LIMIT 1", self._name, now, now, State.READY, kind, State.DELIVERED,
            State.PURGED, State.REJECTED)

    def _deliver(self, row: sqlite3.Row) -> None:
        begun = row["sent"] or row["location"] is not None
        if not begun:  # what has begun is ended as it was approved
            require_current(self._config, self._ledger, row["shipment"])
        fresh = self._ledger.value("SELECT 1 FROM instance WHERE shipment = ? AND sent_md5 IS NULL", row["shipment"])
        manifest = package.manifest(self._config, self._ledger, row["shipment"])
        if not manifest.items:
            raise Stopped("nothing is left in this shipment")
        answers: list[str] = []
        lacking = self.there.missing(manifest, row["location"])
        if not fresh or manifest.recipe or manifest.kind == "raw":  # the digests were not taken just now
            self._require_intact(lacking)
        for _ in range(_ROUNDS):
            if not lacking:
                break
            if begun and not manifest.recipe:  # but as it was received, nothing more of it leaves than the route allows
                require_current(self._config, self._ledger, row["shipment"])
            answers += self._send(row, manifest, lacking)
            lacking = self.there.missing(manifest, None)
            self._require_intact(lacking)  # or it is we who damage them
        if lacking:
            raise Retry(f"{len(lacking)} of {len(manifest.items)} instances were sent and taken, and are not there")
        location = self.there.finish(manifest)
        verify(self._config, self._ledger, self.there, self._name, manifest, location, answers, row["attempts"] + 1)

    def _require_intact(self, items: Sequence[Item]) -> None:
        package.require_intact(items)

    def _send(self, row: sqlite3.Row, manifest: Manifest, lacking: Sequence[Item]) -> list[str]:
        """Send what is lacking in parts over the streams; what the server said to each."""
        largest = getattr(self._settings, "part_size", _PART)
        # Large series are split as far as it takes to keep all streams busy, and the server's import with them.
        share = sum(item.size for item in lacking) // (4 * self._settings.streams)
        todo = parts(lacking, min(largest, max(share, _SMALL_PART)))
        todo.sort(key=_bytes)
        # The smallest part goes alone: it makes the session over there, so that the others find it.
        answers = [self._send_part(row, manifest, todo[0])]
        self._progress(row, _bytes(todo[0]))
        pending = {self._streams.submit(self._send_part, row, manifest, part): part for part in todo[1:]}
        failure: Exception | None = None
        for future in as_completed(pending):
            try:
                if not future.cancelled():
                    answers.append(future.result())
                    self._progress(row, _bytes(pending[future]))
            except (Retry, Stopped, Closed, Damaged, TooLarge) as error:
                # A part that the destination refuses says nothing of the others; a line that failed does.
                if not isinstance(error, Stopped):
                    for other in pending:
                        other.cancel()
                # What needs a person is told first.
                failure = error if failure is None or isinstance(failure, (Retry, Closed)) else failure
        if failure is not None:
            raise failure
        return answers

    def _send_part(self, row: sqlite3.Row, manifest: Manifest, part: Sequence[Item]) -> str:
        self._require_due(row)
        return self.there.send(manifest, part)

    def _require_due(self, row: sqlite3.Row) -> None:
        """Raise :class:`Retry` when a person, or another destination, has taken the shipment back meanwhile."""
        if not self._ledger.value("SELECT 1 FROM delivery d JOIN shipment s ON s.id = d.shipment WHERE d.shipment = ? "
                                  "AND d.destination = ? AND s.state = ? AND s.changed = ?", row["shipment"],
                                  self._name, State.READY, row["ready"]):
            raise Retry("the shipment was taken back or changed while it was delivered")

    def _set_aside(self, error: Damaged) -> str:
        """Keep what is left of a damaged file elsewhere: at its place it would pass for the copy that is sent again.

        What de-identification made can be made again. What a person should know.
        """
        path = error.path
        if path.is_relative_to(self._config.deidentified) or path.is_relative_to(self._config.kspace_deidentified):
            with self._ledger.write() as connection:
                connection.execute("DELETE FROM made WHERE instance = ?", (error.instance,))
                connection.execute("UPDATE raw SET path = NULL WHERE instance = ?", (error.instance,))
            return (f"what was made of instance {error.instance} is damaged or missing; look after the disk, then "
                    "'retry' makes it again")
        raw = self._config.kspace_spool
        folder = (raw.parent if path.is_relative_to(raw) else self._config.data) / "damaged"  # on its file system
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.replace(folder / path.name)
        return str(error)

    def _progress(self, row: sqlite3.Row, count: int) -> None:
        with self._ledger.write() as connection:
            connection.execute("UPDATE delivery SET sent = sent + ?, changed = ? WHERE shipment = ? "
                               "AND destination = ?",
                               (count, time.time(), row["shipment"], self._name))

    def _fail(self, row: sqlite3.Row, error: Retry | ConfigError) -> float:
        """Back off: this delivery, and (after repeated failures) this destination as a whole."""
        self._failures += 1
        attempts = row["attempts"] + 1
        pause = getattr(error, "after", None) or self._back_off(attempts)
        log.warning("delivery put off: %s", error,
                    extra={"shipment": row["shipment"], "destination": self._name, "seconds": round(pause)})
        self._put_off(row, str(error), pause, attempts)
        return min(self._back_off(self._failures), self._settings.retry_longest) / 4 if self._failures > 1 else 0.0

    def _back_off(self, attempts: int) -> float:
        pause = min(self._settings.retry_first * 2 ** min(attempts - 1, 20), self._settings.retry_longest)
        return float(pause * random.uniform(0.75, 1.0))

    def _put_off(self, row: sqlite3.Row, error: str, pause: float, attempts: int) -> None:
        self._update(row, due=time.time() + pause, error=error, attempts=attempts or row["attempts"],
                     failing_since=(row["failing_since"] or time.time()) if attempts else row["failing_since"])

    def _update(self, row: sqlite3.Row, **fields: object) -> None:
        columns = ", ".join(f"{name} = ?" for name in fields)
        with self._ledger.write() as connection:
            connection.execute(f"UPDATE delivery SET {columns}, changed = ? WHERE shipment = ? AND destination = ?",
                               (*fields.values(), time.time(), row["shipment"], self._name))


class RawShipper(Shipper):
    """Delivers raw data to an XNAT, beside the Shipper of its sessions and only while none of those is due."""

    kind = "raw"
    there: XNATRaw

    def __init__(self, config: Config, ledger: Ledger, name: str, stop: threading.Event, there: XNATRaw) -> None:
        super().__init__(config, ledger, name, stop, there)
        self._intact: dict[Item, tuple[int, int, int] | None] = {}  # what was read and compared in this run

    def step(self) -> float:
        """As :meth:`Shipper.step`; nothing while a session is due."""
        return _TURN if self._next(Shipper.kind) is not None else super().step()

    def _send(self, row: sqlite3.Row, manifest: Manifest, lacking: Sequence[Item]) -> list[str]:
        self.there.listen(lambda arrived: self._go_on(row, arrived))
        return [self.there.send(manifest, lacking)]

    def _go_on(self, row: sqlite3.Row, arrived: int) -> None:
        """Between two pieces: sessions first, and is it still wanted?"""
        if arrived:
            self._progress(row, arrived)
        while self._next(Shipper.kind) is not None and not self._stop.wait(_TURN):
            pass
        self._require_due(row)

    def _require_intact(self, items: Sequence[Item]) -> None:
        """Read once in a run, unless the file changes: fifty gigabytes take minutes, and a line fails often."""
        for item in items:
            stamp = _stamp(item)
            if stamp is None or self._intact.get(item) != stamp:
                package.require_intact([item])
                self._intact[item] = stamp


def _bytes(part: Sequence[Item]) -> int:
    return sum(item.size for item in part)


def _stamp(item: Item) -> tuple[int, int, int] | None:
    """The file as it is now; None when it is gone."""
    try:
        found = item.path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
