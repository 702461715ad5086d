"""What is compared: this agent, DCMTK's storescp and Orthanc, each started fresh and on a free port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import trustme

from tests.harness import PROJECT, SECRET, Agent, wait_for
from tests.peers import free_port, program

_PLUGIN = "libOrthancDicomWeb.so"
_PLUGIN_FOLDERS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc/plugins", "/usr/local/share/orthanc/plugins")
_NEEDED = ("dcmsend", "storescp", "Orthanc")

AGENT, STORESCP, ORTHANC = "relay-agent", "DCMTK storescp", "Orthanc"
DURABILITY = {
    AGENT: "synced before the answer: in its journal, or file and folder",
    STORESCP: "no sync at all",
    ORTHANC: "file synced before the answer (SyncStorageArea), index in SQLite",
}


@dataclass(frozen=True)
class Server:
    """A running Storage SCP."""

    name: str
    port: int
    aet: str
    roots: tuple[int, ...]  # process ids
    held: Callable[[], int]  # instances that it holds, by its own books and by its files


@dataclass(frozen=True)
class OrthancServer(Server):
    """An Orthanc with its REST interface."""

    rest: str
    session: requests.Session

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """The JSON that it answers."""
        answer = self.session.request(method, self.rest + path, timeout=60, **request)
        answer.raise_for_status()
        return answer.json()


@dataclass(frozen=True)
class Certificates:
    """A CA and a certificate for localhost, as files."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """Issue them."""
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(*(folder / name for name in ("ca.pem", "server.pem", "server.key")))
        ca = trustme.CA()
        server = ca.issue_cert("localhost", "127.0.0.1")
        ca.cert_pem.write_to_path(made.ca)
        server.cert_chain_pems[0].write_to_path(made.certificate)
        server.private_key_pem.write_to_path(made.key)
        return made


def missing() -> list[str]:
    """Peers that are not installed."""
    lacking = [name for name in _NEEDED if program(name) is None]
    return lacking if _plugin() else [*lacking, _PLUGIN]


def versions() -> dict[str, str]:
    """Of the peers."""
    dcmtk = _first_line("dcmsend", "--version").split()[2]
    return {"DCMTK": dcmtk, ORTHANC: _first_line("Orthanc", "--version").split()[1]}


@contextmanager
def relay(folder: Path, *, nodelay: bool = True) -> Iterator[Server]:
    """This agent's receiving service, with its default number of processes; it sets its sockets itself."""
    agent = Agent(folder, '[receive]\nreserve = "10 MB"')

    def held() -> int:
        received: int = agent.ledger.value("SELECT value FROM tally WHERE name = 'received'")
        return min(received, sum(1 for _ in agent.config.spool.rglob("*.dcm")))

    try:
        agent.start("receive")
        yield Server(AGENT, agent.port, "RELAY", (agent.processes["receive"].pid,), held)
    finally:
        agent.stop(kill=True)


@contextmanager
def storescp(folder: Path, *, nodelay: bool = True) -> Iterator[Server]:
    """DCMTK's receiver, a process for each association; everything else as it is by default."""
    port, out = free_port(), folder / "out"
    out.mkdir(parents=True)
    command = [str(program("storescp")), "--fork", "-aet", "STORESCP", "-od", str(out), str(port)]
    with _running(command, folder / "log", nodelay) as process:
        wait_for(lambda: _listens(port), say="storescp to start")
        yield Server(STORESCP, port, "STORESCP", (process.pid,), lambda: sum(1 for _ in out.iterdir()))


@contextmanager
def orthanc(folder: Path, *, nodelay: bool = True, servers: dict[str, Any] | None = None) -> Iterator[OrthancServer]:
    """Orthanc with default settings and its DICOMweb plug-in, which knows these ``servers``.

    Over plain HTTP: Debian's build of its web server crashes on the first TLS connection (a null pointer in
    libcivetweb 1.15 with OpenSSL 3), and TLS in front of it by something of ours would cost it time.
    """
    http, dicom = free_port(), free_port()
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "Name": "bench", "DicomAet": "ORTHANC", "HttpPort": http, "DicomPort": dicom, "Plugins": [str(_plugin())],
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "RemoteAccessAllowed": False,
        "DicomWeb": {"Enable": True, "Servers": servers or {}},
    }
    file, log = folder / "orthanc.json", folder / "log"
    file.write_text(json.dumps(settings))
    session = requests.Session()
    session.trust_env = False
    with _running([str(program("Orthanc")), str(file)], log, nodelay) as process, session:
        server = OrthancServer(ORTHANC, dicom, "ORTHANC", (process.pid,),
                               lambda: int(server.ask("GET", "/statistics")["CountInstances"]),
                               f"http://127.0.0.1:{http}", session)

        def ready() -> bool:
            try:
                return bool(server.ask("GET", "/system"))
            except requests.ConnectionError:
                return False

        wait_for(ready, say="Orthanc to start")
        yield server


RECEIVERS: dict[str, Callable[..., AbstractContextManager[Server]]] = {AGENT: relay, STORESCP: storescp,
                                                                       ORTHANC: orthanc}


@dataclass(frozen=True)
class CentralServer:
    """A running stand-in for the central XNAT."""

    port: int
    url: str
    certificates: Certificates

    def requests(self) -> list[dict[str, Any]]:
        """Its request log."""
        found: list[dict[str, Any]] = requests.get(f"{self.url}/stand-in/requests", timeout=60,
                                                   verify=str(self.certificates.ca)).json()
        return found


@contextmanager
def central(folder: Path) -> Iterator[CentralServer]:
    """The stand-in for the central XNAT over HTTPS, in a process of its own."""
    certificates = Certificates.make(folder / "tls")
    ready = folder / "port"
    command = [sys.executable, "-m", "tests.central", "--data", str(folder / "data"), "--user", SECRET,
               "--tls-cert", str(certificates.certificate), "--tls-key", str(certificates.key),
               "--port-file", str(ready)]
    with _running(command, folder / "log", True):
        wait_for(lambda: ready.exists() and ready.read_text(), say="the stand-in to start")
        port = int(ready.read_text())
        yield CentralServer(port, f"https://127.0.0.1:{port}", certificates)


@contextmanager
def _running(command: list[str], log: Path, nodelay: bool) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output, env=environment(nodelay))
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment(nodelay: bool) -> dict[str, str]:
    """The environment, with DCMTK's switch for TCP_NODELAY (which Orthanc, made with DCMTK, has too)."""
    inherited = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}
    return inherited | ({"TCP_NODELAY": "1"} if nodelay else {})


def _listens(port: int) -> bool:
    # Not by connecting: storescp would fork for it.
    rows = Path("/proc/net/tcp").read_text(encoding="ascii") + Path("/proc/net/tcp6").read_text(encoding="ascii")
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A"
               for row in rows.splitlines() if ":" in row.split()[1])


def _plugin() -> Path | None:
    return next((path for place in _PLUGIN_FOLDERS if (path := Path(place) / _PLUGIN).exists()), None)


def _first_line(name: str, option: str) -> str:
    done = subprocess.run([str(program(name)), option], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0]
