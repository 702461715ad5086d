"""What is accepted, how it is stored, and from whom: the services of a Storage SCP as real senders use them."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom.data
import pytest
import requests
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UID_dictionary,
    VideoEndoscopicImageStorage,
    generate_uid,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation

from tests import data, peers
from tests.harness import PATIENCE, Agent, running, wait_for
from tests.receive import proof, scu
from tests.undisturbed import no_delay, undisturbed

PRIVATE = ("1.3.12.2.1107.5.9.1", "1.2.3.4.5.999", "1.2.840.113619.4.30", generate_uid())
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
PRIVATE_SYNTAXES = ("1.2.840.113619.5.2", "1.3.46.670589.33.1.4.1", "1.2.3.4.5.998")


def chunks(whole: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Pieces: an association has room for 128 contexts."""
    for at in range(0, len(whole), size):
        yield whole[at:at + size]


def storage_classes() -> list[str]:
    """Every storage SOP Class: what the standard's own registry calls one, what pynetdicom knows, and strangers."""
    registry = {uid for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and "Storage" in name
                and "Commitment" not in name and "Media Storage" not in name}
    known = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
    return sorted(registry | known | set(PRIVATE))


def other_services() -> list[str]:
    """What a Storage SCP is not: the SOP Classes that the standard's registry does not call storage."""
    return sorted(uid for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and name
                  and ("Storage" not in name or "Pull Model" in name) and not name.startswith("Verification")
                  and "Push Model" not in name)


def samples() -> list[Path]:
    """Real files in many syntaxes: pydicom's own and, where they are installed, pydicom-data's."""
    folders = [Path(pydicom.data.__file__).parent / "test_files"]
    try:
        import data_store
        folders.append(Path(data_store.__file__).parent / "data")
    except ImportError:
        pass
    found, seen = [], set()
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        try:
            meta = dcmread(path, stop_before_pixels=True).file_meta
            names = str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), meta.TransferSyntaxUID
        except Exception:  # what pydicom itself cannot read is no sample
            continue
        digest = hashlib.sha256(proof.data_set(path)).digest()
        if names[0].startswith("1.2.840.10008.5.") and 0 < len(names[1]) <= 64 and digest not in seen:
            seen.add(digest)
            found.append(path)
    return found


def names(path: Path) -> tuple[str, str, str]:
    """SOP Class, SOP Instance and transfer syntax of a file."""
    meta = dcmread(path, stop_before_pixels=True).file_meta
    return str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID)


def found(agent: Agent, sop_instance: str, content: bytes) -> Path:
    """The file that holds exactly these bytes under that UID (samples share UIDs)."""
    digest = hashlib.sha256(content).digest()
    row = wait_for(lambda: agent.ledger.one("SELECT path FROM instance WHERE sop_instance = ? AND digest = ?",
                                            sop_instance, digest), say=f"{sop_instance} was not stored as it was sent")
    return agent.config.spool / str(row["path"])


def test_echo(box: Agent) -> None:
    """The first thing an installer at a scanner does."""
    proof.run("echoscu", "-aet", "SCANNER", "-aec", "RELAY", "127.0.0.1", str(box.port), "--repeat", "3")


def test_every_storage_class_is_stored(box: Agent) -> None:
    """A relay that drops a class at negotiation loses it silently: private, unknown and retired ones go through."""
    classes = storage_classes()
    assert len(classes) > 190
    study, sent = generate_uid(), {}
    for some in chunks(classes, 100):
        with scu.SCU(box.port) as peer:
            peer.associate({2 * n + 1: (uid, [ExplicitVRLittleEndian]) for n, uid in enumerate(some)})
            refused = [uid for n, uid in enumerate(some) if 2 * n + 1 not in peer.accepted()]
            assert not refused
            for n, uid in enumerate(some):
                image = data.instance(study=study, sop_class=uid, size=(2, 2), number=n)
                assert peer.store(image.SOPInstanceUID, scu.encode(image), sop_class=uid, context=2 * n + 1) == 0
                sent[str(image.SOPInstanceUID)] = uid
            peer.release()
    rows = proof.all_rows(box, sent)
    assert {sop: row["sop_class"] for sop, row in rows.items()} == sent


