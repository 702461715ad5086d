"""Receive: the Storage SCPs of this box. Opens no connection to anywhere.

One process accepts and hands each connection to the child with the fewest; a child serves each association in a
thread and writes what arrived into the ledger in batches, after the sender was answered: the file is the promise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relay_agent import wire
from relay_agent.association import Association
from relay_agent.book import Book, reconcile
from relay_agent.config import TLS, Config, ConfigError, Receiver
from relay_agent.journal import Journal, recover
from relay_agent.ledger import Ledger
from relay_agent.spool import Spool

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds that associations have to end when the service stops
_HAND_OVER = struct.Struct("<II")  # listener number, associations open on it


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
        self._book = Book(config, self._spool)
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
