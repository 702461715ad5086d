"""What a stick adds to the system for its site: a tar for each of the site's boxes, which the installer unpacks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import yaml

from image import system
from image.common import EPOCH, Failed, step

PROFILES = ("nuc", "supermicro")
ORDERS = """\
# What the stick may do with the machine that it is put into; docs/disks.md has all the words. Any editor will do.
# Whom the recovery key of the box is encrypted to: the coordinating site.
recovery = {recovery}
# What the machine must be: nuc or supermicro. Without it: what is found.
{profile}
# Which of the stick's boxes it becomes, where more than one would fit.
# box = {box}
# Serial numbers of disks whose content may be destroyed, with commas.
# wipe =
# Ids of relays that are no more, whose disks may be used again.
# retired =
# Id of the relay that is installed anew and keeps its data.
# keep =
"""


def boxes(fleet: Path, site: str) -> dict[str, str]:
    """The boxes of a site and the profile of each, from the inventory's groups."""
    groups: dict[str, set[str]] = {}

    def walk(name: str, group: dict[str, object] | None) -> set[str]:
        content = group or {}
        hosts = set(content.get("hosts") or ())  # type: ignore[attr-defined]
        for child, below in (content.get("children") or {}).items():  # type: ignore[attr-defined]
            hosts |= walk(child, below)
        groups[name] = groups.get(name, set()) | hosts
        return hosts

    for file in sorted(fleet.glob("*.yml")):
        for name, group in yaml.safe_load(file.read_text()).items():
            walk(name, group)
    if not groups.get(site):
        known = ", ".join(sorted(g for g in groups if g.startswith("site_")))
        raise Failed(f"{fleet} has no boxes in a group {site}; it has the sites {known}")
    found = {box: next((p for p in PROFILES if box in groups.get(p, ())), "") for box in sorted(groups[site])}
    if lost := [box for box, profile in found.items() if not profile]:
        raise Failed(f"{', '.join(lost)}: in none of the groups {', '.join(PROFILES)}; say which hardware it is")
    return found


def recovery(fleet: Path, site: str | None, keys: Path | None, named: list[str] | None) -> list[str]:
    """Whom the recovery keys of boxes are encrypted to: who is named, else the folder of keys', else the site's.

    A folder that is named goes before the inventory, in which the key of somebody else may have been copied along.
    """
    if named:
        return named
    if keys and (public := keys / "recovery.pub").exists():
        return [public.read_text().strip()]
    return site_recovery(fleet, site) if site else []


def site_recovery(fleet: Path, site: str) -> list[str]:
    """What the inventory says of a site under that name: age public keys, or none.

    Read as it is written, for Ansible would ask for the passphrase of the site's vault. Raises Failed if it is no list
    of such keys.
    """
    groups = fleet / "group_vars"
    for file in (*sorted((groups / site).glob("*.yml")), groups / f"{site}.yml", groups / "all.yml"):
        told = yaml.load(file.read_text(), yaml.BaseLoader) if file.exists() else None
        if isinstance(told, dict) and told.get("site_recovery"):
            keys = told["site_recovery"]
            if not isinstance(keys, list) or not all(isinstance(key, str) and key.startswith("age1") for key in keys):
                raise Failed(f"{file}: site_recovery must be a list of age public keys, as [age1...]")
            return keys
    return []


def orders(boxes: dict[str, str], recovery: list[str]) -> bytes:
    """``relay/install.conf``: what the installer may do with a machine; people add words before they use the stick."""
    profiles = set(boxes.values())
    profile = profiles.pop() if len(profiles) == 1 else ""
    return ORDERS.format(recovery=", ".join(recovery), profile=f"profile = {profile}" if profile else "# profile = nuc",
                         box=min(boxes)).encode()


def part(box: str, profile: str, work: Path, fleet: Path | None, contact: Path) -> dict[str, bytes]:
    """Files of a box for the stick, ``relay/site/<box>.tar`` and ``.json``; without a fleet, whom it lets in."""
    target = work / f"{box}.tar"
    gone: list[str] = []
    if fleet:
        with step(f"roles of {box}"):
            gone = system.site_part(work / "system", work / "box", fleet, box, target)
    else:
        with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
            key = contact.read_bytes()
            member = tarfile.TarInfo("etc/ssh/authorized_keys.d/first-contact")
            member.size, member.mtime, member.mode = len(key), EPOCH, 0o644
            tar.addfile(member, io.BytesIO(key))
    return {f"relay/site/{box}.tar": target.read_bytes(),
            f"relay/site/{box}.json": (json.dumps({"box": box, "profile": profile, "gone": gone}) + "\n").encode()}
