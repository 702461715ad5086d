"""The HTTP side: sockets, bodies, and the misbehaviours that happen on the wire."""

from __future__ import annotations

import ssl
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, SO_LINGER, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any, BinaryIO

from .faults import Fault
from .forms import merge_form
from .web import Refusal, Request, Response, canonical, spool, text

if TYPE_CHECKING:
    from .central import Central

BLOCK = 1 << 20
LOGIN_PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>"
    b'<form method="post" action="/login"><input name="user"><input name="password" type="password"></form>'
    b"</body></html>"
)
BUSY = {500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}


class Cut(Exception):
    """The connection is to be closed without an answer."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, central: Central, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.central = central
        self.tls = tls
        self._open: set[Any] = set()
        super().__init__((host, port), Handler)

    def get_request(self) -> tuple[socket, Any]:
        connection, address = super().get_request()
        if self.tls:  # the handshake belongs in the connection's own thread, not in the accept loop
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Drop every connection that is still open, as a killed server would."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, and handshakes that fail, are part of the exercise."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Apache-Coyote/1.1"
    sys_version = ""
    disable_nagle_algorithm = True
    rbufsize = BLOCK
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """The request log is kept by Central."""

    def _serve(self) -> None:
        central = self.server.central
        started = time.time()
        path, query = canonical(self.path)
        status, self._received = None, 0
        try:
            response = self._answer(central, path, query)
            status = response.status
            # Logged before it is sent, so that a client that has its answer also finds it in the log.
            central.record(self.command, path, query, status, self._received, started)
            self._send(response)
        except (Cut, OSError):
            if status is None:
                central.record(self.command, path, query, None, self._received, started)
            self.close_connection = True
            self._abort()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, central: Central, path: str, query: dict[str, list[str]]) -> Response:
        own = path.startswith("/stand-in/")  # the controls always work

        def strike(name: str) -> Fault | None:
            return None if own else central.faults.strike(name, self.command, path)

        if strike("black-hole"):
            while central.faults.active("black-hole") and not central.stopping.wait(0.1):
                pass
            raise Cut
        cut, slow, limit = strike("cut-at"), strike("slow"), strike("body-limit")
        self._until = time.monotonic() + limit["seconds"] if limit else float("inf")
        body, declared = self._read_body(cut["bytes"] if cut else None, slow["rate"] if slow else None)
        if slow:
            time.sleep(slow["delay"])
        for status, reason in BUSY.items():
            if busy := strike(f"busy-{status}"):
                response = text(f"<html><body><h1>{status} {reason}</h1></body></html>", status, "text/html")
                if status == 503 and busy["retry_after"] is not None:
                    response.headers["Retry-After"] = str(busy["retry_after"])
                return response
        if strike("redirect-html"):
            return Response(200, LOGIN_PAGE, "text/html")
        request = Request(
            self.command, path, query, self.headers, body, size=self._received, declared=declared
        )
        if strike("401"):
            del request.headers["Authorization"], request.headers["Cookie"]
        if proxy := strike("proxy-cut"):
            return self._through_impatient_proxy(central, request, proxy)
        return central.handle(request)

    def _through_impatient_proxy(self, central: Central, request: Request, fault: Fault) -> Response:
        """Give up waiting after a while; the server behind works on regardless."""
        answer: list[Response] = []

        def work() -> None:
            time.sleep(fault["work"])
            answer.append(central.handle(request))

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(fault["seconds"])
        if answer and not worker.is_alive():
            return answer[0]
        if fault["how"] == "cut":
            raise Cut
        return text("<html><body><h1>504 Gateway Time-out</h1></body></html>", 504, "text/html")

    # bodies

    def _read_body(self, cut: int | None, rate: float | None) -> tuple[BinaryIO, bool]:
        body = spool()
        for piece in self._pieces():
            left = piece
            while left > 0:
                block = self.rfile.read(min(left, self._step(cut, rate)))
                if not block:
                    raise Cut
                body.write(block)
                left -= len(block)
                self._received += len(block)
                if (cut is not None and self._received >= cut) or time.monotonic() > self._until:
                    raise Cut
                if rate:
                    time.sleep(len(block) / rate)
        body.seek(0)
        return body, int(self.headers.get("Content-Length") or 0) > 0

    def _step(self, cut: int | None, rate: float | None) -> int:
        step = BLOCK if cut is None else min(BLOCK, max(1, cut - self._received))
        return min(step, max(1, int(rate / 10))) if rate else step

    def _pieces(self) -> Any:
        """Sizes of the parts of the body: one for Content-Length, many when it is chunked."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline(80).split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline(80)
        while self.rfile.readline(1000).strip():  # trailers
            pass

    # answers

    def _send(self, response: Response) -> None:
        stream = None if isinstance(response.body, bytes) else response.body
        size = stream.seek(0, 2) if stream else len(response.body)  # type: ignore[arg-type]
        self.send_response(response.status)
        self.send_header("Content-Type", response.type)
        self.send_header("Content-Length", str(size))
        for name, value in response.headers.items():
            self.send_header(name, value)
        if stream is None:
            self._headers_buffer.append(b"\r\n")  # type: ignore[attr-defined]
            if self.command != "HEAD":
                self._headers_buffer.append(response.body)  # type: ignore[attr-defined]
            self.flush_headers()  # head and body in one segment
            return
        self.end_headers()
        with stream:
            stream.seek(0)
            while self.command != "HEAD" and (block := stream.read(BLOCK)):
                self.wfile.write(block)

    def _abort(self) -> None:
        """Close with a reset: the client must notice at once."""
        with suppress(OSError):
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(SHUT_RDWR)


def prepare(request: Request) -> None:
    """Merge form fields into the query, as XNAT keeps all parameters in one map."""
    if request.content_type in ("application/x-www-form-urlencoded", "multipart/form-data"):
        try:
            merge_form(request)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
