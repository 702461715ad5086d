"""Files that others put into the landing directory, and `relay-agent upload`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom.data
import pytest
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid

from relay_agent.config import load
from relay_agent.ledger import Ledger
from relay_agent.spool import Spool
from relay_agent.stage import Landing
from tests import data, peers
from tests.harness import PROJECT, Agent, running, wait_for
from tests.receive import proof, scu

RECEIVERS = "\n".join(f'[[receiver]]\nae_title = "{title}"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]'
                      for title in ("RELAY", "SECOND 1"))


def stage(stable: str = "1 s", rescan: str = "2 s") -> str:
    """Settings."""
    return f'[stage]\nquiet = "1 s"\nlongest = "1 min"\nlanding_stable = "{stable}"\nrescan = "{rescan}"'


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Only the working service: the landing directory needs no receiver."""
    agent = Agent(tmp_path_factory.mktemp("landing"), receivers=RECEIVERS, stage=stage())
    with running(agent, "work"):
        wait_for(agent.config.landing.is_dir)
        wait_for((agent.config.landing / "SECOND_1").is_dir)
        yield agent


def gone(*paths: Path) -> None:
    """Wait until files were taken."""
    wait_for(lambda: not any(os.path.lexists(path) for path in paths), say=f"not taken in: {paths}")


def written(image: Any, path: Path) -> bytes:
    """Write an image; the bytes of its data set."""
    image.save_as(path, enforce_file_format=True)
    return proof.data_set(path)


def quarantined(agent: Agent, reason: str) -> list[dict[str, Any]]:
    """What is in quarantine for that reason."""
    return [row for row in agent.json("list", "--quarantined") if reason in row["reason"]]


def test_a_folder_of_files(box: Agent, tmp_path: Path) -> None:
    """A CD that was copied: all taken in byte for byte, folders tidied away, the session is there."""
    images = list(data.study(2, 10))
    folder = box.config.landing / "cd" / "DICOM"
    paths = data.write(images, folder)
    contents = {image.SOPInstanceUID: proof.data_set(path) for image, path in zip(images, paths, strict=True)}
    gone(*paths)
    rows = proof.all_rows(box, [str(uid) for uid in contents])
    for uid, row in rows.items():
        assert row["via"] == "landing" and row["receiver"] == "RELAY"
        assert proof.part10(box.config.spool / row["path"])[1] == contents[uid]
    wait_for(lambda: not (box.config.landing / "cd").exists(), say="empty folders stay")
    assert (box.config.landing / "RELAY").is_dir() and (box.config.landing / "SECOND_1").is_dir()
    wait_for(lambda: box.ledger.value("SELECT sum(instances) FROM shipment WHERE study_uid = ? AND state = 'held'",
                                      images[0].StudyInstanceUID) == 20, 60)


def test_file_meta_of_others_is_kept(box: Agent) -> None:
    """The file came from somewhere else: its File Meta stays as it was, preamble and private part too."""
    image = data.instance()
    image.preamble = b"II*\0" + bytes(124)
    image.file_meta.SourceApplicationEntityTitle = "ELSEWHERE"
    path = box.config.landing / "meta.dcm"
    image.save_as(path, enforce_file_format=True)
    raw = path.read_bytes()
    gone(path)
    row = proof.row(box, str(image.SOPInstanceUID))
    assert (box.config.spool / row["path"]).read_bytes() == raw and row["calling_ae"] == "ELSEWHERE"


def test_a_subfolder_is_a_receiver(box: Agent) -> None:
    """Files for another receiver's routes go into its folder, at any depth."""
    image, deep = data.instance(), data.instance()
    (box.config.landing / "SECOND_1" / "a" / "b").mkdir(parents=True)
    paths = [box.config.landing / "SECOND_1" / "x.dcm", box.config.landing / "SECOND_1" / "a" / "b" / "y.dcm"]
    written(image, paths[0])
    written(deep, paths[1])
    gone(*paths)
    for one in (image, deep):
        row = proof.row(box, str(one.SOPInstanceUID))
        assert row["receiver"] == "SECOND_1" and row["path"].startswith("SECOND_1/")


