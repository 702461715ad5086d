"""Raw k-space data into resources of an XNAT: whole and in pieces, through cuts and lies, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay_agent.config_destinations import XNAT
from relay_agent.config_values import Window
from relay_agent.destinations import Proof, Retry, Stopped
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.xnat_raw import XNATRaw
from relay_agent.kspace import join
from relay_agent.package import Damaged, Item, Manifest
from relay_agent.throttle import Closed, Throttle
from tests.central import Central
from tests.central.testing import STUDY, Client, archived, series
from tests.destinations import UNLIMITED

pytest_plugins = "tests.central.fixtures"
MIB = 2**20
NAME = "MID00358_0123456789ab.dat"


def kspace(size: int, seed: int = 1) -> bytes:
    """Samples with few bits, as a converter gives them."""
    noise = np.random.default_rng(seed).normal(size=size // 4 + 1).astype("<f4")
    return (noise.view("<u4") & 0xFFFFE000).tobytes()[:size]


def item(path: Path, content: bytes) -> Item:
    path.write_bytes(content)
    return Item(7, path, "", path.name, "", "", "", "", len(content), hashlib.md5(content).hexdigest(),
                hashlib.sha256(content).hexdigest(), False)


def shipment(folder: Path, content: bytes, **changes: Any) -> Manifest:
    """A raw file and its sidecar, of scan 4 of the session that tests archive."""
    folder.mkdir(exist_ok=True)
    items = (item(folder / NAME, content), item(folder / f"{NAME}.json", b'{"verdict": "complete"}'))
    return replace(Manifest(1, STUDY, 0, "P1", "S1", "E1", None, items, kind="raw", scan="4", series_uid=f"{STUDY}.4",
                            resource="KSPACE"), **changes)


Opener = Callable[..., XNATRaw]


@pytest.fixture
def there(site: tuple[Central, Client], tmp_path: Path) -> Opener:
    """Opens the destination with settings; a session is in the archive."""
    central, client = site
    archived(client, series(2))
    (tmp_path / "secret").write_text("relay:secret")

    def open_it(throttle: Throttle = UNLIMITED, kspace: dict[str, Any] | None = None, **settings: Any) -> XNATRaw:
        config = XNAT(**{"name": "central", "url": central.url, "credential": str(tmp_path / "secret"),
                         "timeout": "20 s", "streams": 2, "kspace": kspace or {}} | settings)
        return XNATRaw(config, throttle, Tokens(config, tmp_path / "tokens"), tmp_path)

    return open_it


def deliver(there: XNATRaw, manifest: Manifest) -> tuple[str, list[Proof]]:
    """As the Shipper does it, without its back-off."""
    said, rounds = "", 0
    while lacking := there.missing(manifest, None):
        rounds += 1
        if rounds > 2:
            raise Retry(f"{len(lacking)} files were sent and taken, and are not there")
        said = there.send(manifest, lacking)
    location = there.finish(manifest)
    proofs = there.prove(manifest, location)
    assert [proof.sop_instance for proof in proofs] == [one.sop_instance for one in manifest.items]
    return said, list(proofs)


def impatiently(there: XNATRaw, manifest: Manifest, rounds: int = 20) -> list[str]:
    """With retries; what went wrong on the way."""
    wrong = []
    for _ in range(rounds):
        try:
            deliver(there, manifest)
            return wrong
        except Retry as error:
            wrong.append(str(error))
    raise AssertionError(wrong)


def files(client: Client, place: str = "/data/projects/P1/experiments/E1/scans/4/resources/KSPACE") -> dict[str, int]:
    return {row["URI"].partition("/files/")[2]: int(row["Size"]) for row in client.table(f"{place}/files")}


def fetched(client: Client, folder: Path, place: str = "/data/projects/P1/experiments/E1/scans/4/resources/KSPACE"
            ) -> Path:
    """Everything of the resource, as somebody over there has it in a folder."""
    for name in files(client, place):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get(f"{place}/files/{name}").content)
    return folder


def joined(client: Client, folder: Path) -> bytes:
    """What the centre has after it joined."""
    assert join.main([str(fetched(client, folder)), "--remove"]) == 0
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [NAME, f"{NAME}.json"]
    return (folder / NAME).read_bytes()


def puts(central: Central) -> list[dict[str, Any]]:
    return [one for one in list(central.requests) if one["method"] == "PUT" and "/files/" in one["path"]]


SMALL = {"part_size": "1 MiB"}  # pieces of one MiB


def test_small_file_in_one_request(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    central, client = site
    content = kspace(300_000)
    said, proofs = deliver(there(), shipment(tmp_path / "s", content))
    assert said == f"200 {NAME} in one request, {NAME}.json in one request"
    assert [(proof.how, proof.server_size) for proof in proofs] == [("md5", 300_000), ("md5", 23)]
    assert files(client) == {NAME: 300_000, f"{NAME}.json": 23}
    assert joined(client, tmp_path / "got") == content
    (resource,) = [row for row in client.table("/data/projects/P1/experiments/E1/scans/4/resources")
                   if row["label"] == "KSPACE"]
    assert (resource["format"], resource["content"]) == ("SIEMENS_TWIX", "RAW")
    before = len(puts(central))
    deliver(there(), shipment(tmp_path / "s", content))  # a second time, by another process: nothing is sent
    assert len(puts(central)) == before


def test_large_file_in_pieces(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    central, client = site
    content = kspace(5 * MIB + 12_345)
    said, proofs = deliver(there(**SMALL), shipment(tmp_path / "s", content))
    assert said.startswith(f"200 {NAME} in 6 pieces")
    assert (proofs[0].how, proofs[0].server_name, proofs[0].server_size) == ("md5", "6 pieces", len(content))
    parts = [name for name in files(client) if name.startswith(f"{NAME}.parts/0")]
    assert len(parts) == 6
    assert max(one["bytes"] for one in puts(central)) == MIB
    told = client.get(f"/data/projects/P1/experiments/E1/scans/4/resources/KSPACE/files/{NAME}.parts/manifest.json"
                      ).json()
    assert told["file"]["sha256"] == hashlib.sha256(content).hexdigest()
    got = fetched(client, tmp_path / "cat")
    assert b"".join(path.read_bytes() for path in sorted((got / f"{NAME}.parts").glob("[0-9]*"))) == content  # cat
    assert joined(client, tmp_path / "got") == content
    before = len(puts(central))
    deliver(there(**SMALL), shipment(tmp_path / "s", content))
    assert len(puts(central)) == before


def test_single_request_where_the_way_stands_it(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    _, client = site
    content = kspace(5 * MIB)
    deliver(there(kspace={"single_request": "1 GB"}, **SMALL), shipment(tmp_path / "s", content))
    assert files(client)[NAME] == len(content) and len(files(client)) == 2


def test_joined_over_there_counts_as_there(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """Somebody joins between two looks; the pieces that are left are taken away."""
    central, client = site
    content = kspace(3 * MIB)
    manifest = shipment(tmp_path / "s", content)
    deliver(there(**SMALL), manifest)
    place = "/data/projects/P1/experiments/E1/scans/4/resources/KSPACE"
    client.put(f"{place}/files/{NAME}", params={"inbody": "true"}, data=content)
    before = len(puts(central))
    _, proofs = deliver(there(**SMALL), manifest)
    assert (proofs[0].how, proofs[0].server_name) == ("md5", NAME)
    assert len(puts(central)) == before
    assert files(client) == {NAME: len(content), f"{NAME}.json": 23}


@pytest.mark.parametrize("size", [2 * MIB, 3 * MIB + 4, 4 * MIB + 3, 2 * MIB + 1])
def test_packed(site: tuple[Central, Client], there: Opener, tmp_path: Path, size: int) -> None:
    central, client = site
    content = kspace(size)
    manifest = shipment(tmp_path / "s", content)
    _, proofs = deliver(there(kspace={"compression": "zstd"}, **SMALL), manifest)
    assert proofs[0].how == "md5"
    sent = sum(one["bytes"] for one in puts(central) if one["path"].endswith(".zst"))
    assert sent < 0.75 * size
    assert json.loads((tmp_path / "s" / f"{NAME}.json").read_text()) == client.get(
        f"/data/projects/P1/experiments/E1/scans/4/resources/KSPACE/files/{NAME}.json").json()
    assert joined(client, tmp_path / "got") == content
    before = len(puts(central))
    deliver(there(kspace={"compression": "zstd"}, **SMALL), manifest)  # another process packs the same
    assert len(puts(central)) == before
    deliver(there(**SMALL), manifest)  # and what was sent packed need not be sent otherwise
    assert len(puts(central)) == before


def test_session_level(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    _, client = site
    manifest = shipment(tmp_path / "s", kspace(5000), scan="", series_uid="", resource="KSPACE_UNMATCHED")
    there_now = there()
    deliver(there_now, manifest)
    assert set(files(client, "/data/projects/P1/experiments/E1/resources/KSPACE_UNMATCHED")) == {NAME, f"{NAME}.json"}


def test_scan_is_found_by_its_series(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """XNAT calls the second series 4 "4-MR1"."""
    _, client = site
    other = {"other.dcm": series(1, uid=f"{STUDY}.9.1", SeriesInstanceUID=f"{STUDY}.9")["4-1.dcm"]}
    archived(client, other, overwrite="append")
    ids = {row["UID"]: row["ID"] for row in client.table("/data/projects/P1/experiments/E1/scans")}
    assert ids == {f"{STUDY}.4": "4", f"{STUDY}.9": "4-MR1"}
    deliver(there(), shipment(tmp_path / "s", kspace(5000), series_uid=f"{STUDY}.9"))
    assert NAME in files(client, "/data/projects/P1/experiments/E1/scans/4-MR1/resources/KSPACE")
    assert files(client) == {}
    deliver(there(), shipment(tmp_path / "s", kspace(5000), series_uid="1.2.3"))  # not known there: by number
    assert NAME in files(client)


def test_waits_for_its_session(there: Opener, tmp_path: Path) -> None:
    manifest = shipment(tmp_path / "s", kspace(5000))
    with pytest.raises(Retry, match="not in the archive"):
        deliver(there(), replace(manifest, session="E2"))
    with pytest.raises(Retry, match="no scan of the series"):
        deliver(there(), replace(manifest, scan="5", series_uid="1.2.3"))
    with pytest.raises(Stopped, match="another study"):
        deliver(there(), replace(manifest, study_uid="1.2.3"))


# Cuts


def test_proxy_cuts_the_answer_and_the_server_goes_on(site: tuple[Central, Client], there: Opener, tmp_path: Path
                                                      ) -> None:
    """504 for a request that XNAT then ends: the look finds it, and it is not sent again."""
    central, client = site
    content = kspace(2 * MIB)
    central.misbehave("proxy-cut", path="KSPACE/files/.*parts/0", method="PUT", seconds=0.0, work=0.0, times=1)
    manifest = shipment(tmp_path / "s", content)
    wrong = impatiently(there(**SMALL), manifest)
    assert joined(client, tmp_path / "got") == content
    assert len([one for one in puts(central) if ".parts/0" in one["path"]]) <= 3
    assert wrong == []


def test_answers_that_come_too_late_leave_nothing_behind(site: tuple[Central, Client], there: Opener, tmp_path: Path
                                                         ) -> None:
    """The server stores pieces long after the 504, when others were sent in their place."""
    central, client = site
    content = kspace(4 * MIB)
    central.misbehave("proxy-cut", path="KSPACE/files/.*parts/0", method="PUT", seconds=0.0, work=0.5, times=2)
    impatiently(there(part_size="2 MiB"), shipment(tmp_path / "s", content))
    threading.Event().wait(0.7)
    impatiently(there(part_size="2 MiB"), shipment(tmp_path / "s", content))
    told = [name for name in files(client) if ".parts/0" in name]
    assert sum(size for name, size in files(client).items() if name in told) == len(content)
    assert joined(client, tmp_path / "got") == content


def test_a_limit_of_time_is_learned(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """The way gives each request 0.6 s and carries 8 MB/s: pieces of 8 MiB do not pass, smaller ones do."""
    central, client = site
    content = kspace(20 * MIB)
    central.misbehave("slow", path="KSPACE", method="PUT", rate=8_000_000)
    central.misbehave("body-limit", path="KSPACE", method="PUT", seconds=0.6)
    manifest = shipment(tmp_path / "s", content)
    raw = there(streams=1, kspace={"piece_time": "25 s"})
    impatiently(raw, manifest)
    assert joined(client, tmp_path / "got") == content
    cut = [one for one in puts(central) if one["status"] is None]
    assert 1 <= len(cut) <= 4, [(one["bytes"], one["status"]) for one in puts(central)]
    wasted = sum(one["bytes"] for one in cut)
    assert wasted < len(content)


def test_pieces_are_as_large_as_the_line_moves_in_their_time(site: tuple[Central, Client], there: Opener,
                                                             tmp_path: Path) -> None:
    central, _ = site
    central.misbehave("slow", path="KSPACE", method="PUT", rate=5_000_000)
    raw = there(streams=1, kspace={"piece_time": "500 ms"})
    deliver(raw, shipment(tmp_path / "s", kspace(16 * MIB)))
    sizes = [one["bytes"] for one in puts(central) if ".parts/0" in one["path"]]
    assert sizes[0] == 8 * MIB and all(MIB <= size <= 3 * MIB for size in sizes[1:]), sizes


def test_one_request_that_is_cut_goes_on_in_pieces(site: tuple[Central, Client], there: Opener, tmp_path: Path
                                                   ) -> None:
    central, client = site
    content = kspace(6 * MIB)
    central.misbehave("cut-at", path="KSPACE", method="PUT", bytes=3 * MIB)
    raw = there(kspace={"single_request": "1 GB"})
    impatiently(raw, shipment(tmp_path / "s", content))
    assert joined(client, tmp_path / "got") == content
    assert NAME not in files(client)


def test_resumes_in_another_process(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """Only what is missing is sent: nothing about pieces is kept on the box."""
    central, client = site
    content = kspace(8 * MIB)
    manifest = shipment(tmp_path / "s", content)
    first = there(streams=1, **SMALL)
    calls: list[int] = []

    def go_on(_: int) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Retry("the box goes down")

    first.listen(go_on)
    with pytest.raises(Retry, match="goes down"):
        deliver(first, manifest)
    sent = {one["path"] for one in puts(central)}
    assert len(sent) == 3
    deliver(there(streams=1, **SMALL), manifest)
    pieces = [one["path"] for one in puts(central) if ".parts/0" in one["path"]]
    assert len(pieces) == len(set(pieces)) == 8
    assert joined(client, tmp_path / "got") == content


def test_window_that_closes(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """Raw data have windows of their own within those of the destination."""
    central, client = site
    content = kspace(6 * MIB)
    manifest = shipment(tmp_path / "s", content)

    hours = iter([1] * 8)
    inner = Throttle(None, [Window(start=time(1), end=time(2))], UNLIMITED,
                     now=lambda: datetime(2026, 1, 1, next(hours, 3)))
    raw = there(inner, streams=1, **SMALL)
    with pytest.raises(Closed):
        deliver(raw, manifest)
    assert 0 < len([one for one in puts(central) if one["status"] == 200]) < 6
    deliver(there(**SMALL), manifest)
    assert joined(client, tmp_path / "got") == content


# Lies


def test_200_and_nothing_stored(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """An account without the right: one piece is sent, not fifty gigabytes."""
    central, client = site
    central.misbehave("no-permission-200", method="PUT")
    with pytest.raises(Retry, match="did not store a piece"):
        deliver(there(**SMALL), shipment(tmp_path / "s", kspace(6 * MIB)))
    assert len(puts(central)) == 1
    manifest = shipment(tmp_path / "s", kspace(5000))
    with pytest.raises(Retry, match="2 files were sent and taken, and are not there"):
        deliver(there(), manifest)
    central.behave()
    deliver(there(), manifest)
    assert set(files(client)) == {NAME, f"{NAME}.json"}


def test_no_permission(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("looker:secret")
    with pytest.raises(Retry, match="member role"):
        deliver(there(), shipment(tmp_path / "s", kspace(5000)))


@pytest.mark.parametrize("fault", ["duplicates", "disk-full", "busy-500", "busy-503", "redirect-html"])
def test_what_is_not_taken_is_sent_again(site: tuple[Central, Client], there: Opener, tmp_path: Path, fault: str
                                         ) -> None:
    central, client = site
    content = kspace(3 * MIB)
    central.misbehave(fault, path="KSPACE/files/", method="PUT", times=5)
    impatiently(there(**SMALL), shipment(tmp_path / "s", content))
    assert joined(client, tmp_path / "got") == content


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("size", [900_000, 3 * MIB])
def test_damaged_over_there(site: tuple[Central, Client], there: Opener, tmp_path: Path, keep: float | None,
                            checksums: bool, size: int) -> None:
    """Where digests are off, what has the right size is fetched back, found damaged, deleted and sent again."""
    central, client = site
    central.checksums = checksums
    content = kspace(size)
    central.misbehave("damage-files", path=r"/files/.*\.dat", method="PUT", times=1, skip=1 if size > MIB else 0,
                      keep=keep)
    wrong = impatiently(there(**SMALL), shipment(tmp_path / "s", content))
    assert joined(client, tmp_path / "got") == content
    if not checksums and keep is None:
        assert "damaged there" in wrong[0]
    raw = there(**SMALL)
    manifest = shipment(tmp_path / "s", content)
    assert raw.prove(manifest, "")[0].how == ("md5" if checksums else "bytes")


def test_left_from_other_content(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """Pieces of the same name from an earlier scrubbing are not taken for ours."""
    _, client = site
    deliver(there(**SMALL), shipment(tmp_path / "s", kspace(3 * MIB, seed=1)))
    content = kspace(3 * MIB, seed=2)
    deliver(there(**SMALL), shipment(tmp_path / "s", content))
    assert joined(client, tmp_path / "got") == content


def test_damaged_here(site: tuple[Central, Client], there: Opener, tmp_path: Path) -> None:
    """A file that is not any more what was approved is not proved, whatever the server has."""
    content = kspace(3 * MIB)
    manifest = shipment(tmp_path / "s", content)
    path = manifest.items[0].path
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(Damaged):
        deliver(there(**SMALL), manifest)
    os.truncate(path, 2 * MIB)
    with pytest.raises(Damaged):
        deliver(there(**SMALL), manifest)
    path.unlink()
    with pytest.raises(Damaged):
        deliver(there(**SMALL), manifest)
