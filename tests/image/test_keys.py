"""The keys of a fleet, as image/keys makes them, and the words of a build, as image/build looks at them."""

from __future__ import annotations

import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from image import inputs
from image.common import PROJECT, Failed, run

TOOLS = ("openssl", "cert-to-efi-sig-list", "age-keygen", "ssh-keygen")
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


def asked(**words):
    return Namespace(**{"version": "2026.11", "site": None, "inventory": PROJECT / "inventory", "keys": None,
                        "key": None, "first_contact_key": None, "debs": None} | words)


@pytest.mark.parametrize(("words", "told"), [
    ({"version": "a/b"}, "--version 'a/b'.*letters"), ({"version": ""}, "--version ''"),
    ({"keys": Path("/nowhere")}, "/nowhere has no PK.auth, .*image/keys"),
    ({"key": Path("/nowhere")}, "/nowhere is no SSH key"),
    ({"first_contact_key": Path("/nowhere")}, "/nowhere.pub is no SSH key"),
    ({"first_contact_key": PROJECT / "README.md"}, "README.md.pub is no SSH key"),
    ({"debs": Path("/nowhere")}, "no folder /nowhere"),
    ({"site": "site_example", "inventory": Path("/nowhere")}, "no folder /nowhere")])
def test_wrong_words_are_told_before_anything_is_built(words, told):
    inputs.examine(asked())
    with pytest.raises(Failed, match=told):
        inputs.examine(asked(**words))


def test_ssh_keys_by_either_part(tmp_path):
    key = tmp_path / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    inputs.examine(asked(key=key, first_contact_key=key))
    inputs.examine(asked(key=inputs.public(key), first_contact_key=inputs.public(key)))
    assert inputs.public(key) == inputs.public(inputs.public(key)) == tmp_path / "key.pub"
    inputs.public(key).write_text("ssh-ed25519 cut off\n")
    with pytest.raises(Failed, match=r"key\.pub is no SSH key"):
        inputs.examine(asked(first_contact_key=key))


def test_recipients_of_recovery_keys(tmp_path):
    run("age-keygen", "-o", tmp_path / "key")
    good = run("age-keygen", "-y", tmp_path / "key").strip()
    inputs.recipients([good, good])
    for wrong in ("garbage", "age1garbage", good[:-1], ""):
        with pytest.raises(Failed, match="is no age public key"):
            inputs.recipients([good, wrong])


def test_the_command_looks_at_its_words_first():
    """Or says that it needs root."""
    done = subprocess.run([PROJECT / "image/build", "--keys", "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ("need root" if os.geteuid() else "--keys /nowhere has no PK.auth") in done.stderr