def test_half_written_files_are_left_alone(box: Agent) -> None:
    """A copy over a slow share, in pieces for longer than the waiting time: taken once, when it is whole."""
    image = data.instance(size=(200, 200))
    path = box.config.landing / "slow.dcm"
    whole = box.folder / "whole.dcm"
    content = written(image, whole)
    raw = whole.read_bytes()
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(raw), len(raw) // 12 + 1):
            file.write(raw[at:at + len(raw) // 12 + 1])
            time.sleep(0.4)
            assert path.exists(), "taken although it was being written"
    gone(path)
    assert proof.part10(proof.stored(box, str(image.SOPInstanceUID)))[1] == content


def test_taken_only_when_it_is_stable(box: Agent) -> None:
    """Touched again and again: it stays, however often; then it goes."""
    path = box.config.landing / "touched.dcm"
    written(data.instance(), path)
    for _ in range(10):
        os.utime(path)
        time.sleep(0.4)
        assert path.exists()
    gone(path)


def test_what_is_no_dicom_is_quarantined_with_its_reason(box: Agent) -> None:
    """Never dropped, never delivered, always shown: junk, an empty file, a torn one, a DICOMDIR."""
    landing, aside = box.config.landing, box.folder / "aside"
    before = box.json("status")["balance"]["quarantined"]
    aside.mkdir()
    whole = aside / "whole.dcm"
    written(data.instance(), whole)
    raw = whole.read_bytes()
    contents = {"AUTORUN.INF": b"[autorun]\r\nopen=viewer.exe", "empty": b"", "nothing": bytes(128) + b"DICM",
                "torn.dcm": raw[:raw.index(b"\x08\0\x18\0UI") + 20], "tornmeta.dcm": raw[:150]}
    files = FileSet()
    files.add(data.instance(StudyTime="120000", StudyID="1"))
    files.write(aside / "medium")
    # Each comes whole and at once: the agent takes them in meanwhile, however slow we are.
    for name, content in contents.items():
        (landing / name).write_bytes(content)
    (aside / "medium").rename(landing / "medium")
    gone(*(landing / name for name in contents), landing / "medium" / "DICOMDIR")
    wait_for(lambda: box.status()["balance"]["quarantined"] - before == 6, say="six files are in quarantine")
    assert len(quarantined(box, "no DICOM preamble")) >= 2 and len(quarantined(box, "DICOMDIR")) == 1
    assert len(quarantined(box, "File Meta")) >= 2
    assert box.json("status")["balance"]["difference"] == 0
    kept = [path.read_bytes() for path in box.config.spool.rglob("*.dcm")]
    for name in ("AUTORUN.INF", "torn.dcm"):
        assert any(contents[name] in there for there in kept), "a quarantined file must be kept"
    assert "AUTORUN" not in box.log and "autorun" not in box.log


@pytest.mark.parametrize("name", [b"a\nb.dcm", b"\xff\xfe\x80.dcm", b" ", b"-rf", b"%s{}$(reboot).dcm", b"x" * 250,
                                  "Müller^Jörg.dcm".encode()])
def test_names_of_any_bytes(box: Agent, name: bytes) -> None:
    """Names come from scanners, from Windows, from hell; they may hold a patient's name and are never logged."""
    image = data.instance()
    path = Path(os.fsdecode(os.path.join(os.fsencode(box.config.landing), name)))
    written(image, box.folder / "plain.dcm")
    shutil.copy(box.folder / "plain.dcm", path)
    junk = Path(os.fsdecode(os.path.join(os.fsencode(box.config.landing), name[:200] + b"-junk")))
    junk.write_bytes(b"junk " + name)
    gone(path, junk)
    assert proof.row(box, str(image.SOPInstanceUID))["problem"] is None
    assert "ller^J" not in box.log and "rf-junk" not in box.log


def test_links_are_not_followed(box: Agent, tmp_path: Path) -> None:
    """A link out of the landing directory is nobody's instance: its target stays, and nothing of it is taken."""
    image = data.instance()
    written(image, tmp_path / "elsewhere.dcm")
    (box.config.landing / "link.dcm").symlink_to(tmp_path / "elsewhere.dcm")
    (box.config.landing / "dangling.dcm").symlink_to(tmp_path / "nothing")
    other = box.config.landing / "after.dcm"
    written(data.instance(), other)
    gone(other)
    assert (tmp_path / "elsewhere.dcm").exists() and not proof.rows(box, str(image.SOPInstanceUID))
    (box.config.landing / "link.dcm").unlink()
    (box.config.landing / "dangling.dcm").unlink()


def test_the_same_file_twice_counts_once(box: Agent) -> None:
    """A CD copied twice: one instance, two copies, and both files are out of the way."""
    image = data.instance()
    one, two = box.config.landing / "one.dcm", box.config.landing / "SECOND_1.dcm"
    written(image, one)
    shutil.copy(one, two)
    gone(one, two)
    row = wait_for(lambda: (r := proof.rows(box, str(image.SOPInstanceUID))) and r[0]["copies"] == 2 and r)
    assert len(row) == 1


def test_real_files_of_any_syntax(box: Agent) -> None:
    """pydicom's sample files: each becomes an instance or goes into quarantine with a reason; none is left or lost."""
    samples = [path for path in sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))]
    assert len(samples) > 60
    before = box.json("status")
    folder = box.config.landing / "samples"
    folder.mkdir()
    for path in samples:
        shutil.copy(path, folder)
    gone(*(folder / path.name for path in samples))
    after = wait_for(lambda: (s := box.status()) and s["balance"]["received"] + s["repeated"]
                     - before["balance"]["received"] - before["repeated"] == len(samples) and s)
    assert after["balance"]["difference"] == 0
    assert all(entry["reason"] for entry in box.json("list", "--quarantined"))