def test_other_services_are_refused_by_name(box: Agent) -> None:
    """Query, worklist, print: refused as not supported (result 3), so that a sender never believes it was served."""
    services = other_services()
    assert {"1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2", "1.2.840.10008.5.1.4.1.2.2.3",
            "1.2.840.10008.5.1.4.31"} <= set(services)
    answers = {}
    for some in chunks(services, 100):
        with scu.SCU(box.port) as peer:
            peer.associate({2 * n + 1: (uid, [ImplicitVRLittleEndian]) for n, uid in enumerate(some)})
            answers |= {uid: peer.results[2 * n + 1][0] for n, uid in enumerate(some)}
            peer.release()
    assert {uid: result for uid, result in answers.items() if result != 3} == {}


def test_every_transfer_syntax_is_stored_untouched(box: Agent) -> None:
    """Every transfer syntax of the standard, HTJ2K among them, and private ones: nothing is refused or recoded."""
    syntaxes = sorted({uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax"}
                      | set(HTJ2K) | set(PRIVATE_SYNTAXES))
    assert len(syntaxes) > 60
    sent = {}
    with scu.SCU(box.port) as peer:
        peer.associate({2 * n + 1: (MRImageStorage, [uid]) for n, uid in enumerate(syntaxes)})
        for n, uid in enumerate(syntaxes):
            assert peer.results[2 * n + 1] == (0, uid)
            image = data.instance(size=(4, 4), number=n)
            content = scu.encode(image)  # what the bytes mean is none of the receiver's business
            assert peer.store(image.SOPInstanceUID, content, context=2 * n + 1) == 0
            sent[uid] = image.SOPInstanceUID, content
        peer.release()
    for uid, (sop_instance, content) in sent.items():
        meta, kept = proof.part10(found(box, sop_instance, content))
        assert kept == content and meta[0x0010].rstrip(b"\0").decode() == uid


def test_the_senders_first_choice_is_taken(box: Agent) -> None:
    """What a sender lists first is what it has; only Implicit gives way to Explicit, which keeps private VRs."""
    jpeg = "1.2.840.10008.1.2.4.70"
    cases = {1: ([jpeg, ExplicitVRLittleEndian, ImplicitVRLittleEndian], jpeg),
             3: ([ImplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian], ExplicitVRLittleEndian),
             5: ([ImplicitVRLittleEndian, jpeg], ImplicitVRLittleEndian),
             7: ([ExplicitVRBigEndian, ExplicitVRLittleEndian], ExplicitVRBigEndian)}
    with scu.SCU(box.port) as peer:
        peer.associate({number: (MRImageStorage, offered) for number, (offered, _) in cases.items()})
        assert peer.results == {number: (0, taken) for number, (_, taken) in cases.items()}


def test_real_files_keep_every_byte(box: Agent) -> None:
    """pydicom's and pydicom-data's files, sent as they are: the same data set, valid File Meta, our origin in it."""
    files = samples()
    assert len(files) > 80 and len({names(path)[2] for path in files}) >= 8
    for some in chunks(files, 60):
        with scu.SCU(box.port) as peer:
            peer.associate({2 * n + 1: (names(path)[0], [names(path)[2]]) for n, path in enumerate(some)},
                           calling="MR 3T")
            for n, path in enumerate(some):
                sop_class, sop_instance, _ = names(path)
                assert peer.store(sop_instance, proof.data_set(path), sop_class=sop_class, context=2 * n + 1) == 0
            peer.release()
    kept = []
    for path in files:
        sop_class, sop_instance, syntax = names(path)
        file = found(box, sop_instance, proof.data_set(path))
        meta, content = proof.part10(file)
        assert content == proof.data_set(path)
        assert {number: value.rstrip(b"\0 ").decode() for number, value in meta.items()
                if number in (2, 3, 0x10, 0x16, 0x17, 0x18)} == {
            2: sop_class, 3: sop_instance, 0x10: syntax, 0x16: "MR 3T", 0x17: "MR 3T", 0x18: "RELAY"}
        assert meta[1] == b"\0\1"
        again = dcmread(file, stop_before_pixels=True)
        assert again.file_meta.SourceApplicationEntityTitle == "MR 3T"
        assert again.file_meta.MediaStorageSOPInstanceUID == sop_instance
        kept.append(file)
    said = proof.run("dcmftest", *kept).stdout.splitlines()
    assert len(said) == len(kept) and all(line.startswith("yes:") for line in said)
    for file in kept[::5]:
        proof.run("dcmdump", "-q", "+P", "0002,0016", file)


def test_pynetdicom_keeps_every_byte(box: Agent) -> None:
    """A toolkit that others use, which sends a file's encoded data set as it stands."""
    files = [path for path in samples() if names(path)[2] in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)][:60]
    ae = AE(ae_title="PYNET")
    for sop_class, syntax in {(names(path)[0], names(path)[2]) for path in files}:
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate("127.0.0.1", box.port, ae_title="RELAY", evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)])
    assert association.is_established
    with undisturbed(association):
        assert [association.send_c_store(path).Status for path in files] == [0] * len(files)
        association.release()
    for path in files:
        assert proof.part10(found(box, names(path)[1], proof.data_set(path)))[1] == proof.data_set(path)


