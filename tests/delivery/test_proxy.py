"""The way through a hospital's proxy, and a server that is not who it says: told in words, and nothing leaks out."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from relay_agent.ledger import Stop
from tests import data
from tests.central import Central
from tests.delivery.box import Box, arrived_exactly, certificates, everything, site, to
from tests.harness import running


class _Tunnel(socketserver.StreamRequestHandler):
    """Answers CONNECT and then only carries bytes, as a proxy that does not look inside does."""

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode("ascii").split(" ", 2)
        while self.rfile.readline().strip():
            pass
        server = self.server
        assert isinstance(server, Proxy)
        server.asked.append((method, target))
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as there:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_carry, args=(there, self.connection), daemon=True)
            back.start()
            _carry(self.connection, there)
            back.join(10)


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(2**16):
            sink.sendall(block)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """A forward proxy for HTTPS that writes down what it was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Tunnel)
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy that works."""
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test alone decides what the services find in their environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def working(folder: Path, trusted: bool = True, **destination: Any) -> Iterator[tuple[Box, Central]]:
    """A central XNAT behind TLS, and a box whose working service is a process that delivers to it."""
    ca, certificate, key = certificates(folder / "certificates")
    with site(folder / "central", tls=(certificate, key)) as central:
        bundle = {"ca_bundle": str(ca)} if trusted else {}
        settings = to(central.url, folder / "box", **bundle, **destination) + everything()
        box = Box(folder / "box", settings)
        with running(box, "work"):
            yield box, central


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("said_by", ["setting", "environment"])
def test_delivery_through_a_proxy(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, said_by: str) -> None:
    """Hospitals let nothing out but through their proxy: every connection goes there, TLS being verified end to end."""
    setting: dict[str, Any] = {"proxy": proxy.url} if said_by == "setting" else {}
    if said_by == "environment":
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with working(tmp_path, **setting) as (box, central):
        images = list(data.study(2, 3))
        box.take(images)
        box.wait(Stop.VERIFIED)
        arrived_exactly(central, images)
        box.proved()
        assert len(proxy.asked) > 0, "it went past the proxy"
        assert set(proxy.asked) == {("CONNECT", f"127.0.0.1:{central.port}")}


def test_the_setting_goes_before_the_environment(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the configuration says is meant for this destination; a proxy of the machine may be for something else."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
    with working(tmp_path, proxy=proxy.url) as (box, _):
        box.take(list(data.study(1, 2)))
        box.wait(Stop.VERIFIED)
        assert len(proxy.asked) > 0


def test_a_proxy_that_is_down(tmp_path: Path) -> None:
    """The words have to name the proxy, or somebody looks for the fault at the central site; nobody goes round it."""
    with working(tmp_path, proxy=f"http://127.0.0.1:{closed_port()}") as (box, central):
        images = list(data.study(1, 2))
        box.take(images)
        assert "the proxy refused or cannot be reached" in box.wait_words("proxy", attempts=2)["error"]
        assert central.requests == [], "it went past the proxy"
        box.all_here(images)


@pytest.mark.parametrize("through", ["directly", "through a proxy"])
def test_a_certificate_that_is_not_trusted(tmp_path: Path, proxy: Proxy, through: str) -> None:
    """A server that cannot prove who it is gets no request at all: not the images, nor the credential."""
    setting: dict[str, Any] = {} if through == "directly" else {"proxy": proxy.url}
    with working(tmp_path, trusted=False, **setting) as (box, central):
        images = list(data.study(1, 2))
        box.take(images)
        assert "certificate is not trusted" in box.wait_words("certificate", attempts=2)["error"]
        assert central.requests == []
        assert bool(proxy.asked) is bool(setting)
        box.all_here(images)
