"""The stand-in keeps to what is documented of XNAT: login, site settings and the import service."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pydicom
import pytest
import requests
from pydicom.uid import MRImageStorage

from tests.central import Central
from tests.central.dicom import base36, java_hash, read_header, template_name
from tests.central.prearchive import Key
from tests.central.testing import DICOM, HERE, IMPORT, STUDY, ZIP, Client, instance, series, zipped

pytest_plugins = "tests.central.fixtures"


# --- the real client


# --- who is asking (1.7)


def test_login_and_sessions(site: tuple[Central, Client]) -> None:
    central, client = site
    stranger = Client(central.url, auth=None)
    refused = stranger.get("/data/projects")
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == 'Basic realm="XNAT Protected Area"'
    assert stranger.get("/xapi/siteConfig/buildInfo").json()["version"] == "1.8.11"
    assert client.get("/data/version").status_code == 404
    assert (
        stranger.put("/data/services/auth", data={"username": "relay", "password": "no"}).status_code == 401
    )
    ident = stranger.post("/data/services/auth", data={"username": "relay", "password": "secret"}).text
    assert stranger.cookies["JSESSIONID"] == ident
    assert stranger.get("/REST/auth").text == "User 'relay' is logged in"
    assert "; XNAT_CSRF=" in stranger.get("/data/JSESSION", params={"CSRF": "true"}).text
    stranger.delete("/data/JSESSION")
    assert stranger.get("/data/auth").status_code == 401


def test_tokens_expire_and_renew(start: Callable[..., tuple[Central, Client]]) -> None:
    central, client = start(token_lifetime=1.5)
    token = client.get("/data/services/tokens/issue").json()
    assert len(token["secret"]) == 64 and token["estimatedExpirationTime"] / 1000 < time.time() + 1.6
    bearer = Client(central.url, (token["alias"], token["secret"]))
    pair = f"{token['alias']}/{token['secret']}"
    assert client.get(f"/data/services/tokens/validate/{pair}").json() == {"valid": "relay"}
    renewed = bearer.get("/data/services/tokens/issue").json()  # the old token begets the new one
    assert renewed["alias"] != token["alias"]
    assert {one["alias"] for one in client.get("/data/services/tokens/show").json()} == {
        token["alias"],
        renewed["alias"],
    }
    client.get(f"/data/services/tokens/invalidate/{renewed['alias']}")
    assert Client(central.url, (renewed["alias"], renewed["secret"])).get("/data/auth").status_code == 401
    time.sleep(1.5)
    assert bearer.get("/data/auth").status_code == 401
    assert client.get(f"/data/services/tokens/validate/{pair}").json() == {}


def test_projects_and_settings(site: tuple[Central, Client]) -> None:
    central, client = site
    edit = {"permissions": "edit", "dataType": "xnat:subjectData"}
    assert [row["ID"] for row in client.table("/data/projects", **edit)] == ["P1", "P2"]
    looker = Client(central.url, ("looker", "secret"))
    assert looker.table("/data/projects", **edit) == [] and len(looker.table("/data/projects")) == 2
    assert (
        client.get("/data/projects/P1", params={"format": "json"}).json()["items"][0]["data_fields"]["ID"]
        == "P1"
    )
    assert client.get("/data/projects/P9").status_code == 404
    assert client.get("/data/projects/P1/prearchive_code").text == "0"
    client.put("/data/projects/P1/prearchive_code/4")
    assert client.get("/data/projects/P1/prearchive_code").text == "4"
    assert looker.put("/data/projects/P1/prearchive_code/0").status_code == 403
    assert "(0010,0010)" in client.get("/xapi/anonymize/site").text
    assert client.get("/xapi/anonymize/site/enabled").json() is False
    client.put("/xapi/anonymize/site/enabled", data="true", headers={"Content-Type": "application/json"})
    assert client.get("/xapi/anonymize/site/enabled").json() is True
    assert client.get("/xapi/anonymize/projects/P1").status_code == 204
    client.put("/data/config/seriesImportFilter/config", data="x", headers={"Content-Type": "text/plain"})
    assert client.get("/data/config/seriesImportFilter/config", params={"contents": "true"}).text == "x"


# --- import (1.1, 1.2)


def test_import_answers_uri_list(site: tuple[Central, Client]) -> None:
    central, client = site
    answer = client.send_zip(series() | {"other.dcm": instance(study=STUDY + ".9")})
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/uri-list")
    lines = answer.text.split("\r\n")
    assert lines.pop() == "" and len(lines) == 2  # two studies: two sessions of the same label
    for line in lines:
        parts = line.split("/")
        assert parts[:5] == ["", "data", "prearchive", "projects", "P1"] and parts[6] == "E1"
        assert len(parts[5]) == 18 and parts[5][8] == "_"
    assert {row["tag"] for row in central.prearchive_rows()} == {STUDY, STUDY + ".9"}
    assert len(central.prearchive_instances("P1")) == 4


def test_import_is_idempotent_and_keeps_names(site: tuple[Central, Client]) -> None:
    central, client = site
    files = series(2)
    first, second = client.send_zip(files), client.send_zip(files)
    assert first.text == second.text
    listing = client.table(first.text.strip() + "/scans/4/resources/DICOM/files")
    assert {(row["Name"], row["Size"]) for row in listing} == {(n, str(len(d))) for n, d in files.items()}
    assert {row["digest"] for row in listing} == {hashlib.md5(data).hexdigest() for data in files.values()}
    # the same name with another instance gives the template's name
    client.send_zip({"4-1.dcm": instance(7)})
    names = {row["Name"] for row in client.table(first.text.strip() + "/scans/4/resources/DICOM/files")}
    assert names == {"4-1.dcm", "4-2.dcm", template_name(read_header(instance(7)))}
    assert len(central.prearchive_instances("P1")) == 3


def test_template_name_is_that_of_java(site: tuple[Central, Client]) -> None:
    assert java_hash("hello") == 99162322 and java_hash("Aa") == java_hash("BB") == 2112
    assert base36(35 * 36 + 1) == "z1"
    answer = site[1].send_zip({"x.dcm": instance()}, rename="true")
    name = site[1].table(answer.text.strip() + "/scans/4/resources/DICOM/files")[0]["Name"]
    digest = (31 * (31 + java_hash(MRImageStorage)) + java_hash(f"{STUDY}.4.1")) % 2**32
    assert name == f"{STUDY}-4-1-{base36(digest)}.dcm"


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ({"PatientComments": "Project:P2 Subject:S5; Session:E5"}, ("P2", "S5", "E5")),
        (
            {"PatientComments": "no", "AdditionalPatientHistory": "project: P2"},
            ("P2", "Doe_Jane", "hospital-7"),
        ),
        ({"StudyDescription": "P2", "PatientID": "a b/c"}, ("P2", "Doe_Jane", "a_b_c")),
        ({"AccessionNumber": "P2"}, ("P2", "Doe_Jane", "hospital-7")),
        ({"StudyDescription": "elsewhere"}, ("Unassigned", "Doe_Jane", "hospital-7")),
        ({"PatientID": ""}, ("Unassigned", "Doe_Jane", "dicom_upload")),
    ],
)
def test_header_routing(site: tuple[Central, Client], header: dict[str, Any], place: tuple[str, ...]) -> None:
    central, client = site
    client.post(
        IMPORT, params={"import-handler": "DICOM-zip"}, data=zipped({"a": instance(**header)}), headers=ZIP
    )
    row = central.prearchive_rows()[0]
    assert (row["project"], row["subject"], row["name"]) == place


def test_unparsable_entries(site: tuple[Central, Client]) -> None:
    central, client = site
    mixed = {"a.dcm": instance(1), "notes.txt": b"hello", "b.dcm": instance(2)}
    refused = client.send_zip(mixed)
    assert (refused.status_code, refused.text) == (400, "unable to read DICOM object notes.txt")
    assert len(central.prearchive_instances("P1")) == 1  # what came before it stays
    assert client.send_zip(mixed, **{"Ignore-Unparsable": "true"}).status_code == 200
    assert len(central.prearchive_instances("P1")) == 2


def test_body_rules(site: tuple[Central, Client]) -> None:
    _, client = site
    body = zipped(series(1))

    def send(data: Any, kind: str, handler: str = "DICOM-zip", **params: str) -> requests.Response:
        return client.post(
            IMPORT,
            params=HERE | {"import-handler": handler} | params,
            data=data,
            headers={"Content-Type": kind},
        )

    def chunks(data: bytes) -> Iterator[bytes]:
        yield data[:100]
        yield data[100:]

    assert send(chunks(body), "application/zip").status_code == 200
    assert send(chunks(instance()), "application/dicom", "gradual-DICOM").status_code == 400
    assert send(instance(), "application/dicom", "gradual-DICOM").status_code == 200
    assert send(instance(), "application/octet-stream", "gradual-DICOM").status_code == 200
    assert send(body, "application/octet-stream").status_code == 400
    assert send(b"", "application/zip").status_code == 400
    assert send(body[:-30], "application/zip").status_code == 400
    assert send(body, "text/plain").text == "Unable to identify upload format."
    assert send(body, "text/plain", inbody="true").status_code == 400  # nothing tells that it is a zip
    assert send(body, "application/zip", "nonsense").status_code == 404
    assert send(instance(), "application/x-mirc", "gradual-DICOM").text == "OK"
    assert send(body, "application/zip", **{"http-session-listener": "x"}).status_code == 400
    form = {"image_archive": ("a.zip", body, "application/zip")}
    assert client.post(IMPORT, params=HERE, files=form).status_code == 200
    assert client.post(IMPORT, params=HERE | {"inbody": "true"}, files=form).status_code == 406
    two = [("a", ("a.zip", body)), ("b", ("b.zip", body))]
    assert "limited to one" in client.post(IMPORT, params=HERE, files=two).text
    assert client.get(IMPORT).status_code == 405


def test_form_fields_count_as_parameters(site: tuple[Central, Client]) -> None:
    central, client = site
    form = {"image_archive": ("a.zip", zipped(series(1)), "application/zip")}
    client.post(IMPORT, params={"import-handler": "DICOM-zip"}, data={"PROJECT_ID": "P2"}, files=form)
    assert central.prearchive_rows()[0]["project"] == "P2"


def test_content_type_chooses_handler_and_read_only_may_not(site: tuple[Central, Client]) -> None:
    central, client = site
    place = {"PROJECT_ID": "P1", "SUBJECT_ID": "S", "EXPT_LABEL": "E"}
    assert client.post(IMPORT, params=place, data=instance(), headers=DICOM).status_code == 200
    assert client.post(IMPORT, params=place, data=zipped(series(1)), headers=ZIP).status_code == 200
    assert Client(central.url, ("looker", "secret")).send_zip(series(1)).status_code == 403


def test_si_takes_one_session_only(site: tuple[Central, Client]) -> None:
    central, client = site
    two = client.send_zip(series(1) | {"o": instance(study=STUDY + ".9")}, **{"import-handler": "SI"})
    assert (two.status_code, two.text) == (400, "Upload included files for multiple imaging sessions.")
    assert central.prearchive_rows() == []


def test_destination_implies_commit(site: tuple[Central, Client]) -> None:
    central, client = site
    kept = client.send_zip(series(), dest="/prearchive/projects/P1")
    assert kept.text.startswith("/data/prearchive/") and central.prearchive_rows()[0]["status"] == "READY"
    place = {"dest": "/archive/projects/P1/subjects/S7/experiments/E7"}
    done = client.post(
        IMPORT,
        params={"import-handler": "DICOM-zip"} | place,
        data=zipped(series(study="1.2.3")),
        headers=ZIP,
    )
    assert done.text == "/data/archive/projects/P1/subjects/S7/experiments/E7\r\n"
    again = client.post(
        IMPORT,
        params={"import-handler": "DICOM-zip"} | place,
        data=zipped({"n": instance(study="1.2.4")}),
        headers=ZIP,
    )
    assert again.status_code == 400 and "unable to archive for the Prearchive session" in again.text


def test_row_remembers_parameters(site: tuple[Central, Client]) -> None:
    _, client = site
    client.send_zip(
        series(1),
        SOURCE="uploader",
        VISIT="v1",
        prevent_anon="true",
        prevent_auto_commit="true",
        AA="false",
        PREARC_TIMESTAMP="20200101_000000000",
    )
    row = client.table("/data/prearchive/projects/P1")[0]
    assert (
        row["SOURCE"],
        row["VISIT"],
        row["prevent_anon"],
        row["prevent_auto_commit"],
        row["autoarchive"],
    ) == ("uploader", "v1", "true", "true", "Manual")
    assert row["url"] == "/prearchive/projects/P1/20200101_000000000/E1"


def test_site_script(start: Callable[..., tuple[Central, Client]]) -> None:
    central, client = start(site_anon=True)
    client.send_zip({"a": instance()})
    (stored,) = central.prearchive_instances("P1").values()
    header = read_header(stored.path.read_bytes())
    assert (header.study_description, header.patient_name, header.patient_id) == ("P1", "S1", "E1")
    assert pydicom.dcmread(stored.path).PixelData == pydicom.dcmread(io.BytesIO(instance())).PixelData
    client.send_zip({"a": instance()}, session="E2", prevent_anon="true")
    path = next(p for p in (central.store.root / "prearchive").glob("**/E2/**/a"))
    assert path.read_bytes() == instance()


def test_two_step_import(site: tuple[Central, Client]) -> None:
    central, client = site
    cache = "/data/user/cache/resources/R/files/f.zip"
    assert client.put(cache, params={"inbody": "true"}, data=zipped(series()), headers=ZIP).status_code == 200
    params = HERE | {"src": cache.removeprefix("/data"), "http-session-listener": "L1"}
    assert client.post(IMPORT, params=params).status_code == 200
    for _ in range(100):
        event = client.get("/xapi/event_tracking/L1").json()
        if event["succeeded"] is not None:
            break
        time.sleep(0.02)
    assert event["succeeded"] is True
    assert event["finalMessage"] == "Prearchive:" + central.prearchive_rows()[0]["url"]
    assert (
        client.post(IMPORT, params=params | {"src": "/user/cache/resources/R/files/none"}).status_code == 404
    )
    assert client.get("/xapi/event_tracking/other").status_code == 404


def test_parallel_imports_share_one_session(site: tuple[Central, Client]) -> None:
    central, _ = site
    answers: list[requests.Response] = []

    def send(number: int) -> None:
        answers.append(Client(central.url).send_zip(series(10, series=number)))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200} and len(
        {answer.text for answer in answers}
    ) == 1
    assert len(central.prearchive_instances("P1")) == 80


def test_two_series_with_one_number(site: tuple[Central, Client]) -> None:
    _, client = site
    uri = client.send_zip({"a": instance(1), "b": instance(2, SeriesInstanceUID="1.2.3.99")}).text.strip()
    assert [scan["ID"] for scan in client.table(uri + "/scans")] == ["4", "4-MR1"]


def test_a_build_that_a_kill_cut_off(start: Callable[..., tuple[Central, Client]]) -> None:
    """It begins again when the server does; nobody is there who would reset the session's status."""
    central, client = start()
    assert client.post(IMPORT, params=HERE, data=zipped(series()), headers=ZIP).status_code == 200
    [row] = central.prearchive_rows()
    central.prearchive.lock(Key.from_url(row["url"]), "BUILDING")
    central.stop()
    again, _ = start()
    assert [row["status"] for row in again.prearchive_rows()] == ["RECEIVING"]
