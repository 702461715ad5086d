"""What the tests of destinations share: shipments made without a ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from relay_agent import dicom
from relay_agent.header import read_header
from relay_agent.package import Item, Manifest
from relay_agent.throttle import Throttle
from tests import data

UNLIMITED = Throttle(None)


def shipment(folder: Path, files: Iterable[Path], **changes: Any) -> Manifest:
    """A manifest of these files as the receiver would have written them; ``changes`` go into every item.

    Some of the samples have another UID in their File Meta than in their data set; a sender names the latter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items, study = [], ""
    for number, file in enumerate(files, 1):
        meta, header = dicom.read_meta(file), read_header(file)
        content = dicom.file_header(meta.sop_class, header[dicom.SOP], meta.transfer_syntax, "MR1", "RELAY") \
            + file.read_bytes()[meta.offset:]
        path = folder / f"{number}.dcm"
        path.write_bytes(content)
        study = header[dicom.STUDY]
        items.append(replace(Item(
            number, path, meta.sop_class, header[dicom.SOP], header[dicom.SERIES], "", "", meta.transfer_syntax,
            len(content), hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest(), False), **changes))
    return Manifest(1, study, 0, "", "", "", None, tuple(items))


def images(folder: Path, made: Iterable[Dataset] | None = None, **changes: Any) -> Manifest:
    """A shipment of generated images: two series of five unless told otherwise."""
    return shipment(folder / "spool", data.write(list(made or data.study()), folder / "made"), **changes)


def sample(folder: Path, name: str) -> Manifest:
    """A shipment of one of pydicom's sample files."""
    path = get_testdata_file(name, download=False)
    assert path, f"{name} is not among pydicom's samples"
    return shipment(folder / name, [Path(str(path))])
