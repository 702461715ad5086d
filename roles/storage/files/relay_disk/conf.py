"""What the stick was told: ``relay/install.conf``, lines ``name = value`` that people edit with any editor."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from relay_disk.run import Refused

PROFILES = ("nuc", "supermicro")
_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Conf:
    """The words of ``install.conf``; sizes in bytes."""

    profile: str = ""  # what the stick was built for; empty: whatever is found
    box: str = ""  # which of the boxes that the stick has settings for
    wipe: frozenset[str] = frozenset()  # serial numbers of disks whose content may be destroyed
    retired: frozenset[str] = frozenset()  # ids of relays whose disks may be used again
    keep: str = ""  # id of the relay that is installed anew and whose pool stays
    recovery: tuple[str, ...] = ()  # age recipients of the recovery key; "none" says that there shall be none
    tpm: bool = True  # False: a machine without TPM is good enough
    esp: int = 512 * 2**20
    root: int = 24 * 2**30
    log: int = 8 * 2**30
    data_share: int = 50  # per cent of the pool that is reserved for DICOM, the ledger and what was de-identified
    kspace_share: int = 40  # per cent of the pool that raw data may take


def read(text: str) -> Conf:
    """Parse ``install.conf``; :class:`Refused` names the line that cannot be understood."""
    values: dict[str, object] = {}
    known = {field.name for field in fields(Conf)}
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        name, equals, value = (part.strip() for part in words.partition("="))
        name = name.lower()
        if not equals or name not in known:
            raise Refused(f"install.conf, line {number}: {words!r} is not understood; known are "
                          f"{', '.join(sorted(known))}, each as: name = value")
        if name in values:
            raise Refused(f"install.conf, line {number}: {name} is said twice")
        try:
            values[name] = _value(name, value)
        except ValueError as error:
            raise Refused(f"install.conf, line {number}: {name} = {value!r}: {error}") from None
    conf = replace(Conf(), **values)  # type: ignore[arg-type]
    if conf.data_share + conf.kspace_share > 95:
        raise Refused("install.conf: data_share and kspace_share together must leave 5 per cent of the pool")
    return conf


def _value(name: str, value: str) -> object:
    items = tuple(item for item in re.split(r"[,\s]+", value) if item)
    if name in ("wipe", "retired"):
        return frozenset(items)
    if name == "recovery":
        return items
    if name in ("esp", "root", "log"):
        return _size(value)
    if name in ("data_share", "kspace_share"):
        if not value.isdigit() or not 1 <= int(value) <= 94:
            raise ValueError("a number of per cent from 1 to 94 is needed")
        return int(value)
    if name == "tpm":
        if value not in ("required", "optional"):
            raise ValueError('"required" or "optional" is needed')
        return value == "required"
    if name == "profile" and value and value not in PROFILES:
        raise ValueError(f"{' or '.join(PROFILES)} is needed")
    if name == "keep" and value and not re.fullmatch(r"[0-9a-f]{8}", value):
        raise ValueError("the id of a relay is needed: eight hexadecimal digits, as `relay-disk status` shows them")
    return value


def _size(value: str) -> int:
    found = re.fullmatch(r"(\d+) ?(MiB|GiB|TiB)", value)
    if not found:
        raise ValueError("a size such as 24 GiB is needed")
    return int(found[1]) * _UNITS[found[2]]
