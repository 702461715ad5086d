"""Every misbehaviour of the stand-in does what it says, and stops when told to."""

from __future__ import annotations

import hashlib
import http.client
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.central import FAULTS, Central
from tests.central.testing import IMPORT, STUDY, Client, archived, instance, series, zipped
from tests.harness import wait_for

pytest_plugins = "tests.central.fixtures"

Site = tuple[Central, Client]


def test_names_and_options_are_checked(site: Site) -> None:
    central, _ = site
    with pytest.raises(ValueError, match="no misbehaviour"):
        central.misbehave("nonsense")
    with pytest.raises(ValueError, match="no option"):
        central.misbehave("empty-list", speed=3)
    for name in FAULTS:
        central.misbehave(name)
    assert len(central.faults.listing()) == len(FAULTS)


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("400-wrap", 400, "unable to read DICOM object 4-1.dcm"),
        ("disk-full", 400, "unable to read DICOM object 4-1.dcm"),
        ("concurrent-400", 400, "Concurrent file sends of the same data is not supported."),
        ("busy-500", 500, "Internal Server Error"),
        ("busy-502", 502, "Bad Gateway"),
        ("busy-503", 503, "Service Unavailable"),
        ("401", 401, "Login attempt failed"),
        ("redirect-html", 200, "<!DOCTYPE html>"),
        ("empty-list", 200, ""),
    ],
)
def test_nothing_is_stored_then_all_is_well(site: Site, fault: str, status: int, text: str) -> None:
    central, client = site
    central.misbehave(fault, times=1)
    answer = client.send_zip(series())
    assert answer.status_code == status and text in answer.text and "prearchive" not in answer.text
    assert central.prearchive_instances("P1") == {}
    assert client.send_zip(series()).status_code == 200
    assert len(central.prearchive_instances("P1")) == 3


def test_partial_failure_and_retry_after(site: Site) -> None:
    central, client = site
    central.misbehave("disk-full", after=2)
    assert client.send_zip(series(3)).status_code == 400
    assert len(central.prearchive_instances("P1")) == 2
    central.misbehave("busy-503", retry_after=7)
    assert client.get("/data/projects").headers["Retry-After"] == "7"


def test_when_a_fault_strikes(site: Site) -> None:
    central, client = site

    def codes(count: int) -> list[int]:
        return [client.get("/data/projects").status_code for _ in range(count)]

    central.misbehave("busy-503", skip=1, times=2)
    assert codes(4) == [200, 503, 503, 200]
    central.misbehave("busy-503", path="prearchive")
    assert codes(1) == [200] and client.get("/data/prearchive/projects").status_code == 503
    central.misbehave("busy-503", method="PUT")
    assert codes(1) == [200]
    central.misbehave("busy-503", probability=0.5, seed=3)
    first = codes(20)
    central.misbehave("busy-503", probability=0.5, seed=3)
    assert codes(20) == first and 4 < first.count(503) < 16
    central.behave("busy-503")
    assert codes(1) == [200]


def test_instances_lost_or_damaged(site: Site) -> None:
    central, client = site
    files = series(4)
    sizes = {f"{STUDY}.4.{n}": len(data) for n, data in enumerate(files.values(), 1)}

    def stored(session: str) -> dict[str, Any]:
        assert client.send_zip(files, session=session, AA="true", action="commit").status_code == 200
        return central.archive_instances("P1", session)

    def digests(session: str) -> set[str]:
        rows = client.table(f"/data/projects/P1/subjects/S1/experiments/{session}/scans/4/files")
        return {row["digest"] for row in rows}

    good = {uid: one.md5 for uid, one in stored("GOOD").items()}
    central.misbehave("drop-instances", k=2)
    assert set(stored("DROP")) == {f"{STUDY}.4.3", f"{STUDY}.4.4"}
    central.behave()
    central.misbehave("truncate-instances", k=1, keep=0.9)
    assert {uid for uid, one in stored("SHORT").items() if one.size != sizes[uid]} == {f"{STUDY}.4.1"}
    central.behave()
    central.misbehave("corrupt-instances", k=3)
    bad = stored("BAD")
    assert [one.size for one in bad.values()] == list(sizes.values())
    assert sum(one.md5 != good[uid] for uid, one in bad.items()) == 3
    assert digests("BAD") == {one.md5 for one in bad.values()}  # the listing tells
    central.misbehave("corrupt-instances", k=3, silent=True)
    assert sum(one.md5 != good[uid] for uid, one in stored("ROT").items()) == 3
    assert digests("ROT") == set(good.values())  # the listing does not: only the bytes do