def test_user_identity_and_unknown_items_do_not_disturb(box: Agent) -> None:
    """Senders negotiate what a receiver need not know (PS3.7 section D.3.3.7): it is ignored, not refused."""
    identity = scu.item(0x58, b"\1\0\0\4user\0\0")
    extended = scu.item(0x56, b"\0\x19" + MRImageStorage.encode() + b"\2\0\1\0\0\0")
    common = scu.item(0x57, b"\0\x19" + MRImageStorage.encode() + b"\0\x11" + b"1.2.840.10008.4.2" + b"\0\0")
    role = scu.item(0x54, b"\0\x19" + MRImageStorage.encode() + b"\0\1")
    for more in (identity, extended, common, role, identity + extended + common + role):
        with scu.SCU(box.port) as peer:
            peer.associate(more_user=more)
            assert peer.accepted() == {1} and not {0x56, 0x57, 0x59} & set(peer.user)
            peer.release()


@pytest.mark.parametrize("where", ["more", "more_user"])
def test_items_of_a_later_edition_are_ignored(box: Agent, where: str) -> None:
    """PS3.8 section 9.3.1: items that are not recognised shall be ignored and not processed."""
    with scu.SCU(box.port) as peer:
        peer.associate(**{where: scu.item(0x77, b"whatever")})
        image = data.instance()
        assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.release()


# DCMTK's options to propose a transfer syntax, the syntax that must be used then, and how a file in it is made.
PROPOSALS = [
    ("--propose-uncompr", ExplicitVRLittleEndian, None), ("--propose-little", ExplicitVRLittleEndian, None),
    ("--propose-big", ExplicitVRBigEndian, ["dcmconv", "+tb"]),
    ("--propose-implicit", ImplicitVRLittleEndian, ["dcmconv", "+ti"]),
    ("--propose-deflated", DeflatedExplicitVRLittleEndian, ["dcmconv", "+td"]),
    ("--propose-lossless", UID("1.2.840.10008.1.2.4.70"), ["dcmcjpeg", "+e1"]),
    ("--propose-jpeg8", UID("1.2.840.10008.1.2.4.50"), ["dcmcjpeg", "+eb"]),
    ("--propose-jpeg12", UID("1.2.840.10008.1.2.4.51"), ["dcmcjpeg", "+ee"]),
    ("--propose-jls-lossless", UID("1.2.840.10008.1.2.4.80"), ["dcmcjpls", "+el"]),
    ("--propose-jls-lossy", UID("1.2.840.10008.1.2.4.81"), ["dcmcjpls", "+en"]),
    ("--propose-rle", UID("1.2.840.10008.1.2.5"), ["dcmcrle"]),
    ("--propose-j2k-lossless", UID("1.2.840.10008.1.2.4.90"), "examples_jpeg2k.dcm"),
    ("--propose-j2k-lossy", UID("1.2.840.10008.1.2.4.91"), "JPEG2000.dcm"),
    ("--propose-mpeg2", UID("1.2.840.10008.1.2.4.100"), "video"),
    ("--propose-mpeg2-high", UID("1.2.840.10008.1.2.4.101"), "video"),
    ("--propose-mpeg4", UID("1.2.840.10008.1.2.4.102"), "video"),
    ("--propose-mpeg4-bd", UID("1.2.840.10008.1.2.4.103"), "video"),
    ("--propose-mpeg4-2-2d", UID("1.2.840.10008.1.2.4.104"), "video"),
    ("--propose-mpeg4-2-3d", UID("1.2.840.10008.1.2.4.105"), "video"),
    ("--propose-mpeg4-2-st", UID("1.2.840.10008.1.2.4.106"), "video"),
    ("--propose-hevc", UID("1.2.840.10008.1.2.4.107"), "video"),
    ("--propose-hevc10", UID("1.2.840.10008.1.2.4.108"), "video"),
]


