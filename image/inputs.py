"""What a build is asked for, looked at before anything is made: a wrong word is told in a second, not after minutes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from image.common import Failed, run

KEYS = ("PK.auth", "KEK.auth", "db.auth", "db.crt", "db.key")  # what a build needs of what image/keys makes


def examine(asked: argparse.Namespace) -> None:
    """Raise Failed for what would end the build half way, or make a stick that is of no use."""
    if not re.fullmatch(r"\w[\w.+~-]*", asked.version, re.ASCII):
        raise Failed(f"--version {asked.version!r}: it is a part of file names; letters, digits and . + ~ - _ alone")
    if asked.keys and (lost := [name for name in KEYS if not (asked.keys / name).is_file()]):
        raise Failed(f"--keys {asked.keys} has no {', '.join(lost)}; make a folder of keys with image/keys")
    for key in (asked.key, asked.first_contact_key and public(asked.first_contact_key)):
        if key and not _says_yes("ssh-keygen", "-l", "-f", key):
            raise Failed(f"{key} is no SSH key that can be read; ssh-keygen -t ed25519 makes one")
    for folder in (asked.debs, asked.inventory if asked.site is not None else None):
        if folder and not folder.is_dir():
            raise Failed(f"there is no folder {folder}")


def recipients(keys: list[str]) -> None:
    """Raise Failed unless all are age public keys: a box would find out at the hospital."""
    for key in keys:
        if not _says_yes("age", "--recipient", key, "--output", "/dev/null", "/dev/null"):
            raise Failed(f"{key!r} is no age public key, and recovery keys could not be encrypted to it")


def public(key: Path) -> Path:
    """The public part of an SSH key that may be named by its private one."""
    return key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")


def _says_yes(*command: str | Path) -> bool:
    try:
        run(*command)
    except Failed:
        return False
    return True
