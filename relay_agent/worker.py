"""The worker: one loop that brings shipments forward, and one thread for each destination."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from relay_agent import alert
from relay_agent.book import missing_files, reconcile
from relay_agent.commitment import report_due
from relay_agent.config import Config
from relay_agent.deidentify.work import Deidentifier
from relay_agent.destinations.xnat import XNATDestination
from relay_agent.kspace.pull import Puller
from relay_agent.kspace.work import RawWorker
from relay_agent.ledger import Ledger, State, note, recount
from relay_agent.purge import discard, purge
from relay_agent.route import apply, decide
from relay_agent.ship import RawShipper, Shipper
from relay_agent.spool import Spool
from relay_agent.stage import Landing, Stager

log = logging.getLogger(__name__)

_SETTLED = 15.0  # seconds after which a file must be in the ledger
_AUDIT = 3600.0
_WATCH = 30.0
_REPORT = 5.0
_GRACE = 10.0  # seconds that deliveries have to end when the service stops


class Worker:
    """Takes shipments along the path, a step at a time; every step may be done twice."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ledger = Ledger(config.ledger)
        self._spool = Spool(config.spool, config.receive.reserve)
        self._stager = Stager(config, self._ledger, self._spool)
        self._landing = Landing(config, self._ledger, self._spool)
        self._stop = threading.Event()
        self._work = {d.name: threading.Event() for d in config.destination}
        self._shippers = [Shipper(config, self._ledger, d.name, self._stop) for d in config.destination]
        self._raw_shippers = [RawShipper(config, self._ledger, d.name, self._stop, s.there.raw())
                              for s, d in zip(self._shippers, config.destination, strict=True)
                              if isinstance(s.there, XNATDestination) and config.kspace.source]
        self._raw_work = [threading.Event() for _ in self._raw_shippers]
        self._deidentifier = Deidentifier(config, self._ledger, self._stop)
        self._raw = RawWorker(config, self._ledger, self._stop) if config.kspace.source else None
        self._pullers = [Puller(config, self._ledger, source, self._stop) for source in config.kspace.source
                         if source.pull is not None]
        self._missing = self._miscounted = 0
        self._mailer = alert.Mailer(config.alert) if config.alert else None

    def stop(self, *_: object) -> None:
        """End after the step that is under way."""
        self._stop.set()
        for event in (*self._work.values(), *self._raw_work, self._deidentifier.work):
            event.set()

    def run(self) -> int:
        """Work until stopped; the exit status."""
        reconcile(self._ledger, self._spool, self._config, settled=_SETTLED)
        threads = [threading.Thread(target=s.run, args=(self._work[d.name],), name=f"ship-{d.name}", daemon=True)
                   for s, d in zip(self._shippers, self._config.destination, strict=True)]
        threads += [threading.Thread(target=raw.run, args=(work,), name="raw", daemon=True)
                    for raw, work in zip(self._raw_shippers, self._raw_work, strict=True)]
        threads.append(threading.Thread(target=self._deidentifier.run, name="deidentify", daemon=True))
        if self._raw is not None:
            threads.append(threading.Thread(target=self._raw.run, name="kspace", daemon=True))
        threads += [threading.Thread(target=puller.run, name="pull", daemon=True) for puller in self._pullers]
        # In threads of their own: a mail server or a caller that hangs must not hold up the shipments.
        threads.append(threading.Thread(target=self._repeat, args=(_WATCH, self._tell), name="alerts", daemon=True))
        threads.append(threading.Thread(target=self._repeat, args=(_REPORT, self._report), name="reports", daemon=True))
        for thread in threads:
            thread.start()
        chores = [_Chore(_AUDIT, self._audit), _Chore(60.0, self._look_for_strays), _Chore(10.0, self._purge),
                  _Chore(60.0, self._ledger.settle)]
        with self._ledger.write() as connection:
            note(connection, None, "the worker started")
        log.info("working", extra={"destinations": [d.name for d in self._config.destination]})
        while not self._stop.is_set():
            moved = self._guard(self.step)
            for chore in chores:
                if chore.due():
                    self._guard(chore.action)
            if not moved:
                self._stop.wait(0.25)
        self._landing.close()
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return 0

    def step(self) -> int:
        """One round of take in, sort, complete, identify and route; how much was moved."""
        moved = self._landing.scan() + self._stager.sort() + self._stager.complete()
        failure: Exception | None = None
        for row in self._ledger.all("SELECT id FROM shipment WHERE state = ? AND kind = 'session' ORDER BY id LIMIT "
                                    "50", State.COMPLETE):
            try:
                decision = decide(self._config, self._ledger, self._spool, row["id"])
                if apply(self._ledger, row["id"], decision):
                    log.info("%s: %s", decision.state, decision.what, extra={"shipment": row["id"]})
                    moved += 1
            except Exception as error:  # of one shipment, which the others do not wait for
                failure = failure or error
        if moved:
            for event in (*self._work.values(), *self._raw_work, self._deidentifier.work):
                event.set()
        if failure is not None:
            raise failure
        return moved

    def _guard(self, action: Callable[[], int | None]) -> int:
        try:
            return action() or 0
        except Exception:  # a full disk, a locked ledger: the step is done again
            log.exception("a step failed and is done again")
            self._stop.wait(5)
            return 0

    def _purge(self) -> int:
        raw, discarded = self._config.kspace_deidentified, 0
        if self._config.kspace.discard is not None:
            discarded = discard(self._ledger, self._spool, raw, self._config.kspace.discard)
        return discarded + purge(self._ledger, self._spool, self._config.deidentified, self._config.purge.retention,
                                 raw=raw)

    def _look_for_strays(self) -> None:
        reconcile(self._ledger, self._spool, self._config, since=time.time() - 7200, settled=_SETTLED)

    def _audit(self) -> None:
        self._missing = len(missing_files(self._ledger, self._spool))
        self._miscounted = recount(self._ledger)

    def _repeat(self, every: float, action: Callable[[], int | None]) -> None:
        while not self._stop.wait(every):
            self._guard(action)

    def _report(self) -> int:
        return report_due(self._config, self._ledger, self._spool)

    def _tell(self) -> None:
        tokens = {d.name: s.there.trouble for s, d in zip(self._shippers, self._config.destination, strict=True)
                  if s.there.trouble}
        extra = []
        if self._missing:
            extra.append(alert.Condition("files missing", "spool", f"{self._missing} instances that should be here "
                                         "have no file: the disk or a person lost them. See relay-agent check"))
        if self._miscounted:
            extra.append(alert.Condition("ledger miscounted", "ledger", f"{self._miscounted} instances are not where "
                                         "the ledger's sums have them: rows were changed by other means"))
        landings = {"landing": self._landing.trouble, "raw landing": self._raw.trouble if self._raw else ""}
        extra += [alert.Condition(what, "files", f"Files in the {what} directory cannot be taken in: {trouble}. They "
                                  "stay there and are tried again; look after their owner and mode, and after the disk")
                  for what, trouble in landings.items() if trouble]
        extra += [alert.Condition("pull", puller.name, f"{puller.trouble}. What the scanner overwrites before it is "
                                  "fetched is lost") for puller in self._pullers if puller.trouble]
        found = alert.conditions(self._config, self._ledger, self._spool, tokens=tokens, extra=extra, now=time.time())
        alert.tell(self._config, self._ledger, found, self._mailer, time.time())


class _Chore:
    """Something that is done now and then."""

    def __init__(self, every: float, action: Callable[[], int | None]) -> None:
        self.action = action
        self._every = every
        self._next = time.monotonic()

    def due(self) -> bool:
        """Whether it is time; the next time is then later."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._every
        return True
