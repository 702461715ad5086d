"""The command: builds the stick, or renews the lock file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from image import inputs, lock, sbom, site, stick, system, tree, uki, zfs
from image.common import CACHE, ENVIRONMENT, EPOCH, OUTPUT, PROJECT, Failed, digest, room, run, step


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="image/build", description="Builds the stick that makes a relay box.")
    parser.add_argument("--site", help="group of the inventory whose boxes this stick makes; without it, boxes wait "
                        "to be commissioned by cable")
    parser.add_argument("--inventory", type=Path, default=PROJECT / "inventory", help="the fleet's folder")
    parser.add_argument("--version", default="test", help="name of this image")
    parser.add_argument("--key", type=Path, help="SSH key that signs (a private one, or a public one whose private "
                        "part an agent holds); without it a throw-away key")
    parser.add_argument("--keys", type=Path, help="folder that image/keys made; without it throw-away keys")
    parser.add_argument("--recovery", action="append", metavar="age1...", help="whom the recovery keys of boxes "
                        "are encrypted to, in place of recovery.pub in the folder of keys or, without that, of the "
                        "site's site_recovery; may be given several times")
    parser.add_argument("--first-contact-key", type=Path, help="public SSH key of whoever commissions the boxes; "
                        "without it a throw-away key")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the image (default: build/image)")
    parser.add_argument("--fast", action="store_true", help="compress less, for tests: a larger image in less time")
    parser.add_argument("--debs", type=Path, help="folder with packages that the mirror does not have any more")
    parser.add_argument("--update-lock", action="store_true", help="lock what the mirror has today, and build nothing")
    asked = parser.parse_args()
    if os.geteuid():
        parser.exit(1, "image/build: mmdebstrap and chroot need root: sudo image/build ..., or, with uidmap,\n"
                    "             root of a user namespace: unshare --map-root-user --map-auto image/build ...\n")
    start = time.monotonic()
    try:
        if asked.update_lock:
            (PROJECT / "build/relay-agent.tar").unlink(missing_ok=True)
            lock.release([])
            with step("asking the mirror"):
                lock.update(tree.wanted(), tree.TOOLS)
        else:
            print(build(asked))
            print(f"done in {time.monotonic() - start:.0f} s", file=sys.stderr)
    except (Failed, OSError) as failure:
        parser.exit(1, f"\nimage/build: {failure}\n")


def throw_away(name: str, *command: str | Path) -> Path:
    """Keys for tests, made once: a folder of the cache, so that the same inputs stay the same inputs."""
    folder = CACHE / "throw-away" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run(*command)
    return folder


def build(asked: argparse.Namespace) -> Path:
    """Make the image and what belongs beside it; where it is."""
    inputs.examine(asked)
    boxes = site.boxes(asked.inventory, asked.site) if asked.site is not None else {"any": ""}
    recovery = site.recovery(asked.inventory, asked.site, asked.keys, asked.recovery)
    if asked.site and not recovery:
        raise Failed("whoever has a throw-away key can read the disks of these boxes, and nobody can once it is gone; "
                     "make keys with image/keys and name the folder with --keys, or name the coordinating site's "
                     "public key with --recovery, or for good as site_recovery in what the inventory says of the site")
    if asked.site and not (asked.keys and asked.key):
        print("throw-away keys sign for Secure Boot or SHA256SUMS: for a box that is shipped give --keys and --key",
              file=sys.stderr)
    keys = asked.keys or throw_away("keys", PROJECT / "image/keys", CACHE / "throw-away/keys")
    recovery = recovery or [(keys / "recovery.pub").read_text().strip()]
    inputs.recipients(recovery)
    signer, contact = (
        given or throw_away(name, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"throw-away-{name}",
                            "-f", CACHE / "throw-away" / name)
        for given, name in ((asked.key, "signer"), (asked.first_contact_key, "first-contact")))
    contact = inputs.public(contact)
    room(asked.output, 3 * 10**9)
    locked = lock.read()
    lock.release(locked["wheels"])
    if asked.debs:
        lock.adopt(asked.debs, locked["tree"] + locked["tools"])
    with step("tools"):
        tools = tree.tools(locked)
    with step("ZFS kernel module"):
        modules = zfs.deb(locked)
    with step("Debian"):
        base = tree.base(locked)
    work = asked.output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with step("roles"):
            system.set_up(base, modules, work / "system", asked.inventory, asked.version)
            system.seal(work / "system", tools, keys)
        kernel = tree.kernel(locked["tree"])
        with step("UKIs"):
            uki.make(tools, work / "system", kernel, keys, work)
        with step("squashfs"):
            system.squash(tools, work / "system", work, 3 if asked.fast else 19)
        parts = {"relay/install.conf": site.orders(boxes, recovery)}
        for box, profile in boxes.items():
            parts |= site.part(box, profile, work, asked.inventory if asked.site else None, contact)
        materials = sbom.document(f"relay-image-{asked.version}", work / "system", locked, digest(modules))
        manifest = {
            "version": asked.version, "date": EPOCH, "kernel": kernel, "zfs": modules.name, "site": asked.site,
            "source": source(), "lock": digest(lock.LOCK), "squashfs": digest(work / "root.squashfs"),
            "uki": {name: digest(work / f"{name}.efi") for name in uki.COMMAND_LINES},
            "secure_boot": digest(keys / "db.crt"),
            "first_contact": None if asked.site else contact.read_text().strip()}
        parts["relay/manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
        with step("stick"):
            image = stick.make(tools, work, keys, parts)
        return publish(asked, image, manifest, materials, signer)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def source() -> str:
    """The commit that this checkout is at, and whether it was changed since."""
    words = ["git", "-c", "safe.directory=*", "-C", str(PROJECT)]
    commit = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run([*words, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return f"{commit or 'unknown'}{' and changes' if dirty else ''}"


def publish(asked: argparse.Namespace, image: Path, manifest: dict[str, object], materials: dict[str, object],
            signer: Path) -> Path:
    """Put the image in its place with the manifest, the bill of materials, SHA256SUMS and the signature of these."""
    name = f"relay-{asked.site or 'any'}-{asked.version}"
    target = asked.output / f"{name}.img"
    image.rename(target)
    (asked.output / f"{name}.manifest.json").write_text(
        json.dumps(manifest | {"image": digest(target), "size": target.stat().st_size}, indent=1) + "\n")
    (asked.output / f"{name}.spdx.json").write_text(json.dumps(materials, indent=1) + "\n")
    sums = asked.output / f"{name}.SHA256SUMS"
    sums.write_text("".join(f"{digest(asked.output / f'{name}.{kind}')}  {name}.{kind}\n"
                            for kind in ("img", "manifest.json", "spdx.json")))
    sums.with_name(f"{sums.name}.sig").unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-Y", "sign", "-n", "relay-image", "-f", signer, sums,
        env=ENVIRONMENT | {k: v for k, v in os.environ.items() if k == "SSH_AUTH_SOCK"})
    return target


main()
