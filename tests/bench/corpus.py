"""Studies to send: as large as real ones, and compressible as real ones are."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.uid import EnhancedCTImageStorage, generate_uid

from tests import data

_PLANES = 8  # different images; they repeat, but each file is compressed on its own
_SIDE = {"MR": 168, "CT": 512}


@dataclass(frozen=True)
class Study:
    """A study on disk, one folder a series."""

    label: str
    series: tuple[Path, ...]
    uids: tuple[str, ...]  # of the series
    instances: int
    size: int  # bytes of all files


def plane(kind: str, seed: int) -> bytes:
    """16-bit samples that a fast deflate packs about as real ones: MR 4.5 times, CT 1.7 times."""
    side = _SIDE[kind]
    noise = np.random.default_rng(seed)
    y, x = np.ogrid[-1:1:side * 1j, -1:1:side * 1j]  # type: ignore[misc]
    radius = np.hypot(x * 1.15, y)
    if kind == "MR":
        tissue = 300 + 120 * np.cos(5 * radius + seed) + 60 * np.sin(7 * x) * np.cos(6 * y)
        image = np.where(radius < 0.62, tissue + noise.normal(0, 4, (side, side)),
                         np.abs(noise.normal(0, 0.5, (side, side))))
    else:
        image = np.where(radius < 0.9, 1040 + 30 * np.cos(9 * radius + seed), 24.0) + noise.normal(0, 20, (side, side))
    return np.clip(image, 0, 4095).astype("<u2").tobytes()


class Corpus:
    """Makes studies below a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._studies: dict[str, Study] = {}
        self._planes: dict[str, list[bytes]] = {}

    def study(self, kind: str, series: int, slices: int) -> Study:
        """MR slices of about 58 kB, or CT slices of about 525 kB."""
        label = f"{kind}_{series}x{slices}"
        if label not in self._studies:
            planes = self._planes.setdefault(kind, [plane(kind, seed) for seed in range(_PLANES)])
            self._studies[label] = self._make(label, kind, series, slices, planes, 1)
        return self._studies[label]

    def large(self, objects: int, size: int) -> Study:
        """Multi-frame objects of about ``size`` bytes, each a series of its own."""
        label = f"large_{objects}x{size // 2**20}"
        if label not in self._studies:
            one = plane("CT", 1)
            frames = max(1, math.floor(size / len(one)))
            self._studies[label] = self._make(label, "CT", objects, 1, [one * frames], frames)
        return self._studies[label]

    def forget(self, study: Study) -> None:
        """Delete a study that is not needed any more."""
        shutil.rmtree(study.series[0].parent)
        del self._studies[study.label]

    def _make(self, label: str, kind: str, series: int, slices: int, planes: list[bytes], frames: int) -> Study:
        study, folders, uids, size = generate_uid(), [], [], 0
        for number in range(1, series + 1):
            folder = self._folder / label / f"{number}"
            folder.mkdir(parents=True)
            more = {"NumberOfFrames": frames, "sop_class": EnhancedCTImageStorage} if frames > 1 else {}
            image = data.instance(study=study, series_number=number, modality=kind, size=(_SIDE[kind],) * 2,
                                  comments=f"Project:P1 Subject:S1 Session:{label}", **more)
            for position in range(slices):
                image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
                image.InstanceNumber = position + 1
                image.PixelData = planes[position % len(planes)]
                path = folder / f"{position:05}.dcm"
                image.save_as(path, enforce_file_format=True)
                size += path.stat().st_size
            folders.append(folder)
            uids.append(str(image.SeriesInstanceUID))
        return Study(label, tuple(folders), tuple(uids), series * slices, size)