def test_wrong_project(site: Site) -> None:
    central, client = site
    central.misbehave("wrong-project", project="P2")
    assert client.send_zip(series(1)).text.startswith("/data/prearchive/projects/P2/")
    central.misbehave("wrong-project")
    assert client.send_zip(series(1)).text.startswith("/data/prearchive/projects/Unassigned/")


def test_resource_faults(site: Site) -> None:
    central, client = site
    target = archived(client, series(1)) + "/resources/RAW/files"

    def put() -> requests.Response:
        return client.put(
            target + "/a",
            params={"inbody": "true"},
            data=b"x",
            headers={"Content-Type": "application/octet-stream"},
        )

    for fault, status, body in (
        ("no-permission-200", 200, ""),
        ("duplicates", 200, '{"duplicates": ["a"]}'),
        ("disk-full", 500, "No space left on device"),
    ):
        central.misbehave(fault, times=1)
        answer = put()
        assert (answer.status_code, answer.text) == (status, body)
        assert client.table(target) == []
    assert put().text == "" and len(client.table(target)) == 1


def test_resource_files_damaged(site: Site) -> None:
    central, client = site
    raw = archived(client, series(1)) + "/scans/4/resources/KSPACE/files"
    for name, fault in (("flipped", {}), ("short", {"keep": 0.5}), ("good", None)):
        if fault is not None:
            central.misbehave("damage-files", times=1, **fault)
        client.put(f"{raw}/{name}", params={"inbody": "true"}, data=b"k-space!")
    rows = {row["Name"]: (row["Size"], row["digest"]) for row in client.table(raw)}
    kept = {"flipped": b"k-space ", "short": b"k-sp", "good": b"k-space!"}
    assert rows == {name: (str(len(data)), hashlib.md5(data).hexdigest()) for name, data in kept.items()}
    assert {name: client.get(f"{raw}/{name}").content for name in kept} == kept


def test_body_limit(site: Site) -> None:
    """A proxy that gives a whole request so long: a small body passes, a large one on the same line does not."""
    central, client = site
    raw = archived(client, series(1)) + "/scans/4/resources/KSPACE/files"
    central.misbehave("slow", path="KSPACE", method="PUT", rate=200_000)
    central.misbehave("body-limit", path="KSPACE", method="PUT", seconds=0.6)
    assert client.put(f"{raw}/small", params={"inbody": "true"}, data=bytes(50_000)).status_code == 200
    with pytest.raises(requests.ConnectionError):
        client.put(f"{raw}/large", params={"inbody": "true"}, data=bytes(400_000))
    assert [row["Name"] for row in client.table(raw)] == ["small"]


def test_commit_faults(site: Site) -> None:
    central, client = site
    uri = client.send_zip(series(), AA="true").text.strip()

    def commit() -> requests.Response:
        return client.post(uri, params={"action": "commit"})

    central.misbehave("commit-409-locked", times=2)
    assert [(commit().status_code, commit().text)] == [(409, "session document locked")]
    central.misbehave("commit-conflict", times=1, message="Already there")
    assert (commit().status_code, client.get(uri + "/logs/last").text) == (409, "Already there")
    assert client.table(uri)[0]["status"] == "CONFLICT"
    assert commit().status_code == 301


@pytest.mark.parametrize(("lose", "left"), [(None, None), (2, 1), (99, 0)])
def test_lying_archive(site: Site, lose: int | None, left: int | None) -> None:
    central, client = site
    central.misbehave("lying-archive", lose=lose)
    uri = archived(client, series(3))
    assert central.prearchive_rows() == []
    assert client.get(uri).status_code == (404 if left is None else 200)
    assert len(central.archive_instances("P1", "E1")) == (left or 0)
    if left is not None:
        assert len(client.table(uri + "/scans/ALL/files")) == left


def test_checksums_off(site: Site) -> None:
    central, client = site
    uri = archived(client, series(1)) + "/scans/4/files"
    assert len(client.table(uri)[0]["digest"]) == 32
    central.misbehave("checksums-off")
    assert client.table(uri)[0]["digest"] == ""
    assert client.get("/xapi/siteConfig/checksums").json() is False


def test_slow(site: Site) -> None:
    central, client = site
    body = zipped(series(3))
    central.misbehave("slow", rate=len(body) * 4, delay=0.2)
    began = time.monotonic()
    assert client.send_zip(series(3)).status_code == 200
    assert time.monotonic() - began > 0.4


