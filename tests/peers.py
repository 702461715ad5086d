"""Real servers to deliver to: Orthanc with its DICOMweb plug-in, and DCMTK's storescp, on free loopback ports."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

_PLUGIN = "libOrthancDicomWeb.so"
_PLUGIN_FOLDERS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc/plugins", "/usr/local/share/orthanc/plugins")


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc; ``rest`` is the base of its own API, ``dicomweb`` of DICOMweb."""

    rest: str
    dicom_port: int
    aet: str
    process: subprocess.Popen[bytes]

    @property
    def dicomweb(self) -> str:
        """Base address of the plug-in."""
        return f"{self.rest}/dicom-web"

    def instances(self) -> list[str]:
        """Orthanc's IDs of what it holds."""
        found: list[str] = requests.get(f"{self.rest}/instances", timeout=60).json()
        return found


@dataclass(frozen=True)
class StoreSCP:
    """A running storescp; what it receives lies in ``folder``."""

    port: int
    aet: str
    folder: Path
    process: subprocess.Popen[bytes]

    def files(self) -> list[Path]:
        """What it received."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())


@contextmanager
def orthanc(folder: Path, *, largest_file: int = 0, **settings: Any) -> Iterator[Orthanc]:
    """Start an Orthanc with its data in ``folder``; ``settings`` are added to its configuration.

    ``largest_file`` makes writing fail beyond that many bytes, as on a disk that is full; no root is needed.
    """
    binary = needed("Orthanc")
    plugin = next((path for place in _PLUGIN_FOLDERS if (path := Path(place) / _PLUGIN).exists()), None)
    if plugin is None:
        absent(f"{_PLUGIN} is not installed")
    http, dicom = free_port(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "Name": "peer", "DicomAet": "ORTHANC", "HttpPort": http, "DicomPort": dicom,
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "Plugins": [str(plugin)],
        "RemoteAccessAllowed": False, "DicomAlwaysAllowFind": True, "DicomWeb": {"Enable": True},
    } | settings
    file = folder / "orthanc.json"
    file.write_text(json.dumps(configuration))

    with (folder / "log").open("wb") as log:
        # Python ignores SIGXFSZ, and what it starts shall do so too: it gets an error instead of a signal.
        process = subprocess.Popen([binary, str(file)], stdout=log, stderr=log, restore_signals=False)
    if largest_file:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    server = Orthanc(f"http://127.0.0.1:{http}", dicom, str(configuration["DicomAet"]), process)

    def ready() -> bool:
        try:
            # A server that wants a password is up as well.
            return requests.get(f"{server.rest}/system", timeout=5).status_code in (200, 401)
        except requests.ConnectionError:
            return False

    with _running(process, ready, folder / "log"):
        yield server


@contextmanager
def storescp(folder: Path, *options: str, aet: str = "STORESCP") -> Iterator[StoreSCP]:
    """Start DCMTK's storescp with these options; it writes what it receives, bit by bit, into ``folder``."""
    binary = needed("storescp")
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([binary, "-aet", aet, "-od", str(folder), *options, str(port)], stdout=log,
                                   stderr=log, env=os.environ | {"TCP_NODELAY": "1"})

    def ready() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with _running(process, ready, folder.with_suffix(".log")):
        yield StoreSCP(port, aet, folder, process)


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> Iterator[None]:
    try:
        end = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{Path(str(process.args[0])).name} did not start: "  # type: ignore[index]
                            f"{log.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()  # nothing it has is wanted any more, and Orthanc takes seconds to stop in peace
        process.wait()


def needed(name: str) -> str:
    """The path of a program; without it a test is skipped, and fails where nobody would notice the skip."""
    return program(name) or absent(f"{name} is not installed")


def program(name: str) -> str | None:
    """The path of a program of Debian's: in environments of Python, pynetdicom brings names that DCMTK has too."""
    places = [place for place in os.environ.get("PATH", "").split(":")
              if place and not Path(place).parent.joinpath("pyvenv.cfg").exists()]
    return shutil.which(name, path=":".join([*places, "/usr/sbin", "/sbin"]))


def absent(what: str) -> NoReturn:
    """Skip where people work, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and this test must not be skipped here")
    pytest.skip(what)
