"""The real xnatpy client works against the stand-in."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xnat

from tests.central import Central
from tests.central.testing import Client, archived, series, zipped

pytest_plugins = "tests.central.fixtures"


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    open_connections = []

    def begin(central: Central, user: str = "relay", password: str = "secret", **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            connection = xnat.connect(central.url, user=user, password=password, loglevel="ERROR", **options)
        open_connections.append(connection)
        return connection

    yield begin
    for connection in open_connections:
        connection.disconnect()


def test_xnatpy_without_model(site: tuple[Central, Client], connect: Callable[..., Any]) -> None:
    central, _ = site
    connection = connect(central, no_parse_model=True)
    assert connection.logged_in_user == "relay"
    asked = [(entry["method"], entry["path"]) for entry in central.requests]
    assert asked == [
        ("GET", "/"),
        ("PUT", "/data/services/auth"),
        ("GET", "/data/auth"),
        ("GET", "/data/JSESSION"),
    ]
    assert connection.xnat_version == "1.8.11"


def test_xnatpy_imports_archives_and_gets_the_same_bytes(
    site: tuple[Central, Client], connect: Callable[..., Any], tmp_path: Path
) -> None:
    central, _ = site
    files = series(4)
    connection = connect(central)
    uploaded = connection.services.import_(
        data=io.BytesIO(zipped(files)),
        project="P1",
        subject="S1",
        experiment="E1",
        content_type="application/zip",
        import_handler="DICOM-zip",
    )
    assert uploaded.uri.startswith("/data/prearchive/projects/P1/")
    assert connection.prearchive.sessions() == []  # xnatpy hides RECEIVING
    uploaded = connection.prearchive.find(project="P1", session="E1", status="RECEIVING")[0]
    assert {file.name: file.size for file in uploaded.scans["4"].files.values()} == {
        name: len(data) for name, data in files.items()
    }
    session = uploaded.archive()
    assert (session.label, session.scans["4"].series_description) == ("E1", "t1_mprage")
    for download in (session.download, session.scans["4"].download):
        download(tmp_path / "got.zip", verbose=False)
        with zipfile.ZipFile(tmp_path / "got.zip") as archive:
            got = {Path(name).name: archive.read(name) for name in archive.namelist()}
        assert got == files
    assert list(connection.projects["P1"].subjects) and connection.prearchive.sessions() == []


def test_xnatpy_import_into_the_archive(site: tuple[Central, Client], connect: Callable[..., Any]) -> None:
    central, _ = site
    session = connect(central).services.import_(
        data=zipped(series()),
        destination="/archive",
        project="P1",
        subject="S1",
        experiment="E1",
        content_type="application/zip",
    )
    assert session.label == "E1"
    assert len(central.archive_instances("P1", "E1")) == 3


def test_xnatpy_resources(site: tuple[Central, Client], connect: Callable[..., Any], tmp_path: Path) -> None:
    """Resources of scans and sessions: made, filled in both ways, listed, fetched byte for byte, deleted."""
    central, client = site
    archived(client, series(2))
    session = connect(central).projects["P1"].experiments["E1"]
    content = bytes(range(256)) * 40
    (tmp_path / "meas.dat").write_bytes(content)
    for parent, label in ((session.scans["4"], "KSPACE"), (session, "KSPACE_UNMATCHED")):
        resource = parent.create_resource(label, format="SIEMENS_TWIX")
        uri = f"{parent.fulluri}/resources/{label}"
        assert (resource.label, resource.data["format"]) == (label, "SIEMENS_TWIX")
        resource.upload(str(tmp_path / "meas.dat"), "meas.dat")
        resource.upload_data(b'{"verdict": "complete"}', "meas.dat.json")
        resource.upload(str(tmp_path / "meas.dat"), "meas.dat.parts/0-10240")
        found = {path: (int(file.size), file.digest) for path, file in resource.files.items()}
        digest = hashlib.md5(content).hexdigest()
        assert found["meas.dat"] == found["meas.dat.parts/0-10240"] == (len(content), digest)
        assert set(found) == {"meas.dat", "meas.dat.json", "meas.dat.parts/0-10240"}
        resource.files["meas.dat"].download(str(tmp_path / "got.dat"), verbose=False)
        assert (tmp_path / "got.dat").read_bytes() == content
        resource.files["meas.dat.json"].delete()
        left = {row["URI"].partition("/files/")[2] for row in client.table(f"{uri}/files")}
        assert left == {"meas.dat", "meas.dat.parts/0-10240"}
        with pytest.raises(xnat.exceptions.XNATResponseError):  # 409
            session.xnat_session.put(uri)
        resource.delete()
    assert len(central.archive_instances("P1", "E1")) == 2


def test_xnatpy_with_alias_token(site: tuple[Central, Client], connect: Callable[..., Any]) -> None:
    central, client = site
    token = client.get("/data/services/tokens/issue").json()
    connection = connect(central, token["alias"], token["secret"], no_parse_model=True)
    assert connection.logged_in_user == "relay"


def test_xnatpy_refuses_wrong_password(site: tuple[Central, Client], connect: Callable[..., Any]) -> None:
    with pytest.raises(xnat.exceptions.XNATLoginFailedError):
        connect(site[0], password="wrong", no_parse_model=True)
