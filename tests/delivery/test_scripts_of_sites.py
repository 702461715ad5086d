"""The scripts that sites have, on the whole path: CTP with its table, the DICOM profile, chains, character sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from relay_agent.cli import main
from relay_agent.ledger import State, Stop
from tests import data
from tests.delivery.box import SOON, Box, Pair, archived_files, everything, site, to
from tests.delivery.test_deidentified import PLANTED, images, nothing_planted
from tests.harness import running, send, wait_for

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
CTP = """<script>
  <p t="UIDROOT">1.2.826.0.1.3680043.10.8888</p>
  <p t="DAYS">-30</p>
  <e en="T" t="00080018" n="SOPInstanceUID">@hashuid(@UIDROOT,this)</e>
  <e en="T" t="0020000D" n="StudyInstanceUID">@hashuid(@UIDROOT,this)</e>
  <e en="T" t="0020000E" n="SeriesInstanceUID">@hashuid(@UIDROOT,this)</e>
  <e en="T" t="00080020" n="StudyDate">@incrementdate(this,@DAYS)</e>
  <e en="T" t="00080050" n="AccessionNumber">@empty()</e>
  <e en="T" t="00080060" n="Modality">@keep()</e>
  <e en="T" t="00100010" n="PatientName">@lookup(PatientID,PtID)</e>
  <e en="T" t="00100020" n="PatientID">@lookup(this,PtID)</e>
  <k en="T" t="0020">Relationship</k>
  <r en="T" t="privategroups">Private groups</r>
  <r en="T" t="unspecifiedelements">All else</r>
