"""The preflight check, against real sockets, files and certificates."""

from __future__ import annotations

import errno
import http.server
import os
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from relay_agent import check, selftest
from relay_agent.config import Config, ConfigError
from relay_agent.destinations import Finding, Retry
from relay_agent.spool import PARTIAL

Check = Callable[..., list[Finding]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(check, "_SLOW_SYNC", 60.0)  # how busy this machine's disk is, is not what is tested


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the destinations that were opened for their own checks."""
    names: list[str] = []

    class Fake:
        def check(self) -> Iterator[Finding]:
            yield Finding(True, "the destination's own check")

    def open_destination(config: Config, name: str) -> Fake:
        names.append(name)
        return Fake()

    monkeypatch.setitem(sys.modules, "relay_agent.destinations.factory",
                        SimpleNamespace(open_destination=open_destination))
    return names


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    data = tmp_path / "data"
    data.mkdir()
    credential = tmp_path / "central"
    credential.write_text("alias:secret\n")
    credential.chmod(0o600)

    def make(receiver: dict[str, Any] | None = None, destination: dict[str, Any] | None = None, **more: Any) -> Config:
        return Config.model_validate({
            "data": data, "receive": {"reserve": "1 kB"},
            "receiver": [{"ae_title": "RELAY", "port": 0, "allow": ["MR1"], **(receiver or {})}],
            "route": [{"name": "all", "destinations": ["central"]}],
            "destination": [{"name": "central", "url": "https://127.0.0.1:1", "credential": str(credential),
                             **(destination or {})}], **more})

    return make


def wrong(config: Config, *, offline: bool = True) -> str:
    """What is not as it should be, a line each; every finding that is not ok says what to do."""
    findings = list(check.run(config, offline=offline))
    assert all(finding.remedy for finding in findings if not finding.ok)
    return "\n".join(finding.what for finding in findings if not finding.ok)


def right(config: Config, *, offline: bool = True) -> str:
    return "\n".join(finding.what for finding in check.run(config, offline=offline) if finding.ok)


@contextmanager
def listening(address: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((address, 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that is taken and on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class Answers(http.server.BaseHTTPRequestHandler):
    """An HTTP server that says what time it has."""

    protocol_version = "HTTP/1.1"
    date: str | None = None
    close = False

    def do_GET(self) -> None:
        self.send_response_only(302)
        if self.date:
            self.send_header("Date", self.date)
        if self.close:
            self.send_header("Connection", "close")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(date: str | None = None, tls: ssl.SSLContext | None = None, close: bool = False) -> Iterator[int]:
    handler = type("Handler", (Answers,), {"date": date, "close": close})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(organization_name="Inspecting Proxy Ltd")


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


# What needs no network


def test_a_good_configuration_has_nothing_wrong(configure: Callable[..., Config]) -> None:
    assert wrong(configure()) == ""


@pytest.mark.parametrize(("change", "words"), [
    ({"receiver": {"allow": ["MR1", "*"]}}, "takes instances from anybody"),
    ({"receiver": {"allow": ["MR1@0.0.0.0/0"]}}, "takes instances from anybody"),
    ({"route": []}, "there is no route"),
    ({"route": []}, "no route goes to destination central"),
    ({"destination": {"url": "http://127.0.0.1:1"}}, "unencrypted"),
    ({"destination": {"credential": None}}, "without a log-in"),
    ({"route": [{"name": "all", "destinations": ["central"], "scripts": ["/no/such.das"]}]}, "holds every session"),
    ({"alert": {"smtp_host": "127.0.0.1", "sender": "a@b", "recipients": ["c@d"], "credential": "/no"}},
     "password is sent unencrypted"),
])
def test_what_is_valid_and_hardly_meant(configure: Callable[..., Config], change: dict[str, Any], words: str) -> None:
    assert words in wrong(configure(**change))


def test_a_script_that_will_fail(configure: Callable[..., Config], tmp_path: Path) -> None:
    """It can be read, so only running it would tell."""
    script = tmp_path / "p1.das"
    script.write_text('version "6.6"\n(0010,0010) := subject\n(0010,0020) := nosuch[]\n', encoding="utf-8")
    config = configure(route=[{"name": "all", "destinations": ["central"], "scripts": [str(script)]}])
    assert "route all: p1.das line 3: there is no function nosuch" in wrong(config)
    script.write_text('version "6.6"\n(0010,0010) := subject\n', encoding="utf-8")
    assert wrong(config) == ""


def test_no_destination(configure: Callable[..., Config]) -> None:
    config = configure().model_copy(update={"destination": (), "route": ()})
    assert "there is no destination" in wrong(config)


def test_the_data_folder_is_missing(configure: Callable[..., Config], tmp_path: Path) -> None:
    assert f"{tmp_path}/nothing is not there" in wrong(configure(data=tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_the_data_folder_is_somebody_elses(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
                                           opened: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with serving() as port:
        config = configure(destination={"url": f"http://127.0.0.1:{port}"})
        assert "belongs to another user" in wrong(config, offline=False)
    assert opened == []  # it would write a token that the service cannot read


def test_the_spool_cannot_be_written(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = configure()
    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written (No space left on device)" in wrong(config)


def test_a_slow_sync(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    config.spool.mkdir()
    names: list[str] = []

    def sync(descriptor: int) -> None:
        names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        time.sleep(0.025)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(check, "_SLOW_SYNC", 0.020)
    monkeypatch.setattr(check, "_SYNC_ROUNDS", (0.0, 0.0))
    assert len(re.findall(r"a sync takes (2[5-9]|[3-9]\d|\d{3,})\.", wrong(config))) == 2
    assert {Path(name).parent for name in names} == {config.data, config.spool}
    # What looks through the spool must take a probe for a file that is being written.
    assert all(Path(name).name.startswith(f"{PARTIAL}{os.getpid()}-") for name in names)
    assert not list(config.data.rglob(f"{PARTIAL}*"))


def test_a_sync_that_others_disturbed(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of images that arrives meanwhile is no slow disk."""
    config = configure()
    config.spool.mkdir()
    pauses = iter([0.025] * 5 + [0.0] * 95)
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(next(pauses)))
    monkeypatch.setattr(check, "_SLOW_SYNC", 0.020)
    monkeypatch.setattr(check, "_SYNC_ROUNDS", (0.0, 0.0))
    assert "a sync takes" not in wrong(config)


