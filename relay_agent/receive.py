"""Receive: the Storage SCPs of this box. Opens no connection to anywhere.

One process accepts and hands each connection to the child with the fewest; a child serves each association in a
thread and writes what arrived into the ledger in batches, after the sender was answered: the file is the promise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import shutil
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relay_agent import wire
from relay_agent.association import Arrival, Association, Ended, Opened
from relay_agent.config import TLS, Config, ConfigError, Receiver
from relay_agent.journal import Journal, recover
from relay_agent.ledger import Ledger, State
from relay_agent.spool import Spool
from relay_agent.stage import reconcile, record

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds that associations have to end when the service stops
_BATCH, _GATHER = 2000, 0.2  # rows and seconds: neighbours in an index then share its pages
ROWS_BY = 2.0  # seconds after which every process has written the rows of what it acknowledged
_HAND_OVER = struct.Struct("<II")  # listener number, associations open on it
NO_SUCH_INSTANCE, CLASS_MISMATCH = 0x0112, 0x0119  # PS3.3 table C.14-1, Failure Reason


@dataclass
class _Listener:
    socket: socket.socket
    receivers: dict[str, Receiver]
    tls: TLS | None
    open: int = 0

    @property
    def limit(self) -> int:
        return max(receiver.max_associations for receiver in self.receivers.values())


@dataclass
class _Child:
    slot: int  # which journal it writes
    pid: int
    channel: socket.socket
    listeners: list[int] = field(default_factory=list)  # of each open association


def tls_context(tls: TLS) -> ssl.SSLContext:
    """The acceptor's side of the BCP 195 TLS profiles (PS3.15 sections B.9, B.12)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    named = f"certificate {tls.certificate} and key {tls.key}"
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca is not None:
            named = f"client_ca {tls.client_ca}"
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(f"receiver.tls: {named} cannot be used: {error.strerror or type(error).__name__}. Give PEM "
                          "files that belong together and that the service may read") from None
    return context