def test_black_hole(site: Site) -> None:
    central, client = site
    central.misbehave("black-hole")
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.get("/data/projects", timeout=0.3)
    central.behave()
    assert client.get("/data/projects").status_code == 200


def test_cut_at(site: Site) -> None:
    central, client = site
    central.misbehave("cut-at", bytes=1000, times=1)
    with pytest.raises(requests.exceptions.ConnectionError):
        client.send_zip(series(20))
    assert (central.requests[-1]["status"], central.requests[-1]["bytes"]) == (None, 1000)
    assert central.prearchive_rows() == []
    assert client.send_zip(series(20)).status_code == 200


@pytest.mark.parametrize("how", ["504", "cut"])
def test_proxy_gives_up_but_the_server_works_on(site: Site, how: str) -> None:
    central, client = site
    central.misbehave("proxy-cut", seconds=0.1, work=1.5, how=how, times=1)
    if how == "504":
        assert client.send_zip(series()).status_code == 504
    else:
        with pytest.raises(requests.exceptions.ConnectionError):
            client.send_zip(series())
    assert central.prearchive_rows() == []
    wait_for(lambda: len(central.prearchive_instances("P1")) == 3)


def test_proxy_lets_quick_answers_pass(site: Site) -> None:
    central, client = site
    central.misbehave("proxy-cut", seconds=60)
    assert client.send_zip(series()).status_code == 200


def test_control_over_http_and_request_log(site: Site) -> None:
    central, client = site
    stranger = Client(central.url, auth=None)
    assert stranger.post("/stand-in/misbehave", json={"name": "busy-503", "times": 9}).status_code == 200
    assert client.get("/data/projects").status_code == 503
    assert stranger.post("/stand-in/misbehave", json={"name": "nonsense"}).status_code == 400
    assert stranger.get("/stand-in/misbehave").json()["active"][0]["struck"] == 1
    assert stranger.post("/stand-in/behave").json() == []
    body = zipped(series())
    client.send_zip(series())
    entry = next(e for e in stranger.get("/stand-in/requests").json() if e["path"] == IMPORT)
    assert (entry["method"], entry["status"], entry["query"]["project"]) == ("POST", 200, "P1")
    assert entry["bytes"] == len(body)


def test_as_a_process_that_is_killed(tmp_path: Path) -> None:
    def launch(*more: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.central",
                "--data",
                str(tmp_path / "d"),
                "--project",
                "P1",
                "--user",
                "relay:pw",
                "--port-file",
                str(tmp_path / "port"),
                *more,
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdout is not None
        return process, process.stdout.readline().removeprefix("listening on ").strip()

    process, url = launch("--misbehave", "busy-502,times=1")
    try:
        assert url.endswith(":" + (tmp_path / "port").read_text())
        client = Client(url, ("relay", "pw"))
        assert [client.get("/data/auth").status_code for _ in range(2)] == [502, 200]
        uri = client.send_zip(series(3)).text.strip()
    finally:
        process.kill()
        process.wait()
    process, url = launch()
    try:
        client = Client(url, ("relay", "pw"))
        assert len(client.table(uri + "/scans/4/resources/DICOM/files")) == 3
        client.post(uri, params={"action": "commit", "AA": "true"})
        assert len(client.get("/stand-in/instances/P1/E1").json()) == 3
    finally:
        process.terminate()
        assert process.wait(5) == 0


def test_throughput_does_not_need_new_connections(site: Site) -> None:
    """Keep-alive holds through success, refusal and bodies of every kind."""
    central, _ = site
    connection = http.client.HTTPConnection(central.url.removeprefix("http://"), timeout=5)
    headers = {"Authorization": "Basic cmVsYXk6c2VjcmV0", "Content-Type": "application/zip"}
    target = IMPORT + "?import-handler=DICOM-zip&project=P1&subject=S&session=E"
    sockets = set()
    for body in (zipped(series(2)), b"no zip", iter([zipped(series(2))]), zipped({"a": instance(5)})):
        connection.request("POST", target, body, headers, encode_chunked=not isinstance(body, bytes))
        connection.getresponse().read()
        sockets.add(id(connection.sock))
    assert len(sockets) == 1 and None not in sockets
    assert [entry["status"] for entry in central.requests] == [200, 400, 200, 200]


def test_faults_are_counted_once_under_load(site: Site) -> None:
    central, _ = site
    central.misbehave("busy-503", times=5)
    codes: list[int] = []

    def ask() -> None:
        client = Client(central.url)
        codes.extend(client.get("/data/projects").status_code for _ in range(10))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(503) == 5 and codes.count(200) == 35