def made(folder: Path, syntax: str, how: Any) -> Path:
    """A file in a transfer syntax, encoded by DCMTK where it can."""
    target = folder / "image.dcm"
    if isinstance(how, str) and how != "video":
        image = dcmread(Path(pydicom.data.__file__).parent / "test_files" / how)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.save_as(target)
        return target
    image = data.instance(size=(32, 32), sop_class=SecondaryCaptureImageStorage)
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelData = 7, data.pixels(32, 16, seed=5)
    if how == "video":
        image = data.instance(sop_class=VideoEndoscopicImageStorage, transfer_syntax=syntax, size=(8, 8))
        image.NumberOfFrames, image.PixelData = 2, encapsulate([b"\0\0\1\xb3 a stream of video" * 40])
        image["PixelData"].VR = "OB"
        image["PixelData"].is_undefined_length = True
    image.save_as(target, enforce_file_format=True)
    if isinstance(how, list):
        plain = target.rename(folder / "plain.dcm")
        proof.run(how[0], *how[1:], plain, target)
    assert dcmread(target).file_meta.TransferSyntaxUID == syntax
    return target


@pytest.mark.parametrize(("option", "syntax", "how"), PROPOSALS, ids=[option for option, *_ in PROPOSALS])
def test_storescu_in_every_syntax(box: Agent, tmp_path: Path, option: str, syntax: UID, how: Any) -> None:
    """Every proposal that DCMTK can make, with a file that is really encoded so: it arrives in that encoding."""
    file = made(tmp_path, syntax, how)
    _, sop_instance, _ = names(file)
    proof.run("storescu", "-aec", "RELAY", "--required", option, "127.0.0.1", str(box.port), file)
    kept = proof.stored(box, sop_instance)
    assert dcmread(kept).file_meta.TransferSyntaxUID == syntax
    assert dcmread(kept).PixelData == dcmread(file).PixelData
    assert dcmread(kept) == dcmread(file)
    assert proof.run("dcmftest", kept).stdout.startswith("yes:")


def test_dcmsend_of_a_folder(box: Agent, tmp_path: Path) -> None:
    """dcmsend proposes what the files need; its own report must say that all were taken."""
    images = list(data.study(2, 20, modality="CT"))
    files = data.write(images, tmp_path / "files")
    compressed = made(tmp_path, UID("1.2.840.10008.1.2.4.70"), ["dcmcjpeg", "+e1"]).rename(tmp_path / "files" / "z.dcm")
    proof.run("dcmsend", "-aec", "RELAY", "-dn", "+sd", "+crf", tmp_path / "report", "127.0.0.1", str(box.port),
              tmp_path / "files")
    report = (tmp_path / "report").read_text()
    assert report.count("0000") >= 1 or "SUCCESS" in report.upper()
    for file in [*files, compressed]:
        assert dcmread(proof.stored(box, names(file)[1])) == dcmread(file)


def test_orthanc_as_the_sender(box: Agent, tmp_path: Path) -> None:
    """Another product's C-STORE client, with its own negotiation and its own count of what failed."""
    images = list(data.study(2, 15))
    with peers.orthanc(tmp_path / "orthanc", DicomModalities={"relay": ["RELAY", "127.0.0.1", box.port]}) as orthanc:
        for path in data.write(images, tmp_path / "files"):
            requests.post(f"{orthanc.rest}/instances", data=path.read_bytes(), timeout=PATIENCE).raise_for_status()
        answer = requests.post(f"{orthanc.rest}/modalities/relay/store", json={"Resources": orthanc.instances()},
                               timeout=PATIENCE)
        assert answer.json()["FailedInstancesCount"] == 0 and answer.json()["InstancesCount"] == len(images)
    rows = proof.all_rows(box, [str(image.SOPInstanceUID) for image in images])
    assert {row["calling_ae"] for row in rows.values()} == {"ORTHANC"}
    for image in images:
        assert dcmread(proof.stored(box, image.SOPInstanceUID)).PixelData == image.PixelData