def test_another_file_system_below_the_data_folder(configure: Callable[..., Config]) -> None:
    shared = Path("/dev/shm")
    config = configure()
    if not shared.is_dir() or shared.stat().st_dev == config.data.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here, and this test needs a second one")
    config.spool.symlink_to(shared)
    assert f"{config.spool} below it is on another" in wrong(config)


@pytest.mark.parametrize(("reserve", "short"), [(0.4, False), (0.6, True), (1.5, True)])
def test_free_space(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, reserve: float,
                    short: bool) -> None:
    config = configure(receive={"reserve": f"{int(reserve * 10**9)} B"})
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10**6, f_frsize=1000))
    assert ("1 GB are free" in wrong(config)) is short


@pytest.mark.parametrize("moment", [0.0, datetime(2101, 1, 1, tzinfo=UTC).timestamp()])
def test_a_clock_that_was_never_set(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, moment: float
                                    ) -> None:
    monkeypatch.setattr(check.time, "time", lambda: moment)  # type: ignore[attr-defined]
    assert "the clock says" in wrong(configure())


def test_ports(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        config = configure({"port": port, "address": "127.0.0.1"})
        monkeypatch.setattr(selftest, "_PATIENCE", 0.2)
        assert f"port {port} on 127.0.0.1: RELAY is in use, and no receiver answers there" in wrong(config)
    assert f"port {port} on 127.0.0.1: free" in right(config)
    assert "port 11112 on 192.0.2.1: Cannot assign" in wrong(configure({"port": 11112, "address": "192.0.2.1"}))


def test_a_port_for_which_we_lack_the_right(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "create_server", refuse)
    assert "port 104 on 0.0.0.0: not allowed" in wrong(configure({"port": 104}))


def _certificate(folder: Path, authority: trustme.CA, days: float) -> dict[str, str]:
    certificate = authority.issue_cert("127.0.0.1", not_after=datetime.now(UTC) + timedelta(days=days),
                                       not_before=datetime.now(UTC) - timedelta(days=60))
    with (folder / "dicom.crt").open("wb") as chain:
        for blob in certificate.cert_chain_pems:
            chain.write(blob.bytes())
    certificate.private_key_pem.write_to_path(str(folder / "dicom.key"))
    (folder / "dicom.key").chmod(0o600)
    return {"certificate": str(folder / "dicom.crt"), "key": str(folder / "dicom.key")}


def test_a_certificate_for_dicom_tls(configure: Callable[..., Config], tmp_path: Path, authority: trustme.CA) -> None:
    config = configure({"tls": _certificate(tmp_path, authority, 40)})
    assert "dicom.crt: expires in 39 d" in right(config)
    assert wrong(config) == ""
    (tmp_path / "dicom.key").chmod(0o644)
    assert "dicom.key: everybody may read it" in wrong(config)


@pytest.mark.parametrize(("days", "words"), [(29, "expires in 28 d"), (-1, "certificate has expired")])
def test_a_certificate_that_ends(configure: Callable[..., Config], tmp_path: Path, authority: trustme.CA, days: float,
                                 words: str) -> None:
    assert words in wrong(configure({"tls": _certificate(tmp_path, authority, days)}))


def test_tls_files_that_do_not_fit(configure: Callable[..., Config], tmp_path: Path, authority: trustme.CA) -> None:
    files = _certificate(tmp_path, authority, 40)
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(files["key"])
    assert "KEY_VALUES_MISMATCH" in wrong(configure({"tls": files}))
    (tmp_path / "dicom.key").unlink()
    assert "No such file or directory" in wrong(configure({"tls": files}))


def test_credentials(configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    (tmp_path / "central").chmod(0o604)
    assert f"{tmp_path}/central: everybody may read it" in wrong(config)
    named = configure(destination={"credential": "central"})
    assert "start under systemd" in wrong(named)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert f"{tmp_path}/central: everybody may read it" in wrong(named)
    (tmp_path / "central").chmod(0o600)
    assert wrong(named) == ""
    (tmp_path / "central").write_text("PLANTED")
    assert "must hold one line" in wrong(config)
    assert "PLANTED" not in wrong(config)


def test_a_ca_bundle_that_is_none(configure: Callable[..., Config], tmp_path: Path) -> None:
    assert "ca.pem cannot be used" in wrong(configure(destination={"ca_bundle": str(tmp_path / "ca.pem")}))
    with serving() as port:
        config = configure(destination={"ca_bundle": str(tmp_path / "ca.pem"), "url": f"https://127.0.0.1:{port}"})
        assert "cannot be read; check ca_bundle" in wrong(config, offline=False)


def test_offline_asks_nobody(configure: Callable[..., Config], opened: list[str]) -> None:
    with serving() as port:
        config = configure(destination={"url": f"http://127.0.0.1:{port}"})
        assert f"127.0.0.1 port {port}: connected" in right(config, offline=False)
        assert opened == ["central"]
        assert "127.0.0.1" not in right(config) + wrong(config)
        assert opened == ["central"]


# What needs the network


def test_the_name_cannot_be_resolved(configure: Callable[..., Config], opened: list[str]) -> None:
    config = configure(destination={"url": "https://xnat.invalid"})
    assert wrong(config, offline=False) == "central: xnat.invalid port 443: the name cannot be resolved"
    assert opened == []


def test_nothing_listens(configure: Callable[..., Config], opened: list[str]) -> None:
    with closed_port() as port:
        config = configure(destination={"url": f"https://127.0.0.1:{port}"})
        assert wrong(config, offline=False) == f"central: 127.0.0.1 port {port}: Connection refused"
    assert opened == []


def test_a_port_that_is_none(configure: Callable[..., Config]) -> None:
    assert "the port of 127.0.0.1 is no number" in wrong(configure(destination={"url": "https://127.0.0.1:x"}),
                                                         offline=False)


@pytest.mark.parametrize("close", [False, True])
def test_a_trusted_server_and_who_vouches_for_it(configure: Callable[..., Config], tls: ssl.SSLContext, bundle: str,
                                                 opened: list[str], close: bool) -> None:
    with serving(formatdate(usegmt=True), tls, close) as port:
        config = configure(destination={"url": f"https://127.0.0.1:{port}", "ca_bundle": bundle})
        shown = right(config, offline=False)
        assert wrong(config, offline=False) == ""
    assert ("central: answers, certificate issued by Inspecting Proxy Ltd" in shown) is not close
    assert "central: answers" in shown
    assert "its clock and ours are" in shown
    assert "the destination's own check" in shown
    assert opened == ["central", "central"]


def test_an_untrusted_server(configure: Callable[..., Config], tls: ssl.SSLContext, opened: list[str]) -> None:
    with serving(tls=tls) as port:
        said = wrong(configure(destination={"url": f"https://127.0.0.1:{port}"}), offline=False)
    assert "its certificate is not trusted" in said
    assert "put its CA into ca_bundle" in said
    assert opened == []


def test_a_server_of_another_name(configure: Callable[..., Config], authority: trustme.CA, bundle: str) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.example.org").configure_cert(tls)
    with serving(tls=tls) as port:
        config = configure(destination={"url": f"https://127.0.0.1:{port}", "ca_bundle": bundle})
        assert "its certificate is not trusted" in wrong(config, offline=False)


@pytest.mark.parametrize(("off", "ok"), [(-3600, False), (3600, False), (50, True)])
def test_the_clocks(configure: Callable[..., Config], off: float, ok: bool) -> None:
    with serving(formatdate(time.time() + off, usegmt=True)) as port:
        config = configure(destination={"url": f"http://127.0.0.1:{port}"})
        assert ("its clock and ours are" in wrong(config, offline=False)) is not ok
        assert ("its clock and ours are" in right(config, offline=False)) is ok


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_a_server_that_tells_no_time(configure: Callable[..., Config], date: str | None) -> None:
    with serving(date) as port:
        assert "does not say what time it is" in right(configure(destination={"url": f"http://127.0.0.1:{port}"}),
                                                       offline=False)


class Connect(socketserver.StreamRequestHandler):
    """A proxy that knows CONNECT and nothing else."""

    def handle(self) -> None:
        target = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        host, _, port = target.rpartition(":")
        with ExitStack() as stack:
            there = stack.enter_context(socket.create_connection((host, int(port))))
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=self._copy, args=(there, self.connection), daemon=True)
            back.start()
            self._copy(self.connection, there)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # either side may go first
            while data := source.recv(2**16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_through_a_proxy(configure: Callable[..., Config], tls: ssl.SSLContext, bundle: str,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tls=tls) as port, socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connect) as proxy:
        proxy.daemon_threads = True
        proxy.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        near = f"127.0.0.1:{proxy.server_address[1]}"
        config = configure(destination={"url": f"https://127.0.0.1:{port}", "ca_bundle": bundle,
                                        "proxy": f"http://{near}"})
        shown = right(config, offline=False)
        assert f"proxy 127.0.0.1 port {proxy.server_address[1]}: connected" in shown
        assert "certificate issued by Inspecting Proxy Ltd" in shown
        monkeypatch.setenv("HTTPS_PROXY", near)
        config = configure(destination={"url": f"https://127.0.0.1:{port}", "ca_bundle": bundle})
        assert f"proxy 127.0.0.1 port {proxy.server_address[1]}: connected" in right(config, offline=False)
        proxy.shutdown()


def test_a_proxy_that_is_not_there(configure: Callable[..., Config]) -> None:
    with closed_port() as port:
        config = configure(destination={"url": "https://xnat.invalid", "proxy": f"http://127.0.0.1:{port}"})
        assert wrong(config, offline=False) == f"central: proxy 127.0.0.1 port {port}: Connection refused"


@pytest.mark.parametrize("error", [Retry("busy, come again"), ConfigError("credential x cannot be read")])
def test_the_destinations_own_check_fails(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
                                          error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["relay_agent.destinations.factory"], "open_destination", refuse)
    with serving() as port:
        assert str(error) in wrong(configure(destination={"url": f"http://127.0.0.1:{port}"}), offline=False)


def test_a_dicom_destination(configure: Callable[..., Config], opened: list[str]) -> None:
    def to(port: int) -> Config:
        return configure(destination=None).model_copy(update={"destination": Config.model_validate({
            "receiver": [{"ae_title": "RELAY", "allow": ["MR1"]}],
            "destination": [{"kind": "dicom", "name": "central", "host": "127.0.0.1", "port": port,
                             "ae_title": "PACS"}]}).destination})

    with listening() as port:
        assert f"central: 127.0.0.1 port {port}: connected" in right(to(port), offline=False)
    assert opened == ["central"]
    with closed_port() as port:
        assert wrong(to(port), offline=False) == f"central: 127.0.0.1 port {port}: Connection refused"
    assert opened == ["central"]


def test_the_mail_server(configure: Callable[..., Config]) -> None:
    class Greets(socketserver.StreamRequestHandler):
        said: list[bytes] = []  # noqa: RUF012

        def handle(self) -> None:
            self.wfile.write(b"220 mail\r\n")
            while line := self.rfile.readline():
                self.said.append(line.split()[0].upper())
                self.wfile.write(b"221 bye\r\n" if line.startswith(b"quit") else b"250 mail\r\n")

    def via(port: int) -> Config:
        return configure(alert={"smtp_host": "127.0.0.1", "smtp_port": port, "sender": "a@b", "recipients": ["c@d"]},
                         destination={"url": "https://xnat.invalid"})

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "mail server 127.0.0.1" in right(via(server.server_address[1]), offline=False)
        server.shutdown()
    assert b"EHLO" in Greets.said
    assert not {b"MAIL", b"DATA"} & set(Greets.said)
    with closed_port() as port:
        assert f"mail server 127.0.0.1 port {port}: nothing listens there" in wrong(via(port), offline=False)
