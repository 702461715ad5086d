"""Complete or not: every cut, every fault that writers leave, and the readers of others as second opinion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent.kspace.twix import NotTwix, Verdict, check, layout
from tests.kspace.others import by_mapvbvd, by_twixtools
from tests.kspace.synthetic import ADJUSTMENT, FAMILIES, File, Scan, build, header, parts, real_file, written


def test_whole_files_are_complete(made, tmp_path):
    content = build(made)
    path = written(tmp_path, content)
    found = check(path)
    assert (found.verdict, found.reason) == (Verdict.COMPLETE, "")
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.size == len(content)
    assert [(one.uid, one.readouts, one.syncs) for one in found.measurements] == [
        (scan.uid, scan.readouts, scan.syncs) for scan in made.scans]
    assert [(one.data, one.acqend) for one in found.measurements] == parts(made)
    assert found.measurements[-1].first == pytest.approx(made.scans[-1].start + 0.01, abs=0.0025)


@pytest.mark.slow  # the readers of others are slow to load
def test_others_read_whole_files_the_same(made, tmp_path):
    path = written(tmp_path, build(made))
    found = check(path)
    assert by_twixtools(path) == [one.readouts + one.syncs for one in found.measurements]
    scan = made.scans[-1]
    assert by_mapvbvd(path) == (scan.samples, scan.channels, scan.readouts)


def _boundaries(made: File) -> set[int]:
    """Where a VB file may be cut without showing it."""
    scan, at = made.scans[0], parts(made)[0][0]
    cuts = set()
    for line in range(scan.readouts):
        for step in ([128 + 64] if line < scan.syncs else []) + [scan.channels * (128 + 8 * scan.samples)]:
            at += step
            cuts.add(at)
    return cuts - {parts(made)[0][0] + 128 + 64}  # SYNCDATA alone is no readout


def _expected(made: File, cut: int) -> Verdict:
    if made.family == "VB":
        if cut < 30:
            return Verdict.NOT_TWIX
        if cut in _boundaries(made):
            return Verdict.ABORTED
    elif cut < 8:
        return Verdict.NOT_TWIX
    return Verdict.COMPLETE if cut >= parts(made)[-1][1] else Verdict.INCOMPLETE


@pytest.mark.parametrize(("family", "step"), [
    # Primes: all positions of a field within some measurements.
    ("VB", 31), ("VE", 31), ("several", 31),
    *(pytest.param(family, step, marks=pytest.mark.slow) for family, step in (("VB", 1), ("VE", 1), ("several", 7)))])
def test_every_cut_of_a_small_file_is_noticed(family, step, tmp_path):
    made = FAMILIES[family].but(scans=tuple(Scan(uid=scan.uid, readouts=2, samples=4) for scan in
                                            FAMILIES[family].scans))
    content = build(made)
    path = written(tmp_path, content)
    for cut in range(len(content), -1, -step):
        os.truncate(path, cut)
        found = check(path)
        assert found.verdict is _expected(made, cut), (cut, found.reason)
        assert bool(found.reason) is (found.verdict is not Verdict.COMPLETE)


@pytest.mark.slow
def test_random_cuts_of_a_larger_file_are_noticed(tmp_path):
    made = File(scans=(ADJUSTMENT, Scan(readouts=300, channels=8, samples=256, syncs=40)))  # several reads, odd borders
    content = build(made)
    assert len(content) > 5_000_000
    path = written(tmp_path, content)
    assert [one.readouts for one in check(path).measurements] == [3, 300]
    chance = random.Random(6)
    for cut in sorted((chance.randrange(len(content)) for _ in range(60)), reverse=True):
        os.truncate(path, cut)
        assert check(path).verdict is _expected(made, cut)


def test_every_position_of_a_border_between_reads(tmp_path):
    """An MDH may lie across what two reads bring, with any part of it on either side."""
    for shift in range(0, 260, 4):
        made = File(scans=(Scan(readouts=80, channels=1, samples=508, syncs=0),), more={"Spice": " " * shift})
        assert [one.readouts for one in check(written(tmp_path, build(made))).measurements] == [80]


def test_an_aborted_scan_is_told_from_a_cut_one(tmp_path):
    found = check(written(tmp_path, build(File(scans=(Scan(acqend=False),)))))
    assert found.verdict is Verdict.ABORTED
    assert "ACQEND" in found.reason
    assert found.measurements[0].readouts == 6


@pytest.mark.parametrize("scans", [(Scan(finalised=False),), (ADJUSTMENT, Scan(finalised=False)),
                                   (Scan(uid=357, finalised=False), Scan())])
def test_a_length_of_zero_was_never_finished(scans, tmp_path):
    found = check(written(tmp_path, build(File(scans=scans))))
    assert found.verdict is Verdict.INCOMPLETE
    assert "never finished" in found.reason
    assert [one.readouts for one in found.measurements] == [scan.readouts for scan in scans]  # and all of it is there


def test_a_measurement_that_was_announced_only(tmp_path):
    content = bytearray(build(File()))
    struct.pack_into("<I", content, 4, 2)
    content[8 + 152:8 + 304] = bytes(152)
    found = check(written(tmp_path, bytes(content)))
    assert found.verdict is Verdict.INCOMPLETE
    assert [one.readouts for one in found.measurements] == [6]


def test_missing_padding_is_no_fault(tmp_path):
    assert check(written(tmp_path, build(File(padded=False)))).verdict is Verdict.COMPLETE


def test_more_than_the_table_knows_of_is_one(tmp_path):
    found = check(written(tmp_path, build(File()) + bytes(512)))
    assert found.verdict is Verdict.INCOMPLETE


def test_holes_are_found(made, tmp_path):
    """Space that was set aside and never written: headers or readouts of zeros."""
    content = bytearray(build(made))
    begin, end = parts(made)[-1]
    content[begin + 400:end] = bytes(end - begin - 400)
    assert check(written(tmp_path, bytes(content))).verdict is Verdict.INCOMPLETE
    if made.family != "VB":
        content[10240:] = bytes(len(content) - 10240)
        assert check(written(tmp_path, bytes(content))).verdict is Verdict.INCOMPLETE


def test_readouts_of_another_measurement_are_found(tmp_path):
    content = bytearray(build(File()))
    begin, _ = parts(File())[0]
    second = begin + 192 + 64
    struct.pack_into("<i", content, second + 4, 999)
    found = check(written(tmp_path, bytes(content)))
    assert found.verdict is Verdict.INCOMPLETE
    assert "another measurement" in found.reason


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 110600000\n" * 99,
    bytes(20_000), struct.pack("<II", 0, 65) + bytes(20_000), struct.pack("<II", 0, 1) + bytes(20_000),
    struct.pack("<II", 12_000, 6) + b"Config\0" + bytes(20_000), b"DICM" * 9000, b"x" * 20_000,
    struct.pack("<IIiIQQ", 0, 1, 1, 1, 1 << 63, 500).ljust(20_000, b"\0"),
    struct.pack("<IIiIQQ", 0, 1, 1, 1, 10_240, 500).ljust(10_240, b"\0") + b"y" * 512])
def test_what_is_not_twix(content, tmp_path):
    path = written(tmp_path, content)
    found = check(path)
    assert found.verdict is Verdict.NOT_TWIX
    assert found.reason
    assert found.sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_that_grows_meanwhile_is_not_complete(tmp_path, monkeypatch):
    path = written(tmp_path, build(File()))
    real_pread = os.preadv

    def grows(*arguments):
        with path.open("ab") as more:
            more.write(b"more")
        return real_pread(*arguments)
    monkeypatch.setattr(os, "preadv", grows)
    found = check(path)
    assert (found.verdict, found.reason) == (Verdict.INCOMPLETE, "it changed while it was read")


@pytest.mark.slow
@settings(max_examples=400)
@given(data=st.data())
def test_any_damage_ends_in_a_verdict(data, tmp_path_factory):
    content = bytearray(build(FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 400) | st.integers(10_236, 10_300))
        content[at:at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = written(tmp_path_factory.getbasetemp(), bytes(content))
    found = check(path)
    assert bool(found.reason) is (found.verdict is not Verdict.COMPLETE)
    with path.open("rb") as file, contextlib.suppress(NotTwix):
        for one in layout(file.fileno(), len(content)).measurements:
            assert all(one.start < buffer.start <= buffer.end <= one.data <= len(content) for buffer in one.buffers)


def test_the_header_is_where_it_should_be(tmp_path):
    made = File(family="XA")
    content = build(made)
    (one,) = check(written(tmp_path, content)).measurements
    assert [buffer.name for buffer in one.buffers] == ["Config", "Dicom", "Meas", "MeasYaps", "Phoenix", "Spice",
                                                       "Protocol"]
    assert all(content[buffer.start:].startswith((b"<XProtocol>", b"### ASCCONV")) for buffer in one.buffers)
    assert one.data == 10_240 + len(header(made, made.scans[0]))


def test_real_files_are_as_recorded_and_as_others_read_them(real):
    found = check(real)
    uid, end, readouts, digest = {"gre.dat": (358, 1_656_864, 160, "10ce71c8"),
                                  "epi.dat": (360, 1_038_080 + 10_240, 83, "5311aa6e")}[real.name]
    (one,) = found.measurements
    assert found.verdict is Verdict.COMPLETE
    assert found.sha256.startswith(digest)
    assert (one.uid, one.end, one.acqend, one.readouts) == (uid, end, end, readouts)
    assert by_twixtools(real) == [one.readouts + one.syncs]
    if real.name == "gre.dat":
        assert by_mapvbvd(real)[-1] == readouts
        assert one.first == pytest.approx(22_321_167 * 0.0025)


@pytest.mark.parametrize(("cut", "verdict"), [
    (1_657_343, Verdict.COMPLETE), (1_656_864, Verdict.COMPLETE), (1_656_863, Verdict.INCOMPLETE),
    (1_656_800, Verdict.INCOMPLETE), (1_656_700, Verdict.INCOMPLETE), (1_600_000, Verdict.INCOMPLETE),
    (900_000, Verdict.INCOMPLETE), (796_352, Verdict.INCOMPLETE), (20_000, Verdict.INCOMPLETE)])
def test_cuts_of_a_real_file(cut, verdict, tmp_path):
    assert check(written(tmp_path, real_file("gre.dat").read_bytes()[:cut])).verdict is verdict
