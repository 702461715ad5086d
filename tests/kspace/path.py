"""A box without processes for raw data: an exam of DICOM and raw files, and the steps of the worker by hand."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relay_agent import route, stage
from relay_agent.kspace.pickup import inspect
from relay_agent.kspace.work import RawWorker
from relay_agent.ledger import State, balance, move
from tests import data
from tests.agent.box import Box
from tests.kspace.synthetic import FRAME, PERSON, PLANNED, START, File, Scan, build

SETTINGS = """
[[receiver]]
ae_title = "RELAY"
port = 0
allow = ["*"]
[[destination]]
name = "central"
url = "https://xnat.example.org"
[[route]]
name = "all"
destinations = ["central"]
{route}
[route.kspace]
{raw}
[stage]
landing_stable = "0 s"
quiet = "0 s"
[receive]
reserve = "1 MB"
[kspace]
reserve = "2 MB"
{kspace}
[[kspace.source]]
name = "prisma"
{source}
"""
STUDY = "1.2.826.0.1.3680043.8.498.1"


def settings(*, route: str = "", raw: str = "", kspace: str = "", source: str = "") -> str:
    """The configuration of such a box."""
    return SETTINGS.format(route=route, raw=raw, kspace=kspace, source=source)


def exam(study: str = STUDY, frame: str = FRAME, *, patient: str = PERSON.id, offset: float = 0.0,
         session: str = "S1_MR1", protocols: Sequence[str] = ("localizer", "t1_mprage")) -> list[Any]:
    """The DICOM side: a localizer that slices were planned on, and the series that was measured at START."""
    images = []
    for number, protocol in enumerate(protocols, 1):
        start = START + offset + (0 if protocol != "localizer" else -600)
        images += [data.instance(
            study=study, series=f"{study}.{number}", series_number=number, number=position + 1, size=(8, 8),
            sop=PLANNED[position] if protocol == "localizer" and frame == FRAME else f"{study}.{number}.{position}",
            comments=f"Project:P1 Subject:S1 Session:{session}", PatientID=patient, PatientName=PERSON.name,
            PatientBirthDate=PERSON.birth, DeviceSerialNumber=PERSON.serial, FrameOfReferenceUID=frame,
            ProtocolName=protocol, SeriesDescription=protocol, AcquisitionTime=clock(start + position))
            for position in range(3)]
    return images


def clock(seconds: float) -> str:
    """A time of day as DICOM writes it."""
    return f"{int(seconds) // 3600 % 24:02}{int(seconds) // 60 % 60:02}{seconds % 60:09.6f}"


def raw(uid: int = 358, *, start: float = START, protocol: str = "t1_mprage", **changes: Any) -> bytes:
    """A raw file of that exam."""
    return build(replace(File(), scans=(Scan(uid=uid, start=start, protocol=protocol, seed=uid),), **changes))


class RawBox(Box):
    """Its worker takes steps when it is told to, without child processes."""

    def __init__(self, folder: Path, text: str = "", general: str = "") -> None:
        super().__init__(folder, text or settings(), general)
        self.raw = RawWorker(self.config, self.ledger, threading.Event())
        self.raw._in_child = lambda _, action, *arguments: action(*arguments)  # type: ignore[method-assign]
        self.stager = stage.Stager(self.config, self.ledger, self.spool)
        self.landing = self.config.kspace_landing / "prisma"

    def land(self, content: bytes, name: str = "meas.dat") -> Path:
        """Put a file into the landing directory."""
        path = self.landing / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def dicom(self, images: Sequence[Any], receiver: str = "RELAY") -> None:
        """Have DICOM taken in, sorted, completed and decided."""
        for path in data.write(list(images), self.folder / "medium"):
            assert stage.take_in(path, receiver, self.spool, self.ledger, "upload") is None
            path.unlink()
        while self.stager.sort():
            pass
        self.stager.complete(1e12)
        self.decide_sessions()

    def decide_sessions(self) -> None:
        """What the worker does with complete sessions."""
        for row in self.ledger.all("SELECT id FROM shipment WHERE state = ? AND kind = 'session'", State.COMPLETE):
            route.apply(self.ledger, row["id"], route.decide(self.config, self.ledger, self.spool, row["id"]))

    def delivered(self, shipment: int) -> None:
        """As if a session had been verified."""
        with self.ledger.write() as connection:
            connection.execute("UPDATE delivery SET state = 'verified' WHERE shipment = ?", (shipment,))
            move(connection, shipment, State.DELIVERED, "verified at every destination")

    def work(self, rounds: int = 6) -> None:
        """Rounds of the raw data thread."""
        for _ in range(rounds):
            self.raw._looked = -1e9
            self.raw._landing.touched.set()
            self.raw.step()
        assert balance(self.ledger).difference == 0

    def shipment(self, number: int) -> Any:
        """A shipment's row with that of its raw data."""
        return self.ledger.one("SELECT s.*, r.verdict, r.series_uid, r.score, r.session AS to_shipment, r.path AS "
                               "made, r.name, r.sha256, r.md5 FROM shipment s LEFT JOIN raw r ON r.shipment = s.id "
                               "WHERE s.id = ?", number)

    def raws(self) -> list[Any]:
        """All raw shipments."""
        return [self.shipment(row["id"]) for row in self.ledger.all("SELECT id FROM shipment WHERE kind = 'raw' "
                                                                    "ORDER BY id")]


__all__ = ["RawBox", "exam", "inspect", "raw", "settings"]
