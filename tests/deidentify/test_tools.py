"""What authors of scripts are told: what changed, what is left, what would survive on real data."""

from __future__ import annotations

import dataclasses
import json

import pytest

from relay_agent.dataset import PIXELS
from relay_agent.deidentify import ctp, dicomedit, profile, tools
from relay_agent.deidentify.script import Context, Failed, Finding, Rejected
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from tests.deidentify import planted
from tests.deidentify.planted import instance, item


class Stub:
    """A script that blanks some attributes, and rejects or fails at certain instances."""

    name, language = "stub", "test"

    def __init__(self, *tags: int, reject: str = "-", fail: str = "-") -> None:
        self.tags, self.reject, self.fail = tags, reject, fail

    def apply(self, file: File, context: Context) -> None:
        uid = file.dataset.text(0x00080018)
        if uid.endswith(self.reject):
            raise Rejected("stub line 1")
        if uid.endswith(self.fail):
            raise Failed("(0008,0018) cannot be done", "stub line 2")
        for tag in self.tags:
            file.dataset.put(tag, "LO", b"")

    def findings(self) -> list[Finding]:
        return [Finding("first", 3, True)]

    def touches(self) -> set[int]:
        return set(self.tags)


def test_difference():
    before, after = instance().dataset, instance().dataset
    assert tools.difference(before, after) == []
    after.remove(0x00081030)
    after.put_text(0x00321060, "MRT Knöchel")
    after.put_text(0x00120062, "YES")
    after.items(0x00400275)[0].items(0x00400008)[0].put_text(0x00080100, "OTHER")
    after.remove(0x00101002)
    after.put(0x00291010, "OB", b"\0\1")
    after.put(0x0019100C, "IS", b"2000")
    after.put_numbers(0x00280010, "US", 9)
    changes = {change.path: change for change in tools.difference(before, after)}
    assert list(changes) == [
        "(0008,1030)", "(0010,1002)", "(0010,1002)[0]/(0009,1001)", "(0010,1002)[0]/(0010,0020)",
        "(0010,1002)[0]/(0010,0022)", "(0012,0062)", "(0019,100c)", "(0028,0010)", "(0029,1010)", "(0032,1060)",
        "(0040,0275)[0]/(0040,0008)[0]/(0008,0100)"]
    assert changes["(0008,1030)"] == tools.Change(
        "(0008,1030)", 0x00081030, "StudyDescription", "MR Brain SMITHERSON with contrast", None, False)
    assert (changes["(0010,1002)"].before, changes["(0010,1002)"].after) == ("1 item", None)
    assert changes["(0012,0062)"].before is None
    assert changes["(0032,1060)"].before == "MRT Schädel Turnbull"
    assert changes["(0028,0010)"].after == "9"
    assert changes["(0029,1010)"].private and changes["(0029,1010)"].after == (
        "2 bytes, SHA-256 b413f47d13ee2fe6")
    assert changes["(0010,1002)[0]/(0009,1001)"].before == "nested SMITHERSON"
    assert json.loads(json.dumps([dataclasses.asdict(change) for change in changes.values()]))


def test_difference_of_odd_values():
    before, after = instance(charset="ISO_IR 192").dataset, instance(charset="ISO_IR 192").dataset
    after.put(0x0008103E, "LO", b"Sch\xe4del")
    after.put(0x00204000, "LT", b"x" * 1000)
    after.put(PIXELS, "OW", bytes(256))
    item(after, 0x00081140, _0008_1155="1.2.3")
    shown = {change.path: change.after for change in tools.difference(before, after)}
    assert shown["(0008,103e)"].startswith("7 bytes, SHA-256") or shown["(0008,103e)"].startswith("8 bytes, SHA-256")
    assert shown["(0020,4000)"] == "x" * 256 + "…"
    assert shown["(7fe0,0010)"].startswith("256 bytes, SHA-256")
    assert shown["(0008,1140)"] == "2 items" and shown["(0008,1140)[1]/(0008,1155)"] == "1.2.3"


