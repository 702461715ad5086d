"""The same instance again: same bytes count once, other bytes are kept beside the first and shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import generate_uid

from tests import data
from tests.harness import Agent, running, wait_for
from tests.receive import proof, scu


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Both services; no route takes anything, so that sessions are held and can be looked at."""
    with running(Agent(tmp_path_factory.mktemp("both"))) as agent:
        yield agent


def store(agent: Agent, *images: Any, calling: str = "SCANNER") -> None:
    """Send over one association; all must be acknowledged."""
    with scu.SCU(agent.port) as peer:
        peer.associate(calling=calling)
        for image in images:
            assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.release()


def copies(agent: Agent, sop_instance: str, count: int) -> Any:
    """Wait for so many copies; the row."""
    return wait_for(lambda: (r := proof.rows(agent, sop_instance)) and sum(row["copies"] for row in r) == count and r,
                    say=f"{count} copies of {sop_instance}")


def shipments(agent: Agent, study: str, states: list[str]) -> list[Any]:
    """Wait until a study's shipments are in these states, by supplement."""
    def found() -> list[Any]:
        rows = agent.ledger.all("SELECT * FROM shipment WHERE study_uid = ? ORDER BY supplement", study)
        return rows if [row["state"] for row in rows] == states else []

    listed: list[Any] = wait_for(found, say=f"{study} does not become {states}")
    return listed


def files(agent: Agent, sop_instance: str) -> list[Path]:
    """Files that have this UID in their File Meta."""
    return [path for path in agent.config.spool.rglob("*.dcm")
            if proof.part10(path)[0][3].rstrip(b"\0").decode() == sop_instance]


def test_same_bytes_again(box: Agent) -> None:
    """A scanner that repeats what was acknowledged: acknowledged, one file, one row, counted once, and later too."""
    image = data.instance()
    before = box.json("status")
    store(box, image)
    store(box, image, image, calling="OTHER")
    (row,) = copies(box, image.SOPInstanceUID, 3)
    assert row["calling_ae"] == "SCANNER" and len(files(box, image.SOPInstanceUID)) == 1
    (shipment,) = shipments(box, image.StudyInstanceUID, ["held"])
    assert shipment["instances"] == 1 and shipment["bytes"] == row["size"]
    store(box, image)  # when the session is complete: no supplement for what is there
    copies(box, image.SOPInstanceUID, 4)
    shipments(box, image.StudyInstanceUID, ["held"])
    after = box.json("status")
    assert after["balance"]["received"] - before["balance"]["received"] == 1
    assert after["repeated"] - before["repeated"] == 3 and after["conflicts"] == before["conflicts"]
    shown = box.json("show", str(shipment["id"]))
    assert shown["series"][0]["repeated"] == 3 and shown["conflicts"] == [] and shown["related"] == []


def test_other_bytes_under_the_same_uid(box: Agent) -> None:
    """Both are kept; the newer goes on as a supplement of the same session, and the conflict is shown to people."""
    image = data.instance()
    other = deepcopy(image)
    other.PixelData = bytes(len(image.PixelData))
    before = box.json("status")["conflicts"]
    store(box, image)
    store(box, other)
    both = copies(box, image.SOPInstanceUID, 2)
    assert len(both) == 2 and len(files(box, image.SOPInstanceUID)) == 2
    first, second = shipments(box, image.StudyInstanceUID, ["held", "held"])
    rows = proof.rows(box, image.SOPInstanceUID)
    assert [row["shipment"] for row in rows] == [first["id"], second["id"]]
    assert rows[0]["conflict"] is None and rows[1]["conflict"] == rows[0]["id"]
    assert (first["supplement"], second["supplement"]) == (0, 1)
    contents = [proof.part10(box.config.spool / row["path"])[1] for row in rows]
    assert contents == [scu.encode(image), scu.encode(other)]
    shown = box.json("show", str(second["id"]))
    assert [(c["sop_instance"], c["older_instance"], c["older_shipment"]) for c in shown["conflicts"]] == [
        (image.SOPInstanceUID, rows[0]["id"], first["id"])]
    assert [r["shipment"] for r in shown["related"]] == [first["id"]] and shown["supplement"] == 1
    assert box.json("status")["conflicts"] == before + 1
    assert image.SOPInstanceUID in box.cli("show", str(second["id"])).stdout


