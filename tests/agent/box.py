"""A box without processes: its configuration, ledger and spool, and short ways to put something into them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from relay_agent import config, dicom
from relay_agent.book import Arrival, record
from relay_agent.ledger import Ledger, State, move
from relay_agent.spool import Spool, Stored

MR = "1.2.840.10008.5.1.4.1.1.4"
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
"""


@dataclass(frozen=True)
class Image:
    """As little of an instance as the agent looks at."""

    study: str = "1.2.3"
    series: str = "1.2.3.1"
    sop: str = "1.2.3.1.1"
    version: int = 0  # other bytes under the same UIDs
    comments: str = "Project:P1 Subject:S1 Session:S1_MR1"
    name: str = ""

    def data_set(self) -> bytes:
        data = Dataset()
        data.SOPClassUID, data.SOPInstanceUID, data.Modality = MR, self.sop, "MR"
        data.StudyInstanceUID, data.SeriesInstanceUID = self.study, self.series
        data.PatientName, data.PatientComments, data.InstanceNumber = self.name, self.comments, self.version
        return dicom.encode(data, ExplicitVRLittleEndian)

    def file(self) -> bytes:
        return dicom.file_header(MR, self.sop, ExplicitVRLittleEndian, "SCANNER", "RELAY") + self.data_set()


class Box:
    """One box in a folder."""

    def __init__(self, folder: Path, settings: str = SETTINGS, general: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "config.toml"
        # How full the machine of the tests is must not show as a condition of the box.
        reserve = '[receive]\nreserve = "1 kB"\n' if "[receive]" not in settings else ""
        self.file.write_text(f'name = "box"\ndata = "{folder / "data"}"\n{general}\n{reserve}{settings}',
                             encoding="utf-8")
        self.config = config.load(self.file)
        self.ledger = Ledger(self.config.ledger)
        self.spool = Spool(self.config.spool, 0)

    def receive(self, *images: Image, receiver: str = "RELAY", association: int = 0, calling: str = "SCANNER") -> None:
        """What receiving does: a file each, and its row."""
        for image in images:
            header = dicom.file_header(MR, image.sop, ExplicitVRLittleEndian, calling, "RELAY")
            incoming = self.spool.begin(receiver, header)
            incoming.write(image.data_set())
            stored = incoming.commit()
            self.row(stored, image.sop, receiver=receiver, association=association, calling=calling)

    def row(self, stored: Stored, sop: str, *, receiver: str = "RELAY", association: int = 0, calling: str = "SCANNER",
            problem: str | None = None) -> None:
        """The row of an arrival, whether or not it has a file."""
        arrival = Arrival(receiver, stored, MR, sop, ExplicitVRLittleEndian, calling, association)
        with self.ledger.write() as connection:
            surplus = record(connection, self.spool, arrival, "association", problem)
        self.spool.remove(surplus)

    def move(self, shipment: int, state: State) -> None:
        with self.ledger.write() as connection:
            move(connection, shipment, state, "by the test")

    def state(self, shipment: int = 1) -> str:
        return str(self.ledger.value("SELECT state FROM shipment WHERE id = ?", shipment))


def stored(name: str, size: int = 1000) -> Stored:
    """A file that is not there, for tests of the ledger alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return Stored(f"RELAY/20260101/00/{digest.hex()}.dcm", digest, size)


def parsed(data: bytes) -> Dataset:
    """A file from its bytes."""
    return dcmread(BytesIO(data))