def test_what_no_script_touches():
    left = tools.untouched([Stub(0x00100010), Stub(0x60020022)])
    assert 0x00100020 in left and 0x00100010 not in left and 0x60003000 not in left
    assert 0x00020003 not in left and min(left) >> 16 == 0x0008  # File Meta is written anew
    assert tools.untouched([Stub(), profile.parse("ps3.15", "x")]) == []
    kept = tools.untouched([profile.parse("ps3.15 retain-institution-identity", "x")])
    assert 0x00080080 in kept and len(kept) == 10


def test_what_scripts_touch_unnamed():
    swept = ctp.parse('<script><k en="T" t="0010">x</k><r en="T" t="unspecifiedelements">x</r></script>', "a.script")
    left = tools.untouched([swept])
    assert 0x00100010 in left and 0x00080050 not in left and 0x00400275 not in left
    wild = dicomedit.parse('version "6.6"\n-(0008,XXXX)\n', "site.das")
    assert 0x00080050 not in tools.untouched([wild]) and 0x00100010 in tools.untouched([wild])


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2, 3):
        path = tmp_path / f"{number}.dcm"
        instance(number=number).write(path)
    return tmp_path


def test_coverage_of_a_poor_script(folder):
    (folder / "notes.txt").write_text("no DICOM")
    report = tools.coverage([Stub(0x00100010, 0x00100030)], sorted(folder.iterdir()),
                            ["Smitherson", "Lookout", "nowhere"])
    assert (report.files, report.done, report.rejected) == (4, 3, 0)
    assert report.failures[0][0].endswith("notes.txt") and len(report.failures) == 1
    left = {one.keyword: one for one in report.attributes}
    assert left["PatientName"] == tools.Survival(0x00100010, "PatientName", "Z", 3, 0)
    assert (left["PatientID"].present, left["PatientID"].survived, left["PatientID"].action) == (3, 3, "Z/D")
    assert left["RequestAttributesSequence"].survived == 3
    assert "PatientBirthName" not in left
    assert (report.private.present, report.private.survived) == (3, 3)
    assert report.planted == [3, 3, 0]
    leaks = {(leak.path, leak.source): leak.files for leak in report.leaks}
    assert leaks["(0008,1030)", 0x00100010] == 3
    assert leaks["(0040,0275)/(0040,0008)/(0008,0104)", 0x00100010] == 3
    assert leaks["(0010,0020)", 0x00100020] == 3
    assert leaks["(0029,1010)", 0x00100010] == 3
    json.dumps(dataclasses.asdict(report))


def test_coverage_of_the_profile(folder):
    report = tools.coverage([profile.parse("ps3.15", "x")], sorted(folder.iterdir()), [*planted.SECRETS])
    assert (report.files, report.done, report.failures, report.leaks) == (3, 3, [], [])
    assert {one.survived for one in report.attributes} == {0}
    assert (report.private.present, report.private.survived) == (3, 0)
    assert report.planted == [0] * 5
    options = tools.coverage([profile.parse("ps3.15 retain-uids", "x")], sorted(folder.iterdir()))
    assert {one.keyword for one in options.attributes if one.survived} == {
        "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ReferencedImageSequence",
        "ReferencedSOPInstanceUID"}


def test_coverage_counts_what_ends_otherwise(folder):
    contexts = []

    def context() -> Context:
        contexts.append(Context(UIDs(b"k", "P")))
        return contexts[-1]

    report = tools.coverage([Stub(reject=".1"), Stub(fail=".2")], sorted(folder.iterdir()), context=context)
    assert (report.files, report.done, report.rejected) == (3, 1, 1)
    assert report.failures == [(str(folder / "2.dcm"), "stub line 2: (0008,0018) cannot be done")]
    assert len(contexts) == 3
