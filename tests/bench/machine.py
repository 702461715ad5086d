"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import ssl
from pathlib import Path

from relay_agent import __version__
from tests.bench import servers

MEMORY_ONLY = ("tmpfs", "ramfs")


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder; of an ext4, whether it has a journal, on which syncs depend."""
    best, kind, device = "", "unknown", ""
    for row in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = row.split()
        mount = fields[4].encode().decode("unicode_escape")
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, (kind, device) = mount, fields[fields.index("-") + 1:fields.index("-") + 3]
    journals = Path("/proc/fs/jbd2")
    if kind == "ext4" and Path(device).exists() and journals.exists():
        with_journal = any(journals.glob(f"{Path(device).resolve().name}-*"))
        return f"ext4 {'with' if with_journal else 'WITHOUT'} a journal"
    return kind


def facts(folder: Path) -> dict[str, str]:
    """The machine, as it is now, and the versions of what is compared."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((row.partition(":")[2].strip() for row in info.splitlines() if row.startswith("model name")), "")
    memory = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]) / 2**20
    return {
        "machine": f"{os.cpu_count()} cores ({model or platform.machine()}), {memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}, {_distribution()}",
        "file system": file_system(folder),
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "software": f"relay-agent {__version__}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "peers": ", ".join(f"{name} {version}" for name, version in servers.versions().items()),
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"
