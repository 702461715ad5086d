"""What a stick is made from, without building one: seconds, on any machine."""

from __future__ import annotations

import pytest
from relay_disk import conf

from image import lock, site, tree
from image.common import PROJECT, Failed, room
from image.uki import COMMAND_LINES


@pytest.mark.parametrize(("part", "names"), [("tree", tree.wanted()), ("tools", tree.TOOLS)])
def test_lock_has_what_is_asked_for(part, names):
    """A package that a role asks for and the image lacks would be fetched by a box that has no mirror."""
    locked = lock.read()
    kernel = tree.kernel(locked["tree"])
    missing = {name.format(kernel=kernel) for name in names} - {package.name for package in locked[part]}
    assert not missing, "run: image/build --update-lock"


def test_boxes_of_a_site():
    assert site.boxes(PROJECT / "inventory", "site_example") == {"relay-0001": "nuc", "relay-0002": "supermicro"}
    with pytest.raises(Failed, match="site_example"):
        site.boxes(PROJECT / "inventory", "site_nowhere")


def test_recovery_keys_of_a_site(tmp_path):
    """As the site says, or all sites; beside a vault that nobody opens here."""
    assert len(site.site_recovery(PROJECT / "inventory", "site_example")) == 1
    folder = tmp_path / "group_vars/site_x"
    folder.mkdir(parents=True)
    (folder / "vault.yml").write_text("$ANSIBLE_VAULT;1.1;AES256\n3132\n3334\n")
    (folder / "site.yml").write_text("password: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3132\n")
    assert site.site_recovery(tmp_path, "site_x") == []
    (tmp_path / "group_vars/all.yml").write_text("site_recovery: [age1all]\n")
    assert site.site_recovery(tmp_path, "site_x") == ["age1all"]
    with (folder / "site.yml").open("a") as file:
        file.write("site_recovery: [age1a, age1b]\n")
    assert site.site_recovery(tmp_path, "site_x") == ["age1a", "age1b"]
    for wrong in ("age1a", "['{{ vault_key }}']"):
        (tmp_path / "group_vars/all.yml").write_text(f"site_recovery: {wrong}\n")
        with pytest.raises(Failed, match="list of age public keys"):
            site.site_recovery(tmp_path, "site_y")


def test_whom_recovery_keys_are_encrypted_to(tmp_path):
    """What is said with the command goes before what lies in the inventory, which may be a copy of another site's."""
    fleet = PROJECT / "inventory"
    example = site.site_recovery(fleet, "site_example")
    assert site.recovery(fleet, None, None, None) == []
    assert site.recovery(fleet, "site_example", None, None) == example
    assert site.recovery(fleet, "site_example", tmp_path, None) == example
    (tmp_path / "recovery.pub").write_text("age1folder\n")
    assert site.recovery(fleet, "site_example", tmp_path, None) == ["age1folder"]
    assert site.recovery(fleet, "site_example", tmp_path, ["age1a", "age1b"]) == ["age1a", "age1b"]


@pytest.mark.parametrize(("boxes", "profile"), [
    ({"any": ""}, ""), ({"a": "nuc"}, "nuc"), ({"a": "nuc", "b": "nuc"}, "nuc"), ({"a": "nuc", "b": "supermicro"}, "")])
def test_orders_of_the_installer(boxes, profile):
    """What the build writes is what the installer reads, and allows nothing to be destroyed."""
    assert conf.read(site.orders(boxes, ["age1a", "age1b"]).decode()) == conf.Conf(
        profile=profile, recovery=("age1a", "age1b"))


def test_kernel_names_the_installer():
    """It is started by its name alone: under another one the stick would wait for ever."""
    names = [word.partition("=")[2] for word in COMMAND_LINES["install"].split() if word.startswith("systemd.unit=")]
    assert [(PROJECT / "roles/storage/files" / name).exists() for name in names] == [True]


def test_a_disk_without_room_is_told_before_anything_is_built(tmp_path):
    room(tmp_path / "new/folder", 1)
    with pytest.raises(Failed, match=r"GB are free for .*building needs 1000000 GB there.*--output"):
        room(tmp_path, 10**15)