def test_when_notifications_are_lost(tmp_path: Path) -> None:
    """A share that is mounted over the directory tells nothing: the periodic rescan finds what is in it."""
    agent = Agent(tmp_path, stage=stage(rescan="3 s"))
    with running(agent, "work"):
        share = agent.config.landing / "RELAY"
        wait_for(share.is_dir)
        time.sleep(1)  # the first scan has been
        if proof.run("mount", "-t", "tmpfs", "none", share, check=False).returncode != 0:
            proof.not_permitted("mounting is not permitted")
        try:
            image = data.instance()
            written(image, share / "unseen.dcm")
            proof.row(agent, str(image.SOPInstanceUID))
            gone(share / "unseen.dcm")
        finally:
            proof.run("umount", "--lazy", share)


def test_without_notifications_at_all(tmp_path: Path) -> None:
    """The system has none left to give (fs.inotify.max_user_instances): the worker starts, and the rescan finds all."""
    unshare = peers.needed("unshare")
    if proof.run(unshare, "--user", "--map-root-user", "true", check=False).returncode != 0:
        proof.not_permitted("user namespaces are not permitted")
    agent = Agent(tmp_path, stage=stage(rescan="2 s"))
    wrapped = ["sh", "-c", 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"', "sh"]
    try:
        started(agent, [unshare, "--user", "--map-root-user", *wrapped])
        wait_for((agent.config.landing / "RELAY").is_dir, say=agent.log)
        image = data.instance()
        written(image, agent.config.landing / "unseen.dcm")
        wait_for(lambda: proof.rows(agent, str(image.SOPInstanceUID)), say=agent.log)
        assert "notifications" in agent.log and proof.failures(agent.log) == []
    finally:
        agent.stop(kill=True)


def started(agent: Agent, prefix: list[str]) -> None:
    """Start the worker through another program."""
    with (agent.folder / "work.log").open("ab") as output:
        agent.processes["work"] = subprocess.Popen(
            [*prefix, sys.executable, "-m", "relay_agent", "work", "--config", str(agent.file)], cwd=PROJECT,
            stdout=output, stderr=output)


def test_files_that_were_there_before_the_start(tmp_path: Path) -> None:
    """Put there while the worker was down."""
    agent = Agent(tmp_path, stage=stage())
    agent.config.landing.mkdir(parents=True)
    image = data.instance()
    written(image, agent.config.landing / "early.dcm")
    with running(agent, "work"):
        proof.row(agent, str(image.SOPInstanceUID))
        gone(agent.config.landing / "early.dcm")


def test_unreadable_and_immovable_files(tmp_path: Path) -> None:
    """What cannot be removed stays and is said; it is not counted again and again, and the next file is taken."""
    if os.geteuid() != 0 or not shutil.which("chattr"):
        proof.not_permitted("files cannot be made immutable")
    agent = Agent(tmp_path, stage=stage())
    with running(agent, "work"):
        wait_for((agent.config.landing / "RELAY").is_dir)
        stuck = agent.config.landing / "stuck.dcm"
        image, other = data.instance(), data.instance()
        written(image, stuck)
        if proof.run("chattr", "+i", stuck, check=False).returncode != 0:
            proof.not_permitted("the file system has no immutable files")
        try:
            written(other, agent.config.landing / "other.dcm")
            gone(agent.config.landing / "other.dcm")
            wait_for(lambda: "cannot be taken in" in agent.log)
            time.sleep(5)
            assert stuck.exists()
            assert proof.row(agent, str(image.SOPInstanceUID))["copies"] == 1
        finally:
            proof.run("chattr", "-i", stuck)
        gone(stuck)


def test_full_disk_keeps_the_file_in_the_landing_directory(tmp_path: Path) -> None:
    """Short of space, a file stays where it is until it is taken: moved out only when it is durable."""
    agent = Agent(tmp_path, '[receive]\nreserve = "100 TB"', stage=stage())
    with running(agent, "work"):
        wait_for((agent.config.landing / "RELAY").is_dir)
        path = agent.config.landing / "waits.dcm"
        content = written(data.instance(), path)
        wait_for(lambda: "cannot be taken in" in agent.log)
        assert proof.data_set(path) == content and not proof.partials(agent)
        assert agent.ledger.value("SELECT count(*) FROM instance") == 0


def test_moved_out_only_after_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed after the sync of its copy, and after its row was committed: seen call by call."""
    agent = Agent(tmp_path, stage=stage(stable="1 s"))
    config = load(agent.file)
    landing = Landing(config, ledger := Ledger(config.ledger), Spool(config.spool, 0))
    path = config.landing / "image.dcm"
    written(data.instance(), path)
    calls: list[str] = []
    real_sync, real_unlink = os.fsync, Path.unlink

    def sync(fd: int) -> None:
        real_sync(fd)
        where = os.readlink(f"/proc/self/fd/{fd}")
        calls.append("folder" if os.path.isdir(where) else "file")

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            calls.append(f"unlink with {ledger.value('SELECT count(*) FROM instance')} rows")
        real_unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "unlink", unlink)
    try:
        wait_for(lambda: landing.scan() or not path.exists())
    finally:
        landing.close()
    assert calls[-1] == "unlink with 1 rows"
    assert "file" in calls and calls.index("file") < len(calls) - 1 and calls[-2] == "folder"


# relay-agent upload

def test_upload(tmp_path: Path) -> None:
    """By hand, without any service running: counts, reasons, exit status; the files stay where they are."""
    agent = Agent(tmp_path / "box", receivers=RECEIVERS, stage=stage())
    images = list(data.study(2, 5))
    paths = data.write(images, tmp_path / "export")
    (tmp_path / "export" / "README").write_text("no image")
    done = agent.cli("upload", str(tmp_path / "export"), "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["files"], told["taken"]) == (1, 11, 10)
    assert [(Path(p["file"]).name, "preamble" in p["problem"]) for p in told["problems"]] == [("README", True)]
    assert all(path.exists() for path in paths)
    rows = proof.all_rows(agent, [str(image.SOPInstanceUID) for image in images])
    assert {(row["via"], row["receiver"]) for row in rows.values()} == {("upload", "RELAY")}
    done = agent.cli("upload", *map(str, paths), "--receiver", "SECOND 1")
    assert done.returncode == 0 and "10 of 10" in done.stdout
    assert agent.ledger.value("SELECT count(*) FROM instance WHERE receiver = 'SECOND_1'") == 10
    done = agent.cli("upload", str(paths[0]), "--receiver", "NOSUCH")
    assert done.returncode == 1 and "SECOND 1" in done.stderr
    assert agent.cli("upload", str(tmp_path / "nowhere")).returncode == 1
    assert agent.json("status")["balance"] == {"received": 21, "delivered": 0, "held": 0, "quarantined": 1,
                                               "rejected": 0, "on_its_way": 20, "difference": 0}


def test_upload_of_names_of_any_bytes(tmp_path: Path) -> None:
    """What is printed about a file must be printable, whatever its name."""
    agent = Agent(tmp_path / "box")
    folder = tmp_path / "export"
    folder.mkdir()
    junk = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe\n.txt"))
    junk.write_bytes(b"junk")
    for arguments in ((), ("--json",)):
        for strict in (os.environ, os.environ | {"PYTHONIOENCODING": "utf-8:strict"}):  # locales differ in that
            done = subprocess.run([sys.executable, "-m", "relay_agent", "upload", "--config", agent.file, folder,
                                   *arguments], cwd=PROJECT, env=strict, capture_output=True, check=False)
            assert done.returncode == 1 and b"preamble" in done.stdout and b"Traceback" not in done.stderr, done.stderr


def test_upload_beside_the_services(tmp_path: Path) -> None:
    """Uploading while the receiver receives the same study: everything once, in the same session."""
    with running(Agent(tmp_path / "box", stage=stage())) as agent:
        study = generate_uid()
        images = list(data.study(2, 20, study=study))
        data.write(images, tmp_path / "export")
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(agent.cli("upload", str(tmp_path / "export"))))
        thread.start()
        with scu.SCU(agent.port) as peer:
            peer.associate()
            for image in reversed(images):
                assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
            peer.release()
        thread.join()
        assert results[0].returncode == 0, results[0].stderr
        rows = proof.all_rows(agent, [str(image.SOPInstanceUID) for image in images])
        wait_for(lambda: agent.ledger.value("SELECT sum(copies) FROM instance") == 80)
        assert len(rows) == 40 and proof.intact(agent) == 40
        wait_for(lambda: agent.ledger.value("SELECT sum(instances) FROM shipment WHERE study_uid = ?", study) == 40)


def test_nothing_failed_unseen(box: Agent) -> None:
    """After all of the above: each file hashes to its name or is in quarantine, and nothing failed unseen."""
    assert proof.failures(box.log) == []
    assert box.json("status")["balance"]["difference"] == 0
    assert not [path for path in box.config.landing.rglob("*") if not path.is_dir()]