def test_six_senders_at_once(box: Agent, tmp_path: Path) -> None:
    """Scanners do not queue up for each other: six storescu processes, none of whose instances may go astray."""
    storescu = peers.needed("storescu")
    sent: list[str] = []
    senders = []
    for number in range(6):
        images = list(data.study(2, 25))
        sent += [str(image.SOPInstanceUID) for image in images]
        data.write(images, tmp_path / str(number))
        senders.append(subprocess.Popen([storescu, "-aet", f"SCU{number}", "-aec", "RELAY", "+sd", "127.0.0.1",
                                         str(box.port), str(tmp_path / str(number))]))
    assert [sender.wait(PATIENCE) for sender in senders] == [0] * 6
    rows = proof.all_rows(box, sent)
    assert len(rows) == 300 and len({row["calling_ae"] for row in rows.values()}) == 6
    assert {row["copies"] for row in rows.values()} == {1}
    closed = wait_for(lambda: box.ledger.all("SELECT calling_ae, acknowledged, ended FROM association "
                                             "WHERE calling_ae LIKE 'SCU_' AND closed IS NOT NULL"))
    assert sorted((row["acknowledged"], row["ended"]) for row in closed) == [(50, "released")] * 6


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Two receivers on one port, one on another."""
    port = peers.free_port()
    receivers = "\n".join(f'[[receiver]]\nae_title = "{title}"\naddress = "127.0.0.1"\nport = {number}\nallow = ["*"]'
                          for title, number in (("MORNING", port), ("EVENING", port), ("NIGHT 1", 0)))
    with running(Agent(tmp_path_factory.mktemp("several"), receivers=receivers), "receive") as agent:
        yield agent


def test_receivers_share_a_port_or_have_their_own(several: Agent) -> None:
    """As XNAT's SCP receivers: the called AE title decides, and each keeps its instances in its own folder."""
    assert several.ports["MORNING"] == several.ports["EVENING"] != several.ports["NIGHT 1"]
    image = data.instance()
    for title in ("MORNING", "EVENING", "NIGHT 1"):
        with scu.SCU(several.ports[title]) as peer:
            peer.associate(called=title)
            assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
            peer.release()
    found = wait_for(lambda: len(r := proof.rows(several, image.SOPInstanceUID)) == 3 and r)
    assert {(row["receiver"], row["path"].split("/")[0], row["copies"]) for row in found} == {
        ("MORNING", "MORNING", 1), ("EVENING", "EVENING", 1), ("NIGHT_1", "NIGHT_1", 1)}
    for row in found:
        title = proof.part10(several.config.spool / row["path"])[0][0x18].rstrip().decode()
        assert title == row["receiver"].replace("_", " ")
    with scu.SCU(several.ports["NIGHT 1"]) as peer:  # a title that lives on the other port is unknown here
        peer.send(scu.associate_rq(called="MORNING"))
        assert peer.read() == (scu.RJ, bytes((0, 1, 1, 7)))


def test_asynchronous_window(box: Agent) -> None:
    """A sender with a window fills the line: twenty requests before the first answer, and twenty answers, in order."""
    with scu.SCU(box.port) as peer:
        peer.associate(window=(0, 0))
        invoked, performed = (int.from_bytes(peer.user[0x53][at:at + 2], "big") for at in (0, 2))
        assert invoked >= 20 and performed == 1
        images = [data.instance(number=n) for n in range(20)]
        for n, image in enumerate(images):
            content = scu.encode(image)
            peer.send(scu.pdu(scu.P_DATA, scu.pdv(1, 3, scu.c_store(image.SOPInstanceUID, n + 100))
                              + scu.pdv(1, 2, content)))
        answers = [peer.response() for _ in images]
        assert [(answer["responded"], answer["status"]) for answer in answers] == [(n + 100, 0) for n in range(20)]
        assert [answer["affected_instance"] for answer in answers] == [image.SOPInstanceUID for image in images]
        peer.release()
    proof.all_rows(box, [str(image.SOPInstanceUID) for image in images])
    ae = AE()
    ae.add_requested_context(MRImageStorage)
    wish = AsynchronousOperationsWindowNegotiation()
    wish.maximum_number_operations_invoked, wish.maximum_number_operations_performed = 5, 3
    association = ae.associate("127.0.0.1", box.port, ae_title="RELAY", ext_neg=[wish])
    assert association.acceptor.asynchronous_operations == (5, 1)
    with undisturbed(association):
        association.release()
    with scu.SCU(box.port) as peer:  # who asks for none gets none (PS3.7 section D.3.3.3)
        assert 0x53 not in peer.associate().user


def test_nothing_is_left_lying_about(box: Agent) -> None:
    """After all of the above: each file hashes to its name, ledger and disk agree, and nothing failed unseen."""
    assert proof.intact(box) > 300
    assert proof.failures(box.log) == []
