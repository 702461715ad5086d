"""What is on a stick and beside it, without starting it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile

import pytest
from relay_disk import conf

from image.common import digest
from tests.image.conftest import PROJECT, build
from tests.image.vm import run


@pytest.fixture(scope="module")
def esp(fast, tmp_path_factory):
    """The files of the stick's ESP."""
    table = json.loads(run("sfdisk", "--json", fast))["partitiontable"]["partitions"]
    assert [part["name"] for part in table] == ["relay-stick", "relay-image"]
    folder = tmp_path_factory.mktemp("esp")
    run("mcopy", "-s", "-i", f"{fast}@@{table[0]['start'] * 512}", "::/", folder)
    return next(folder.rglob("loader")).parent


@pytest.fixture(scope="module")
def listing(fast):
    table = json.loads(run("sfdisk", "--json", fast))["partitiontable"]["partitions"]
    return run("unsquashfs", "-o", str(table[1]["start"] * 512), "-ll", fast).replace("squashfs-root/", "/")


def test_all_that_starts_is_signed(esp, keys):
    programs = ["EFI/BOOT/BOOTX64.EFI", "EFI/relay/install.efi", "EFI/relay/rescue.efi", "relay/box.efi"]
    assert sorted(str(p.relative_to(esp)) for p in esp.rglob("*.[eE][fF][iI]")) == sorted(
        [*programs, "relay/systemd-boot.efi"])
    for program in programs:
        run("sbverify", "--cert", keys / "keys/db.crt", esp / program)


def test_rescue_is_not_among_those_that_get_the_key(esp):
    """Whose measurements are signed: in the table of sections of the UKI."""
    ukis = [*(esp / "EFI/relay").glob("*.efi"), esp / "relay/box.efi"]
    assert sorted(uki.stem for uki in ukis) == ["box", "install", "rescue"]
    assert sorted(uki.stem for uki in ukis if b".pcrsig\0" in uki.read_bytes()[:4096]) == ["box", "install"]


def test_manifest_tells_what_is_there(fast, esp):
    inside = json.loads((esp / "relay/manifest.json").read_text())
    beside = json.loads(fast.with_name("relay-any-test.manifest.json").read_text())
    assert beside == inside | {"image": digest(fast), "size": fast.stat().st_size}
    assert inside["uki"]["box"] == digest(esp / "relay/box.efi")


def test_orders_of_the_installer(esp, keys):
    """What an untouched stick says is enough to install, and allows nothing to be destroyed."""
    told = conf.read((esp / "relay/install.conf").read_text())
    assert told == conf.Conf(recovery=((keys / "keys/recovery.pub").read_text().strip(),))


def test_sums_are_signed(fast, keys, tmp_path):
    folder = fast.parent
    run("sh", "-c", f"cd {folder} && sha256sum --check --quiet relay-any-test.SHA256SUMS")
    who = tmp_path / "allowed"
    who.write_text(f"builder {(keys / 'signer.pub').read_text()}")
    verify = f"ssh-keygen -Y verify -f {who} -I builder -n relay-image -s {folder}/relay-any-test.SHA256SUMS.sig"
    run("sh", "-c", f"{verify} < {folder}/relay-any-test.SHA256SUMS")
    other = subprocess.run(f"echo other | {verify}", shell=True, capture_output=True, check=False)
    assert other.returncode, "a signature of something else was taken"


def test_bill_of_materials(fast, listing):
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    file = fast.with_name("relay-any-test.spdx.json")
    assert validate_full_spdx_document(parse_file(str(file))) == []
    names = {package["name"] for package in json.loads(file.read_text())["packages"]}
    assert {"zfsutils-linux", "systemd", "pydicom", "relay-agent"} <= names
    assert any(name.startswith("zfs-modules-") for name in names)


def test_no_identity_and_no_compiler(listing):
    """What every box must have of its own, and what none needs."""
    assert "/etc/ssh/sshd_config" in listing
    assert "ssh_host_" not in listing
    size = re.search(r"\S+ \S+ +(\d+) \S+ \S+ /etc/machine-id$", listing, re.MULTILINE)
    assert size
    assert size[1] == "0"
    assert not re.search(r"/usr/bin/(x86_64-linux-gnu-)?(gcc|cc|make|dkms)\b", listing)


@pytest.mark.full
def test_size(tmp_path):
    """As it is shipped: below 700 MB."""
    image = build(tmp_path, "--version", "size") / "relay-any-size.img"
    assert image.stat().st_size < 700e6


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_site(tmp_path):
    """Settings for each of its boxes, complete but for the credentials."""
    build(tmp_path, "--fast", "--site", "site_example", "--version", "x")
    assert json.loads((tmp_path / "relay-site_example-x.manifest.json").read_text())["first_contact"] is None
    image = tmp_path / "relay-site_example-x.img"
    start = json.loads(run("sfdisk", "--json", image))["partitiontable"]["partitions"][0]["start"] * 512
    for box, profile in (("relay-0001", "nuc"), ("relay-0002", "supermicro")):
        run("mcopy", "-i", f"{image}@@{start}", f"::/relay/site/{box}.tar", f"::/relay/site/{box}.json", tmp_path)
        told = json.loads((tmp_path / f"{box}.json").read_text())
        assert (told["box"], told["profile"]) == (box, profile)
        assert "etc/ssh/authorized_keys.d/first-contact" in told["gone"], "only the site's administrators get in"
        with tarfile.open(tmp_path / f"{box}.tar") as tar:
            files = {member.name: member for member in tar if member.isfile()}
            assert tar.extractfile("etc/hostname").read().decode().strip() == box
            assert b"central" in tar.extractfile("etc/relay-agent/config.toml").read()
        assert "etc/ssh/authorized_keys.d/anna" in files
        assert "etc/systemd/network/10-uplink.network" in files
        assert not [name for name in files if re.search("ssh_host_|machine-id|postfix/password", name)]
        # Beside the credentials lies what updates need; no more of it than where releases are and who signs them.
        assert {name for name in files if name.startswith("etc/relay-agent/credentials/")} == {
            f"etc/relay-agent/credentials/.update/{name}" for name in ("pull.json", "signers", "version")}


def test_site_needs_keys_that_last(tmp_path):
    """Where the site names nobody who could open its disks."""
    fleet = tmp_path / "inventory"
    shutil.copytree(PROJECT / "inventory", fleet)
    site = fleet / "group_vars/site_example/site.yml"
    site.write_text(site.read_text().replace("site_recovery:", "other:"))
    with pytest.raises(AssertionError, match="--recovery"):
        build(tmp_path, "--site", "site_example", "--inventory", fleet)
