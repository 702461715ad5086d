"""The keys of a fleet, as image/keys makes them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from image.common import PROJECT

TOOLS = ("openssl", "cert-to-efi-sig-list", "age-keygen")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="image/install installs what makes keys")


def keys(folder, *words):
    return subprocess.run([PROJECT / "image/keys", *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def maker(tmp_path):
    """The certificate of a maker of cards, as PEM and as DER."""
    pem, der = tmp_path / "maker.pem", tmp_path / "maker.crt"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=maker", "-keyout",
                    tmp_path / "maker.key", "-out", pem], check=True, capture_output=True)
    subprocess.run(["openssl", "x509", "-in", pem, "-outform", "DER", "-out", der], check=True)
    return pem, der


@pytest.mark.parametrize("form", [0, 1], ids=["PEM", "DER"])
def test_a_makers_certificate_joins_db(tmp_path, maker, form):
    done = keys(tmp_path, "fleet", maker[form].name)
    assert done.returncode == 0 and not done.stderr, done.stderr
    fleet = tmp_path / "fleet"
    assert fleet.stat().st_mode & 0o777 == 0o700
    der = maker[1].read_bytes()
    assert [name for name in ("PK", "KEK", "db") if der in (fleet / f"{name}.auth").read_bytes()] == ["db"]
    assert (fleet / "recovery.pub").read_text().startswith("age1")


def test_what_is_no_certificate_is_refused_before_keys_are_made(tmp_path, maker):
    (tmp_path / "notes.txt").write_text("not a certificate\n")
    done = keys(tmp_path, "fleet", maker[0].name, "notes.txt")
    assert done.returncode == 1 and "notes.txt is no certificate" in done.stderr
    assert not (tmp_path / "fleet").exists()


def test_keys_are_not_made_anew(tmp_path):
    assert keys(tmp_path, "fleet").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "fleet").iterdir()}
    done = keys(tmp_path, "fleet")
    assert done.returncode == 1 and "has keys already" in done.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "fleet").iterdir()} == before
    assert keys(tmp_path).returncode == 2