def serve(config: Config, ready: Path | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit status. ``ready`` is written with the ports once they listen."""
    return _Master(config).run(ready)


class _Master:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._listeners = _listen(config.receiver)
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def run(self, ready: Path | None) -> int:
        ledger = Ledger(self._config.ledger)
        with ledger.write() as connection:
            connection.execute("UPDATE association SET closed = ?, ended = 'lost' WHERE closed IS NULL", (time.time(),))
        self._recover()
        reconcile(ledger, Spool(self._config.spool, 0), self._config)
        ledger.close()  # connections do not survive a fork
        for listener in self._listeners:
            if listener.tls:
                tls_context(listener.tls)  # fails here, with the file's name, and not at the first caller
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        for slot in range(self._config.receive.processes or os.cpu_count() or 1):
            self._fork(slot)
        for number, listener in enumerate(self._listeners):
            self._selector.register(listener.socket, selectors.EVENT_READ, number)
        ports = {r.ae_title: lis.socket.getsockname()[1] for lis in self._listeners for r in lis.receivers.values()}
        log.info("receiving", extra={"ports": ports})
        if ready is not None:
            ready.write_text(json.dumps(ports), encoding="utf-8")
        while not self._stopping:
            for key, _ in self._selector.select(timeout=1):
                if isinstance(key.data, _Child):
                    self._hear(key.data)
                else:
                    self._accept(key.data)
        return self._finish()

    def _recover(self, ring: str = "*") -> None:
        repaired = recover(self._config.journal, self._config.spool, ring)
        if repaired:
            log.warning("%d instances were brought back from the journal", repaired)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _accept(self, number: int) -> None:
        listener = self._listeners[number]
        try:
            connection, _ = listener.socket.accept()
        except OSError as error:  # the caller gave up, or descriptors ran out
            log.warning("a caller could not be accepted: %s", error.strerror)
            return
        with connection:
            child = min(self._children, key=lambda c: len(c.listeners))
            try:
                socket.send_fds(child.channel, [_HAND_OVER.pack(number, listener.open)], [connection.fileno()])
            except OSError:  # it died this moment; the caller's connection closes and it calls again
                return
        child.listeners.append(number)
        listener.open += 1

    def _hear(self, child: _Child) -> None:
        """A child tells the listener's number for each association that ended; silence means it died."""
        try:
            ended = child.channel.recv(4096)
        except OSError:
            ended = b""
        for number in ended:
            child.listeners.remove(number)
            self._listeners[number].open -= 1
        if not ended:
            self._bury(child)
            if not self._stopping:
                log.error("a receiving process ended; another one takes its place", extra={"pid": child.pid})
                self._recover(str(child.slot))
                self._fork(child.slot)

    def _bury(self, child: _Child) -> None:
        self._selector.unregister(child.channel)
        child.channel.close()
        self._children.remove(child)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, 0)
        for number in child.listeners:
            self._listeners[number].open -= 1
        ledger = Ledger(self._config.ledger)
        with ledger.write() as connection:
            connection.execute("UPDATE association SET closed = ?, ended = 'lost' WHERE closed IS NULL AND process = ?",
                               (time.time(), child.pid))
        ledger.close()

    def _fork(self, slot: int) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            # Children must not hold each other's channels open, or none would notice that the master is gone.
            for child in self._children:
                child.channel.close()
            self._selector.close()
            ours.close()
            status = 1
            try:
                _ChildServer(self._config, self._listeners, theirs, slot).run()
                status = 0
            except Exception:
                log.exception("a receiving process failed")
            finally:
                sys.stdout.flush()
                os._exit(status)
        theirs.close()
        child = _Child(slot, pid, ours)
        self._children.append(child)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _finish(self) -> int:
        for listener in self._listeners:
            listener.socket.close()
        for child in self._children:
            child.channel.close()
        deadline = time.monotonic() + GRACE + 5
        for child in self._children:
            while os.waitpid(child.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(child.pid, signal.SIGKILL)
                time.sleep(0.02)
        return 0


def _listen(receivers: Sequence[Receiver]) -> list[_Listener]:
    listeners: dict[tuple[str, int], _Listener] = {}
    for number, receiver in enumerate(receivers):
        key = (receiver.address, receiver.port or -number - 1)
        if key not in listeners:
            family = socket.AF_INET6 if ":" in receiver.address else socket.AF_INET
            try:
                bound = socket.create_server((receiver.address, receiver.port), family=family, backlog=1024)
            except OSError as error:
                raise SystemExit(f"receiver {receiver.ae_title}: cannot listen on {receiver.address} port "
                                 f"{receiver.port}: {error.strerror}. Free the port or configure another") from None
            bound.setblocking(False)
            listeners[key] = _Listener(bound, {}, receiver.tls)
        listeners[key].receivers[receiver.ae_title] = receiver
    return list(listeners.values())


class _ChildServer:
    def __init__(self, config: Config, listeners: list[_Listener], channel: socket.socket, slot: int) -> None:
        self._config = config
        self._listeners = listeners
        self._channel = channel
        self._spool = Spool(config.spool, config.receive.reserve, _journal(config, slot))
        self._book = LedgerBook(config, self._spool)
        self._contexts = [tls_context(lis.tls) if lis.tls else None for lis in listeners]
        self._threads: dict[threading.Thread, socket.socket] = {}

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the master says when to stop, by closing the channel
        for listener in self._listeners:
            listener.socket.close()
        sys.setswitchinterval(0.001)  # associations wait for the network and the disk far more than for the GIL
        while True:
            message, fds, _, _ = socket.recv_fds(self._channel, _HAND_OVER.size, 1)
            if not message:
                break
            number, already = _HAND_OVER.unpack(message)
            connection = socket.socket(fileno=fds[0])
            crowded = already >= self._listeners[number].limit
            thread = threading.Thread(target=self._serve, args=(number, connection, crowded), daemon=True)
            self._threads[thread] = connection
            thread.start()
        self._stop()

    def _serve(self, number: int, connection: socket.socket, crowded: bool) -> None:
        try:
            peer = connection.getpeername()[0]
            context = self._contexts[number]
            if context is not None:
                connection.settimeout(30)
                connection = context.wrap_socket(connection, server_side=True)
                self._threads[threading.current_thread()] = connection
            Association(connection, peer, self._listeners[number].receivers, self._spool, self._book,
                        self._config.receive.max_pdu, crowded).serve()
        except (OSError, ssl.SSLError) as error:
            log.warning("a caller was not served: %s", type(error).__name__)
            connection.close()
        finally:
            self._threads.pop(threading.current_thread(), None)
            with contextlib.suppress(OSError):
                self._channel.send(bytes((number,)))

    def _stop(self) -> None:
        deadline = time.monotonic() + GRACE
        while self._threads and time.monotonic() < deadline:
            time.sleep(0.02)
        for connection in list(self._threads.values()):
            with contextlib.suppress(OSError):
                if not isinstance(connection, ssl.SSLSocket):  # another thread is reading through that one
                    connection.sendall(wire.abort(wire.NOT_SPECIFIED))
                # Not SSLSocket's own shutdown: it would let the reader go on without TLS.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        while self._threads and time.monotonic() < deadline + 2:
            time.sleep(0.02)
        self._book.close()


def _journal(config: Config, slot: int) -> Journal | None:
    """This process's ring, when it is wanted and the disk has plenty of room for it."""
    size = config.receive.journal
    room = shutil.disk_usage(config.data).free
    ring = config.journal / f"ring-{slot}"
    if not size or (not ring.exists() and room < config.receive.reserve + 4 * size):
        return None
    return Journal(ring, size, config.spool)


class LedgerBook:
    """Writes what associations did into the ledger, in batches, from a thread of its own.

    The same thread brings instances from the journal to their places, so that a row is never ahead of its file.
    """

    def __init__(self, config: Config, spool: Spool) -> None:
        self._config = config
        self._spool = spool
        self._queue: queue.SimpleQueue[Arrival | Opened | Ended | threading.Event | None] = queue.SimpleQueue()
        self._ledger = Ledger(config.ledger)
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def add(self, entry: Arrival | Opened | Ended) -> None:
        """Queue an entry; it is in the ledger within about a tenth of a second."""
        self._queue.put(entry)

    def flush(self) -> None:
        """Wait until everything queued so far is in the ledger."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(60)

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._queue.put(None)
        self._thread.join(30)

    def _run(self) -> None:
        last = False
        while not last:
            try:
                batch = [self._queue.get(timeout=1)]
            except queue.Empty:
                self._settle()
                continue
            if isinstance(batch[0], Arrival):
                time.sleep(_GATHER)
            with contextlib.suppress(queue.Empty):
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            last = None in batch
            for entry in batch:
                if isinstance(entry, Arrival):
                    self._place(entry)
            self._write([e for e in batch if isinstance(e, Arrival | Opened | Ended)])
            for entry in batch:
                if isinstance(entry, threading.Event):
                    entry.set()
            self._settle(last)

    def _place(self, arrival: Arrival) -> None:
        pending, journal = arrival.stored.pending, self._spool.journal
        while pending is not None and journal is not None:
            try:
                journal.place(pending)
                return
            except OSError as error:  # a full disk: the ring keeps it until there is room
                log.error("an instance waits in the journal: %s", error.strerror)
                time.sleep(1)

    def _settle(self, everything: bool = False) -> None:
        if self._spool.journal is not None:
            try:
                self._spool.journal.settle(everything)
            except OSError as error:  # not settled is not lost: the ring keeps them
                log.error("the journal cannot be settled: %s", error.strerror)

    def _write(self, entries: list[Arrival | Opened | Ended]) -> None:
        while entries:
            try:
                surplus: list[str] = []
                with self._ledger.write() as connection:
                    for entry in entries:
                        if isinstance(entry, Opened):
                            connection.execute(
                                "INSERT INTO association (id, receiver, calling_ae, peer, opened, process) "
                                "VALUES (?, ?, ?, ?, ?, ?)", (entry.id, entry.receiver, entry.calling_ae, entry.peer,
                                                              time.time(), os.getpid()))
                        elif isinstance(entry, Ended):
                            connection.execute("UPDATE association SET closed = ?, ended = ? WHERE id = ?",
                                               (time.time(), entry.how, entry.id))
                        else:
                            surplus += record(connection, self._spool, entry, "association")
                    acknowledged = Counter(entry.association for entry in entries if isinstance(entry, Arrival))
                    connection.executemany("UPDATE association SET acknowledged = acknowledged + ? WHERE id = ?",
                                           [(count, number) for number, count in acknowledged.items()])
                self._spool.remove(surplus)
                return
            except Exception:  # the files are safe; the ledger gets its rows as soon as it can take them
                log.exception("the ledger cannot be written; trying again")
                time.sleep(1)

    def commit(self, association: Opened, transaction_uid: str, instances: Sequence[tuple[str, str]]
               ) -> list[int] | None:
        """See :class:`relay_agent.association.Book`."""
        self.flush()
        receiver = next(r for r in self._config.receiver if r.name == association.receiver)
        if any(title.partition("@")[0] == association.calling_ae for title in receiver.commitment_to):
            with self._ledger.write() as connection:
                connection.execute(
                    "INSERT INTO commitment (transaction_uid, receiver, calling_ae, requested, instances) "
                    "VALUES (?, ?, ?, ?, ?)", (transaction_uid, association.receiver, association.calling_ae,
                                               time.time(), json.dumps(list(instances))))
            return None
        reasons = safety(self._ledger, self._spool, association.receiver, instances)
        deadline = time.monotonic() + ROWS_BY
        while NO_SUCH_INSTANCE in reasons and time.monotonic() < deadline:
            time.sleep(0.1)  # another process may have acknowledged them a moment ago
            again = [number for number, reason in enumerate(reasons) if reason == NO_SUCH_INSTANCE]
            found = safety(self._ledger, self._spool, association.receiver, [instances[n] for n in again])
            for number, reason in zip(again, found, strict=True):
                reasons[number] = reason
        return reasons


def safety(ledger: Ledger, spool: Spool, receiver: str, instances: Sequence[tuple[str, str]]) -> list[int]:
    """What is true of each (SOP Class, SOP Instance): 0, or a Failure Reason (PS3.3 section C.14.1.1).

    Safe is an instance whose file is here, or whose arrival at every destination was proved.
    """
    reasons = []
    for sop_class, instance in instances:
        rows = ledger.all("SELECT i.sop_class, i.path, i.size, s.state FROM instance i LEFT JOIN shipment s "
                          "ON s.id = i.shipment WHERE i.sop_instance = ? AND i.receiver = ?", instance, receiver)
        safe = [row for row in rows if row["state"] in (State.DELIVERED, State.PURGED)
                or _is_here(spool.folder / row["path"], row["size"])]
        if not safe:
            reasons.append(NO_SUCH_INSTANCE)
        else:
            reasons.append(0 if any(row["sop_class"] == sop_class for row in safe) else CLASS_MISMATCH)
    return reasons


def _is_here(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
