"""De-identification, file to file: this agent against plain pydicom, dicom-anonymizer, and nothing done."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import pydicom
from dicomanonymizer import anonymize_dicom_file
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from relay_agent.deidentify.make import Made, Numbers, Task, context, make, make_all
from relay_agent.deidentify.recipe import Recipe, Step, load
from relay_agent.dicom import data_set_digest, read_meta
from relay_agent.instance import File
from tests.bench.corpus import Corpus, plane
from tests.bench.results import MB, Medians, Run, Section, Table, Target, ratio, show

GIGABIT = 1e9 / 8
ROUNDS = 5
SCRIPT = '''version "6.6"
(0008,1030) := project
(0010,0010) := subject
(0010,0020) := session
(0008,0050) := ""
(0020,000D) := hashUID[(0020,000D)]
(0020,000E) := hashUID[(0020,000E)]
(0008,0018) := hashUID[(0008,0018)]
(0020,0052) := hashUID[(0020,0052)]
- (0008,0080)
- (0008,0081)
- (0008,0090)
- (0008,1010)
- (0008,1070)
- (0010,0030)
- (0010,1002)
- (0010,1040)
- (0010,4000)
- (0018,1000)
- (0020,4000)
removeAllPrivateTags
'''
_GONE = ("InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "StationName", "OperatorsName",
         "PatientBirthDate", "OtherPatientIDsSequence", "PatientAddress", "PatientComments", "DeviceSerialNumber",
         "ImageComments")
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
ENGINE, OURS, PROFILE = "DicomEdit script alone", "relay agent, DicomEdit", "relay agent, PS3.15"
PLAIN, PEER, NOTHING = "pydicom", "dicom-anonymizer", "copy"


def files(folder: Path, count: int) -> list[Path]:
    """CT images of 512 x 512 with the header of a real scanner (pydicom's own sample)."""
    folder.mkdir(parents=True)
    image = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    image.Rows = image.Columns = 512
    image.PatientName, image.PatientID = "Planted^Name", "PLANTED-ID-4711"
    paths = []
    for number in range(count):
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.InstanceNumber, image.PixelData = number, plane("CT", number % 8)
        paths.append(folder / f"{number}.dcm")
        image.save_as(paths[-1])
    return paths


def _plain(source: Path, target: Path) -> None:
    """What most would write with pydicom: read, the edits of the script, write."""
    data = pydicom.dcmread(source)
    data.StudyDescription, data.PatientName, data.PatientID, data.AccessionNumber = "P1", "S1", "S1_MR1", ""
    for keyword in _UIDS:
        data[keyword].value = generate_uid(entropy_srcs=[str(data[keyword].value)])
    for keyword in _GONE:
        if keyword in data:
            del data[keyword]
    data.remove_private_tags()
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(target)


def _peer(source: Path, target: Path) -> None:
    anonymize_dicom_file(str(source), str(target))


def _nothing(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _recipe(step: Step) -> Recipe:
    return Recipe((step,), (), "P1", "S1", "S1_MR1", (), ())


def _engine(recipe: Recipe) -> Callable[[Path, Path], None]:
    """What the others do: read, the script, write."""
    script = load(recipe.steps[0])

    def one(source: Path, target: Path) -> None:
        file = File.read(source)
        script.apply(file, context(recipe, b"key", datetime.now()))
        with target.open("wb") as out:
            out.writelines(file.encode())
    return one


def _ours(recipe: Recipe, ledger: Path, tasks: dict[Path, Task]) -> Callable[[Path, Path], None]:
    """All that the agent does for an instance: proof of what was received, scripts, search for residues, digests."""
    numbers = Numbers(ledger, b"key")

    def one(source: Path, _: Path) -> None:
        made = make(recipe, b"key", numbers, datetime.now(), tasks[source])
        assert isinstance(made, Made), made
    return one


def _task(source: Path, target: Path) -> Task:
    return Task(1, data_set_digest(source, read_meta(source).offset), source, target)


def deidentify(_: Corpus, folder: Path, quick: bool) -> Section:
    """One core: instances a second and CPU of each way. Two cores: bytes a second of the agent's processes."""
    paths = files(folder / "deidentify", 8 if quick else 100)
    size = sum(path.stat().st_size for path in paths)
    out = folder / "deidentified"
    out.mkdir()
    recipe, profile = _recipe(Step("site.das", SCRIPT)), _recipe(Step("ps3.15", "ps3.15"))
    ledger, tasks = folder / "ledger", {path: _task(path, out / path.name) for path in paths}
    ways = {ENGINE: _engine(recipe), OURS: _ours(recipe, ledger, tasks), PROFILE: _ours(profile, ledger, tasks),
            PLAIN: _plain, PEER: _peer, NOTHING: _nothing}
    runs = []
    for _round in range(1 if quick else ROUNDS):
        for name, way in ways.items():
            began, before = time.perf_counter(), _cpu()
            for path in paths:
                way(path, out / path.name)
            took, used = time.perf_counter() - began, _cpu() - before
            runs.append(Run("deidentify", "CT", name, len(paths), size, took, used, 0, 0))
            for path in out.iterdir():
                path.unlink()
    together = max(_together(recipe, list(tasks.values()), out, ledger, size) for _ in range(1 if quick else 3))
    found = {name: Medians(runs, "CT", name) for name in ways}
    rows = [[name, "", show(one.rate), show(one.speed), f"{one.cpu_instance:.2f}", ratio(one.rate, found[PLAIN].rate)]
            for name, one in found.items()]
    columns = ["way", "", "per second", "MB/s", "CPU ms", "of pydicom's"]
    notes = ["the relay agent's figures hold the proof that the file is what was received, the search for identifiers "
             "that are left, and MD5 and SHA-256 of the result",
             f"with {os.cpu_count()} processes: {show(together / MB)} MB/s"]
    table = Table("De-identify CT of 525 kB, one core, file to file", columns, rows, notes)
    targets = [Target("de-identify, against pydicom read-edit-write", found[ENGINE].rate / found[PLAIN].rate, 3.0),
               Target("de-identify with all cores, against a line of 1 Gbit/s", together / GIGABIT, 1.0)]
    return Section("deidentify", [table], targets, runs)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _together(recipe: Recipe, tasks: list[Task], out: Path, ledger: Path, size: int) -> float:
    """Bytes a second of the agent's processes, once they are warm."""
    count = os.cpu_count() or 1
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        parts = list(_parts(tasks, max(len(tasks) // (2 * count), 1)))
        for _ in range(2):
            began = time.perf_counter()
            for future in [pool.submit(make_all, recipe, b"key", ledger, datetime.now(), part) for part in parts]:
                assert all(isinstance(made, Made) for made in future.result())
            took = time.perf_counter() - began
    for path in out.iterdir():
        path.unlink()
    return size / took


def _parts(tasks: list[Task], size: int) -> Iterator[list[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start:start + size]
