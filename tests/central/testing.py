"""Data and a client for tests that talk to the stand-in."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import requests
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

STUDY = "1.2.826.0.1.3680043.8.498.1"
IMPORT = "/data/services/import"
ZIP = {"Content-Type": "application/zip"}
DICOM = {"Content-Type": "application/dicom"}
HERE = {"import-handler": "DICOM-zip", "project": "P1", "subject": "S1", "session": "E1"}


def instance(number: int = 1, *, study: str = STUDY, series: int = 4, uid: str = "", **header: Any) -> bytes:
    """One small MR image."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = MRImageStorage
    image.StudyInstanceUID, image.SeriesInstanceUID = study, f"{study}.{series}"
    image.SOPInstanceUID = uid or f"{study}.{series}.{number}"
    image.SeriesNumber, image.InstanceNumber, image.Modality = series, number, "MR"
    image.SeriesDescription, image.StudyDescription = "t1_mprage", "Brain^Routine"
    image.PatientName, image.PatientID = "Doe^Jane", "hospital-7"
    image.StudyDate, image.StudyTime = "20240131", "120000"
    for name, value in header.items():
        setattr(image, name, value)
    image.Rows = image.Columns = 16
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    image.PixelData = bytes([number % 256]) * 512
    out = io.BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def series(count: int = 3, **options: Any) -> dict[str, bytes]:
    return {f"{options.get('series', 4)}-{n}.dcm": instance(n, **options) for n in range(1, count + 1)}


class Client(requests.Session):
    """A session that knows the server and its user, and does not follow redirects."""

    def __init__(self, url: str, auth: tuple[str, str] | None = ("relay", "secret")) -> None:
        super().__init__()
        self.url = url
        self.auth = auth
        self.trust_env = False

    def request(self, method: str, url: str, *args: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        options.setdefault("timeout", 60)
        options["allow_redirects"] = False
        return super().request(method, self.url + url, *args, **options)

    def send_zip(self, files: dict[str, bytes], **params: str) -> requests.Response:
        return self.post(IMPORT, params=HERE | params, data=zipped(files), headers=ZIP)

    def table(self, path: str, **params: str) -> list[dict[str, str]]:
        answer = self.get(path, params={"format": "json"} | params)
        assert answer.status_code == 200, answer.text
        rows: list[dict[str, str]] = answer.json()["ResultSet"]["Result"]
        return rows


def archived(client: Client, files: dict[str, bytes], **params: str) -> str:
    """Import, commit with auto-archive, and return the archive URI."""
    answer = client.send_zip(files, AA="true", **params)
    assert answer.status_code == 200, answer.text
    done = client.post(answer.text.strip(), params={"action": "commit"})
    assert done.status_code == 301, done.text
    return done.text.strip()