def test_three_versions_and_their_repeats(box: Agent) -> None:
    """Each version in a shipment of its own, in the order of arrival, and each repeat counted with its own version."""
    image = data.instance()
    versions = [deepcopy(image) for _ in range(3)]
    for number, version in enumerate(versions):
        version.InstitutionName = f"version {number}"
    store(box, *versions, *versions)
    rows = copies(box, image.SOPInstanceUID, 6)
    assert [row["copies"] for row in rows] == [2, 2, 2]
    listed = shipments(box, image.StudyInstanceUID, ["held"] * 3)
    assert [row["shipment"] for row in proof.rows(box, image.SOPInstanceUID)] == [s["id"] for s in listed]
    assert [s["instances"] for s in listed] == [1, 1, 1]


def test_a_version_only_in_file_meta_differs(box: Agent) -> None:
    """The same data set from another scanner console is the same instance: the bytes of the data set decide."""
    image = data.instance()
    store(box, image, calling="CONSOLE1")
    store(box, image, calling="CONSOLE2")
    (row,) = copies(box, image.SOPInstanceUID, 2)
    assert row["conflict"] is None


def test_over_four_associations_at_once(box: Agent) -> None:
    """Retries that overlap, over both receiving processes: all acknowledged, one file, one row, copies right."""
    images = [*data.study(1, 12), *data.study(1, 3, size=(800, 800))]  # some too large for the journal
    barrier = threading.Barrier(4)
    statuses: list[int] = []

    def sender() -> None:
        with scu.SCU(box.port) as peer:
            peer.associate()
            for image in images:
                content = scu.encode(image)
                barrier.wait(60)
                statuses.append(peer.store(image.SOPInstanceUID, content))
            peer.release()

    threads = [threading.Thread(target=sender) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert statuses == [0] * 60
    for image in images:
        (row,) = copies(box, image.SOPInstanceUID, 4)
        assert len(files(box, image.SOPInstanceUID)) == 1 and row["copies"] == 4
    for study in {image.StudyInstanceUID for image in images}:
        (shipment,) = shipments(box, study, ["held"])
        assert shipment["instances"] == sum(image.StudyInstanceUID == study for image in images)


def test_a_late_instance_is_a_supplement(box: Agent) -> None:
    """What comes after the session was complete is not lost and not a new session."""
    study = generate_uid()
    images = list(data.study(1, 4, study=study))
    store(box, *images[:3])
    shipments(box, study, ["held"])
    store(box, images[3])
    first, second = shipments(box, study, ["held", "held"])
    assert (first["instances"], second["instances"]) == (3, 1) and second["supplement"] == 1


def test_a_lost_file_is_replaced_by_a_repeat(box: Agent) -> None:
    """A disk lost a file and the scanner sends it again: the row takes the new file instead of throwing it away."""
    image = data.instance()
    store(box, image)
    (row,) = copies(box, image.SOPInstanceUID, 1)
    path = box.config.spool / row["path"]
    wait_for(path.exists)
    path.unlink()
    store(box, image)
    copies(box, image.SOPInstanceUID, 2)
    (row,) = proof.rows(box, image.SOPInstanceUID)
    assert proof.part10(box.config.spool / row["path"])[1] == scu.encode(image)


def test_an_instance_that_lies_about_its_uid(box: Agent) -> None:
    """Sent under one UID, another in the data set: kept, in quarantine, with the reason, and in the sum."""
    image = data.instance()
    liar = generate_uid()
    with scu.SCU(box.port) as peer:
        peer.associate()
        assert peer.store(liar, scu.encode(image)) == 0
        peer.release()
    (row,) = wait_for(lambda: (r := proof.rows(box, liar)) and r[0]["problem"] and r)
    assert "not the one it was sent under" in row["problem"]
    assert any(entry["instance"] == row["id"] for entry in box.json("list", "--quarantined"))


def test_the_sum_is_right(box: Agent) -> None:
    """After all of the above: each file hashes to its name, ledger and disk agree, and nothing failed unseen."""
    assert proof.intact(box) > 20
    assert proof.failures(box.log) == []
