"""The stand-in keeps to what is documented of XNAT: prearchive, archiving, archive and resource files."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from tests.central import Central
from tests.central.testing import DICOM, IMPORT, STUDY, ZIP, Client, archived, instance, series, zipped
from tests.harness import wait_for

pytest_plugins = "tests.central.fixtures"


# --- prearchive (1.3)


def test_row_life(site: tuple[Central, Client]) -> None:
    _, client = site
    uri = client.send_zip(series()).text.strip()
    assert client.table(uri)[0]["status"] == "RECEIVING"
    assert client.get(uri).status_code == 404  # no session document yet
    built = client.post(uri, params={"action": "build"})
    assert (built.status_code, built.text.strip()) == (200, uri)
    assert client.table(uri)[0]["status"] == "READY" and client.get(uri).status_code == 200
    client.send_zip(series(1, series=5))
    assert client.table(uri)[0]["status"] == "RECEIVING"
    done = client.post(uri, params={"action": "commit"})
    assert (done.status_code, done.text.strip()) == (200, uri)  # the project's code is 0: only built
    moved = client.post(uri, params={"action": "move", "newProject": "P2"})
    assert moved.status_code == 301 and moved.text.strip() == uri.replace("P1", "P2")
    assert client.get(uri, params={"format": "json"}).status_code == 404
    assert client.post(moved.text.strip(), params={"action": "nonsense"}).status_code == 400
    with zipfile.ZipFile(
        io.BytesIO(client.get(moved.text.strip(), params={"format": "zip"}).content)
    ) as archive:
        assert len(archive.namelist()) == 4
    assert client.get("/data/prearchive", params={"tag": STUDY}).status_code == 200
    assert Client(client.url, ("looker", "secret")).get("/data/prearchive?tag=1").status_code == 403
    assert client.delete(moved.text.strip()).status_code == 200
    assert client.table("/data/prearchive/projects") == []


def test_commit_archives_with_301(site: tuple[Central, Client]) -> None:
    central, client = site
    files = series()
    uri = archived(client, files)
    assert uri == "/data/archive/projects/P1/subjects/S1/experiments/E1"
    assert {(one.size, one.md5) for one in central.archive_instances("P1", "E1").values()} == {
        (len(data), hashlib.md5(data).hexdigest()) for data in files.values()
    }
    assert central.prearchive_rows() == []


def test_project_code_archives_and_merges(site: tuple[Central, Client]) -> None:
    central, client = site
    client.put("/data/projects/P1/prearchive_code/4")
    for number in (1, 2):
        uri = client.send_zip(series(series=number)).text.strip()
        assert client.post(uri, params={"action": "commit"}).status_code == 301
    assert len(central.archive_instances("P1", "E1")) == 6
    uri = client.send_zip(series(1, series=1)).text.strip()  # the same file again: code 4 does not overwrite
    assert client.post(uri, params={"action": "commit"}).status_code == 409
    client.delete(uri)
    client.put("/data/projects/P1/prearchive_code/5")
    uri = client.send_zip(series(1, series=1)).text.strip()
    assert client.post(uri, params={"action": "commit"}).status_code == 301


def test_busy_row_gets_sibling(site: tuple[Central, Client]) -> None:
    central, client = site
    uri = client.send_zip(series(1)).text.strip()
    client.post(uri, params={"action": "set-status", "status": "ARCHIVING"})
    assert client.send_zip(series(1)).text.strip().endswith("/E1_1")
    locked = client.post(uri, params={"action": "commit"})
    assert (locked.status_code, locked.text) == (409, "session document locked")
    service = client.post("/data/services/archive", params={"src": uri})
    assert (service.status_code, service.text) == (
        403,
        "Operation already in progress on this prearchive entry.",
    )
    client.post(uri, params={"action": "reset-status"})
    assert client.post(uri, params={"action": "commit"}).status_code == 200
    assert sorted(row["name"] for row in central.prearchive_rows()) == ["E1", "E1_1"]


def test_files_arriving_during_a_build_reopen_the_row(site: tuple[Central, Client]) -> None:
    central, client = site
    uri = client.send_zip(series(1), AA="true").text.strip()
    central.misbehave("slow-commit", seconds=4.0)
    codes: list[int] = []
    worker = threading.Thread(
        target=lambda: codes.append(client.post(uri, params={"action": "commit"}).status_code)
    )
    worker.start()
    other = Client(central.url)
    wait_for(lambda: other.table(uri)[0]["status"] == "BUILDING")
    assert other.send_zip(series(1, series=5)).text.strip() == uri
    assert other.table(uri)[0]["status"] == "RECEIVING_INTERRUPT"
    worker.join()
    assert other.table(uri)[0]["status"] == "RECEIVING"
    assert codes == [200]  # built only: what came meanwhile must not be cut off


def test_auto_builder(start: Callable[..., tuple[Central, Client]]) -> None:
    central, client = start(idle=3.0)
    client.send_zip(series(1), session="A")
    client.send_zip(series(1), session="B", prevent_auto_commit="true")
    client.send_zip(series(1), session="C", SOURCE="uploader")
    client.send_zip(series(1), session="D", AA="true")
    assert {row["status"] for row in central.prearchive_rows()} == {"RECEIVING"}
    wait_for(lambda: len(central.prearchive_rows()) < 4)
    time.sleep(0.3)
    assert {row["name"]: row["status"] for row in central.prearchive_rows()} == {
        "A": "READY",
        "B": "RECEIVING",
        "C": "RECEIVING",
    }
    assert len(central.archive_instances("P1", "D")) == 1


def test_batch_services(site: tuple[Central, Client]) -> None:
    central, client = site
    rows = [client.send_zip(series(1), session=name).text.strip().removeprefix("/data") for name in "AB"]
    assert client.post("/data/services/prearchive/rebuild", data={"src": rows}).status_code == 200
    assert {row["status"] for row in central.prearchive_rows()} == {"READY"}
    client.post("/data/services/prearchive/move", data={"src": rows[0], "newProject": "P2"})
    assert {row["project"] for row in central.prearchive_rows()} == {"P1", "P2"}
    client.post("/data/services/prearchive/delete", data={"src": rows[1]})
    assert [row["name"] for row in central.prearchive_rows()] == ["A"]


# --- archiving (1.4)


def archive(client: Client, uri: str, **params: str) -> requests.Response:
    return client.post("/data/services/archive", params={"src": uri} | params)


def test_conflict_and_overwrite(site: tuple[Central, Client]) -> None:
    central, client = site
    archived(client, series(2))
    uri = client.send_zip({"5-1.dcm": instance(1, series=5)}).text.strip()
    refused = archive(client, uri)
    assert (refused.status_code, refused.text) == (
        409,
        "Session already exists, retry with overwrite enabled",
    )
    assert client.table(uri)[0]["status"] == "CONFLICT"
    assert client.get(uri + "/logs/last").text == refused.text
    assert len(client.table(uri + "/logs")) == 1
    assert archive(client, uri, overwrite="none").status_code == 200  # XNAT's surprise: `none` merges
    assert len(central.archive_instances("P1", "E1")) == 3


def test_matching_files(site: tuple[Central, Client]) -> None:
    central, client = site
    archived(client, series(2))
    changed = {"4-1.dcm": instance(1, PatientName="Other")}
    uri = client.send_zip(changed).text.strip()
    codes = {
        row["code"]
        for row in client.post("/data/services/validate-archive", params={"src": uri}).json()["ResultSet"][
            "Result"
        ]
    }
    assert codes == {"1", "14", "16"}
    assert archive(client, uri, overwrite="append").status_code == 409
    assert archive(client, uri, overwrite="append", overwrite_files="true").status_code == 200
    stored = central.archive_instances("P1", "E1")
    assert len(stored) == 2 and stored[f"{STUDY}.4.1"].path.read_bytes() == changed["4-1.dcm"]
    uri = client.send_zip({"only.dcm": instance(9)}).text.strip()
    assert archive(client, uri, overwrite="delete").status_code == 200  # replaces the resource
    assert list(central.archive_instances("P1", "E1")) == [f"{STUDY}.4.9"]


@pytest.mark.parametrize(
    ("files", "params", "code", "text"),
    [
        ({"n": instance(8)}, {"subject": "S2"}, "4", "session subject"),
        ({"n": instance(8, study="1.2.9")}, {}, "5", "session UID"),
        ({"n": instance(8, Modality="CT")}, {}, "19", "session modality"),
        ({"n": instance(1)}, {}, "22", "SOP instance UID"),
    ],
)
def test_conflict_codes(
    site: tuple[Central, Client], files: dict[str, bytes], params: dict[str, str], code: str, text: str
) -> None:
    _, client = site
    archived(client, series(2))
    uri = client.send_zip(files, **params).text.strip()
    notices = client.post("/data/services/validate-archive", params={"src": uri}).json()["ResultSet"][
        "Result"
    ]
    assert {"1", code} <= {notice["code"] for notice in notices}
    refused = archive(client, uri, overwrite="append")
    assert refused.status_code == 409 and text in refused.text
    assert archive(client, uri, overwrite="delete").status_code == 200


def test_archive_elsewhere_and_unassigned(site: tuple[Central, Client]) -> None:
    central, client = site
    uri = client.send_zip(series(1)).text.strip()
    done = archive(client, uri, project="P2", subject="S9", session="E9")
    assert done.text == "/data/archive/projects/P2/subjects/S9/experiments/E9\r\n"
    lost = client.post(IMPORT, params={"import-handler": "DICOM-zip"}, data=zipped(series(1)), headers=ZIP)
    refused = archive(client, lost.text.strip())
    assert (refused.status_code, refused.text) == (400, "Cannot archive sessions from the Unassigned folder.")
    assert archive(client, "/prearchive/projects/P1/1/none").status_code == 404
    assert len(central.archive_instances("P2", "E9")) == 1


# --- the archive (1.5)


def test_archive_listings(site: tuple[Central, Client]) -> None:
    _, client = site
    files = series(2)
    uri = archived(client, files)
    fields = client.get(uri, params={"format": "json"}).json()["items"][0]["data_fields"]
    assert (fields["label"], fields["UID"], fields["project"]) == ("E1", STUDY, "P1")
    by_id = f"/data/experiments/{fields['ID']}"
    assert client.get(by_id).json()["items"][0]["data_fields"] == fields
    assert [scan["ID"] for scan in client.table(by_id + "/scans")] == ["4"]
    listing = client.table(by_id + "/scans/4/resources/DICOM/files")
    assert set(listing[0]) == {
        "Name",
        "Size",
        "URI",
        "collection",
        "file_tags",
        "file_format",
        "file_content",
        "cat_ID",
        "digest",
    }
    for row in listing:
        data = client.get(row["URI"]).content
        assert data == files[row["Name"]] and row["digest"] == hashlib.md5(data).hexdigest()
    assert client.table(f"{uri}/scans/ALL/files") == listing
    assert client.table("/data/projects/P1/experiments", UID=STUDY)[0]["label"] == "E1"
    assert client.get("/data/projects/P2/experiments/E1").status_code == 404
    client.delete(uri)
    assert client.get(uri).status_code == 404


def test_no_digest_without_checksums(start: Callable[..., tuple[Central, Client]]) -> None:
    _, client = start(checksums=False)
    uri = archived(client, series(1))
    assert [row["digest"] for row in client.table(uri + "/scans/4/resources/DICOM/files")] == [""]


def test_resource_files(site: tuple[Central, Client]) -> None:
    central, client = site
    session = archived(client, series(1))
    raw = f"{session}/resources/RAW"
    assert client.put(raw, params={"format": "TWIX"}).status_code == 200
    assert client.put(raw).status_code == 409
    octets = {"Content-Type": "application/octet-stream"}

    def put(name: str, data: Any, **params: str) -> requests.Response:
        return client.put(
            f"{raw}/files/{name}", params={"inbody": "true"} | params, data=data, headers=octets
        )

    stored = put("meas/a.dat", b"raw data")
    assert (stored.status_code, stored.text) == (200, "")
    again = put("meas/a.dat", b"other")
    assert (again.status_code, again.json()) == (200, {"duplicates": ["meas/a.dat"]})
    (row,) = client.table(f"{raw}/files")
    assert (row["Size"], row["digest"]) == ("8", hashlib.md5(b"raw data").hexdigest())
    assert put("meas/a.dat", b"other", overwrite="true").text == ""
    assert client.get(f"{raw}/files/meas/a.dat").content == b"other"
    assert put("empty", b"").status_code == 400
    assert put("chunked", iter([b"x"])).status_code == 400
    looker = Client(central.url, ("looker", "secret"))
    ignored = looker.put(f"{raw}/files/b.dat", params={"inbody": "true"}, data=b"x", headers=octets)
    assert (ignored.status_code, ignored.text) == (200, "") and len(client.table(f"{raw}/files")) == 1
    client.put(f"{raw}/files/x.zip", params={"extract": "true"}, data=zipped({"d/c": b"1"}), headers=ZIP)
    assert {row["URI"].split("/files/")[1] for row in client.table(f"{raw}/files")} == {"meas/a.dat", "d/c"}
    assert client.delete(f"{raw}/files/d/c").status_code == 200
    assert client.delete(raw).status_code == 200
    assert [row["label"] for row in client.table(f"{session}/scans/4/resources")] == ["DICOM"]
    assert client.get(f"{raw}/files/meas/a.dat").status_code == 404


def test_session_made_by_rest(site: tuple[Central, Client]) -> None:
    _, client = site
    session = "/data/projects/P1/subjects/S3/experiments/E3"
    assert client.put(session, params={"xsiType": "xnat:mrSessionData"}).status_code == 201
    client.put(session + "/scans/7", params={"xsiType": "xnat:mrScanData", "type": "t2"})
    target = session + "/scans/7/resources/DICOM/files"
    client.put(target + "/a.dcm", params={"inbody": "true"}, data=instance(), headers=DICOM)
    assert len(client.table(target)) == 1
    assert (
        client.put(
            "/data/projects/P1/resources/NOTES/files/n.txt",
            params={"inbody": "true"},
            data=b"n",
            headers={"Content-Type": "text/plain"},
        ).status_code
        == 200
    )
    assert [row["label"] for row in client.table("/data/projects/P1/resources")] == ["NOTES"]


def test_refresh_catalog(site: tuple[Central, Client]) -> None:
    central, client = site
    uri = archived(client, series(2))
    first, second = (one.path for one in central.archive_instances("P1", "E1").values())
    first.write_bytes(b"rotten")
    second.unlink()
    source = {"resource": uri.removeprefix("/data"), "options": "checksum,delete"}
    client.post("/data/services/refresh/catalog", params=source)
    (row,) = client.table(uri + "/scans/4/files")
    assert (row["Size"], row["digest"]) == ("6", hashlib.md5(b"rotten").hexdigest())


def test_state_survives_restart(start: Callable[..., tuple[Central, Client]]) -> None:
    central, client = start()
    token = client.get("/data/services/tokens/issue").json()
    uri = archived(client, series(2))
    waiting = client.send_zip(series(1), session="E2").text.strip()
    central.stop()
    central, _ = start()
    client = Client(central.url, (token["alias"], token["secret"]))
    assert len(client.table(uri + "/scans/4/files")) == 2
    assert client.table(waiting)[0]["status"] == "RECEIVING"
    assert client.send_zip(series(1), session="E2").text.strip() == waiting


def test_paths_cannot_leave_the_folder(site: tuple[Central, Client]) -> None:
    central, client = site
    client.send_zip({"../../../../escape.dcm": instance()}, session="../../up", PREARC_TIMESTAMP="../..")
    up = "..%2F" * 6  # from the resource folder to the one above the data
    stored = client.put(
        f"/data/projects/P1/resources/R/files/{up}y",
        params={"inbody": "true"},
        data=b"n",
        headers={"Content-Type": "text/plain"},
    )
    assert stored.status_code == 200
    outside = [
        path
        for path in central.store.root.parent.rglob("*")
        if path.is_file() and central.store.root not in path.parents
    ]
    assert outside == [] and len(central.prearchive_instances("P1")) == 1


def test_tls(start: Callable[..., tuple[Central, Client]], tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    central, client = start(tls=(tmp_path / "server.pem", tmp_path / "server.pem"))
    client.verify = str(tmp_path / "ca.pem")
    assert central.url.startswith("https://127.0.0.1:")
    assert client.send_zip(series(3)).status_code == 200
    with pytest.raises(requests.exceptions.SSLError):
        Client(central.url).get("/data/auth")
