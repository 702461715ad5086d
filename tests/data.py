"""Invented DICOM: never a real patient's. Small, varied and quick to make."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

PATIENT_NAME, PATIENT_ID = "Planted^Name", "PLANTED-ID-4711"


def pixels(rows: int, columns: int, seed: int) -> bytes:
    """16-bit samples that compress about as real images do: a smooth field and noise."""
    noise = random.Random(seed).randbytes(rows * columns)
    samples = bytearray(rows * columns * 2)
    samples[0::2] = noise
    ramp = bytes((column * 7 // max(columns, 1) + seed) % 8 for column in range(columns))
    samples[1::2] = ramp * rows
    return bytes(samples)


def instance(*, study: str | None = None, series: str | None = None, sop: str | None = None, number: int = 1,
             series_number: int = 1, size: tuple[int, int] = (64, 64), modality: str = "MR",
             comments: str | None = "Project:P1 Subject:S1 Session:S1_MR1", sop_class: str | None = None,
             transfer_syntax: str = ExplicitVRLittleEndian, **elements: object) -> Dataset:
    """An image with its File Meta; further elements by keyword."""
    data = Dataset()
    data.SOPClassUID = sop_class or (CTImageStorage if modality == "CT" else MRImageStorage)
    data.SOPInstanceUID = sop or generate_uid()
    data.StudyInstanceUID = study or generate_uid()
    data.SeriesInstanceUID = series or generate_uid()
    data.Modality, data.SeriesNumber, data.InstanceNumber = modality, series_number, number
    data.PatientName, data.PatientID, data.PatientBirthDate = PATIENT_NAME, PATIENT_ID, "19700203"
    data.StudyDate, data.StudyDescription, data.DeviceSerialNumber = "20260102", "BRAIN", "45678"
    if comments is not None:
        data.PatientComments = comments
    data.Rows, data.Columns = size
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.PixelData = pixels(*size, seed=number)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def study(series: int = 2, slices: int = 5, **settings: object) -> Iterator[Dataset]:
    """The images of one study, series by series."""
    uid = settings.pop("study", None) or generate_uid()
    for number in range(1, series + 1):
        one = generate_uid()
        for position in range(1, slices + 1):
            yield instance(study=uid, series=one, series_number=number, number=position, **settings)  # type: ignore[arg-type]


def write(images: Iterator[Dataset] | list[Dataset], folder: Path) -> list[Path]:
    """Write images as files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(images):
        path = folder / f"{number:05}.dcm"
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