</script>
"""


def arrived(central: Any, session: str = "S1_MR1") -> list[Dataset]:
    return sorted((dcmread(path) for path in archived_files(central, session)), key=lambda one: one.InstanceNumber)


def test_a_ctp_script_with_its_lookup_table(pair: Pair, tmp_path: Path) -> None:
    script, table = tmp_path / "anonymizer.script", tmp_path / "lookup.properties"
    script.write_text(CTP, encoding="utf-8")
    table.write_text(f"PtID/{data.PATIENT_ID} = SUBJ-007\n", encoding="utf-8")
    box, central = pair(route={"scripts": [str(script)], "lookup": str(table)})
    sent = images(3)
    box.take(sent)
    box.wait(Stop.VERIFIED)
    got = arrived(central)
    assert [(str(one.PatientName), one.PatientID, one.StudyDate, one.Modality) for one in got] == [
        ("SUBJ-007", "SUBJ-007", "20251203", "MR")] * 3
    assert {one.StudyInstanceUID.rpartition(".")[0] for one in got} == {"1.2.826.0.1.3680043.10.8888"}
    assert not {"PatientBirthDate", "PatientComments", "StudyDescription"} & {one.keyword for one in got[0]}
    assert [one.PixelData for one in got] == [one.PixelData for one in sent]
    nothing_planted(tmp_path / "central")


def test_a_patient_whom_the_lookup_table_lacks_waits_until_it_has_him(pair: Pair, tmp_path: Path) -> None:
    script, table = tmp_path / "anonymizer.script", tmp_path / "lookup.properties"
    script.write_text(CTP, encoding="utf-8")
    table.write_text("PtID/ANOTHER = SUBJ-007\n", encoding="utf-8")
    box, central = pair(route={"scripts": [str(script)], "lookup": str(table)})
    box.take(images(2))
    row = box.wait_shipment(State.HELD)
    assert "anonymizer.script line 10 (0010,0010): a value is not in the lookup table" in row["reason"]
    assert len(central.requests) == 0
    table.write_text(f"PtID/{data.PATIENT_ID} = SUBJ-008\n", encoding="utf-8")
    box.retry()
    box.wait(Stop.VERIFIED)
    assert {one.PatientID for one in arrived(central)} == {"SUBJ-008"}


def test_the_dicom_profile_and_a_review(pair: Pair, tmp_path: Path) -> None:
    box, central = pair(route={"scripts": ["ps3.15 retain-full-dates clean-descriptors"], "review": True})
    sent = images(2, series=2, ReferringPhysicianName="Planted^Name", SeriesDescription="t1 Planted",
                  DeviceSerialNumber="45678")
    box.take(sent)
    box.wait_shipment(State.REVIEW)
    found = box.json("review", "show", "1", "--changes")
    assert found["scripts"] == ["ps3.15 retain-full-dates clean-descriptors"] and found["private_changes"] == 0
    assert {change["path"] for change in found["changes"]} >= {"(0010,0010)", "(0012,0062)", "(0018,1000)"}
    assert len(central.requests) == 0
    assert box.cli("review", "release", "1", "--digest", found["digest"]).returncode == 0
    box.wait(Stop.VERIFIED)
    got = arrived(central)
    assert len(got) == 4 and {one.PatientIdentityRemoved for one in got} == {"YES"}
    codes = {item.CodeValue for item in got[0].DeidentificationMethodCodeSequence}
    assert codes == {"113100", "113105", "113106"}
    assert {one.StudyDate for one in got} == {"20260102"} and {one.SeriesDescription for one in got} == {"t1"}
    assert box.proved()["approved"] == found["digest"]
    nothing_planted(tmp_path / "central")


def capture(**elements: Any) -> Dataset:
    """A secondary capture of 8 bits, bright everywhere."""
    image = data.instance(sop_class=SECONDARY_CAPTURE, modality="OT", size=(32, 64), AccessionNumber="ACC-PLANTED-99",
                          BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=b"\xc8" * 2048, **elements)
    image.BurnedInAnnotation = "YES"
    return image


def test_site_wide_dicomedit_then_ctp_then_pixels(pair: Pair, tmp_path: Path) -> None:
    files = {
        "site.das": 'version "6.6"\n(0010,0010) := subject\n(0010,0020) := session\n-(0010,4000)\n',
        "project.script": "set.[0010,0030]PatientBirthDate=@remove()\nset.[0008,0050]AccessionNumber=@empty()\n"
                          "set.[0012,0010]Sponsor=@always()@value(PatientName)\n"
                          "set.[0028,0301]BurnedInAnnotation=NO\n",
        "pixels.script": '{ [0008,0016].startsWith("1.2.840.10008.5.1.4.1.1.7") } (0,0,64,7)\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    more = f'\n[deidentify]\nscripts = ["{tmp_path / "site.das"}"]\n'
    route = {"scripts": [str(tmp_path / name) for name in ("project.script", "pixels.script")]}
    box, central = pair(route=route, more=more)
    box.take([capture()])
    box.wait(Stop.VERIFIED)  # painted, and the script says so: nobody needs to look
    [got] = arrived(central)
    assert (str(got.PatientName), got.PatientID, got.ClinicalTrialSponsorName) == ("S1", "S1_MR1", "S1")
    assert got.pixel_array[:7].max() == 0 and got.pixel_array[9:].min() == 200
    assert got.BurnedInAnnotation == "NO"
    nothing_planted(tmp_path / "central")


def test_a_chain_that_paints_too_little_is_seen_by_a_person(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "pixels.script").write_text('{ [0008,0060].equals("US") } (0,0,64,7)\n', encoding="utf-8")
    box, central = pair(route={"scripts": ["ps3.15", str(tmp_path / "pixels.script")]})
    box.take([capture()])
    row = box.wait_shipment(State.REVIEW)
    assert "burned-in" in row["reason"] and len(central.requests) == 0
    found = box.json("review", "show", "1")
    assert found["pixel_risks"].keys() == {"burned-in", "secondary-capture"}


@pytest.mark.parametrize(("charset", "description", "raw"), [
    ("\\ISO 2022 IR 87", "頭部 MRI", "頭部 MRI".encode("iso2022_jp")),
    ("ISO_IR 192", "脑部 Kopf größer", "脑部 Kopf größer".encode()),
    ("GB18030", "脑部 MRI", "脑部 MRI".encode("gb18030")),
])
def test_character_sets_arrive(pair: Pair, tmp_path: Path, charset: str, description: str, raw: bytes) -> None:
    (tmp_path / "p1.das").write_text(
        'version "6.6"\n(0010,0010) := subject\n(0010,0020) := session\n-(0010,0030)\n-(0010,4000)\n-(0008,0050)\n'
        '(0018,1030) := concatenate["P ", (0008,103E)]\n', encoding="utf-8")
    box, central = pair(route={"scripts": [str(tmp_path / "p1.das")]})
    box.take(images(2, SpecificCharacterSet=charset.split("\\") if "\\" in charset else charset,
                    SeriesDescription=description))
    box.wait(Stop.VERIFIED)
    for path, one in zip(archived_files(central), map(dcmread, archived_files(central)), strict=True):
        assert (one.SeriesDescription, one.ProtocolName) == (description, f"P {description}")
        assert raw in path.read_bytes()


def test_an_undecodable_name_is_found_by_nobody_and_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "p1.das").write_text('version "6.6"\n(0010,0020) := session\n-(0010,0030)\n-(0010,4000)\n'
                                     "-(0008,0050)\n", encoding="utf-8")
    box, central = pair(route={"scripts": [str(tmp_path / "p1.das")]})
    image = images(1, SpecificCharacterSet="ISO_IR 192", PatientName="Anybody")[0]
    image["PatientName"].value = b"Gr\xfc\xdfe"  # Latin-1 in a UTF-8 object
    box.take([image])
    row = box.wait_shipment(State.HELD)
    assert "(0010,0010)" in row["reason"] and "Gr" not in row["reason"].replace("Group", "")
    assert len(central.requests) == 0


PLANTED_SCRIPT = 'version "6.6"\n(0010,0010) := subject\n(0010,0020) := session\n-(0010,0030)\n-(0010,4000)\n'


def test_nothing_planted_in_logs_exports_or_receipts_when_things_fail(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes of their own at the chattiest level: one session goes, others are held, rejected, or in review."""
    script = tmp_path / "p1.das"
    script.write_text(PLANTED_SCRIPT + '(0008,0050) := ""\n(0018,1030) = "reject me" ? reject[]\n'
                      '(0018,1030) = "fail" ? (0008,0080) := substring[(0010,0010), 0, 99]\n', encoding="utf-8")
    with site(tmp_path / "central") as central:
        settings = to(central.url, tmp_path / "box") + everything(scripts=[str(script)])
        box = Box(tmp_path / "box", settings, stage=SOON, general='log_level = "debug"')
        with running(box):
            label = "Project:P1 Subject:S{0} Session:S{0}_MR1".format
            sent = [images(2, comments=label(1)), images(1, comments=label(2), ProtocolName="reject me"),
                    images(1, comments=label(3), ProtocolName="fail"),
                    images(1, comments=label(4), ImageComments="of Planted Name"),
                    images(1, comments=label(5), sop_class=SECONDARY_CAPTURE)]
            for study in sent:
                assert set(send(box.port, study)) == {0}
            ends = {"delivered": 1, "rejected": 1, "held": 2, "review": 1}
            wait_for(lambda: {row["state"]: row["n"] for row in box.ledger.all(
                "SELECT state, count(*) AS n FROM shipment GROUP BY state")} == ends, 60, "all have ended")
            numbers = [str(row["id"]) for row in box.ledger.all("SELECT id FROM shipment")]
            commands = [("status",), ("list",), ("list", "--quarantined"), ("review", "list"), ("check", "--offline"),
                        *(("show", number) for number in numbers), *(("receipt", number) for number in numbers),
                        *(("review", "show", number, "--changes") for number in numbers)]
            printed = {}
            for command in commands:
                main([*command, "--json", "--config", str(box.file)])
                printed[command] = capsys.readouterr()
        log = box.log
    assert '"level": "debug"' in log or '"level": "info"' in log
    for command, done in printed.items():
        assert done.err == "" and done.out.strip(), command
        for value in (*PLANTED, "Planted"):
            assert value not in done.out, (command, value)
    for value in (*PLANTED, "Planted"):
        assert value not in log
    reasons = " ".join(str(row["reason"]) for row in box.ledger.all("SELECT reason FROM shipment"))
    for words in ("p1.das line 7: rejected by the script", "p1.das line 8", "(0020,4000)", "secondary-capture"):
        assert words in reasons
    ledger = sorted(box.config.data.glob("ledger.sqlite*"))
    nothing_planted(tmp_path / "central", *ledger)
