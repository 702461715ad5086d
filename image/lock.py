"""The lock file: every Debian package and wheel that goes into an image, by version and digest; and their cache.

Three lists. ``tree`` is what the box has, ``tools`` what makes the kernel module and the UKIs (never in the image),
``wheels`` what the agent is installed from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from image.common import CACHE, ENVIRONMENT, LOCK, PROJECT, SUITE, Failed, digest, mirrors, run

DEBS = CACHE / "debs"
OWN = "relay-agent"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
COMPONENTS = "main contrib non-free-firmware"
# The kernel module is a package of our own: to the resolver it is there already.
OURS = """\
Package: zfs-modules
Status: install ok installed
Version: 1
Architecture: all
Maintainer: relay
Description: stands for ours
"""
HEAD = """\
# What the image is made of. Written by: image/build --update-lock
# A line: name, version, SHA-256 and where a Debian mirror has it. The date is that of every file that a build writes.
date {date}
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A line of the lock file. ``path`` is relative to the mirror; for a wheel it is the name of the file."""

    name: str
    version: str
    sha256: str
    path: str

    @property
    def cached(self) -> Path:
        """Where the cache has it. Named by digest: a file that is there is the right one."""
        return DEBS / self.sha256[:2] / f"{self.sha256}.deb"


def read() -> dict[str, list[Package]]:
    """The lists of the lock file."""
    lists: dict[str, list[Package]] = {}
    for line in LOCK.read_text().splitlines():
        if line.startswith("["):
            lists[line.strip("[]")] = []
        elif line and lists:
            lists[list(lists)[-1]].append(Package(*line.split()))
    return lists


def write(lists: dict[str, list[Package]]) -> None:
    """Write the lock file."""
    text = HEAD.format(date=datetime.now(timezone.utc).date()) + "".join(
        f"\n[{name}]\n" + "".join(f"{p.name} {p.version} {p.sha256} {p.path}\n" for p in packages)
        for name, packages in lists.items())
    LOCK.write_text(text)


class Archive:
    """Debian as the mirror has it now, seen by an apt with a folder of its own; signatures are verified."""

    def __init__(self, folder: Path) -> None:
        for part in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/lib/dpkg",
                     "var/cache/apt/archives/partial"):
            (folder / part).mkdir(parents=True)
        (folder / "var/lib/dpkg/status").write_text(OURS)
        found = mirrors()
        suites = (("Debian", SUITE), ("Debian-Security", f"{SUITE}-security"))
        (folder / "etc/apt/sources.list").write_text("".join(
            f"deb [signed-by={KEYRING}] {found[label]} {suite} {COMPONENTS}\n"
            for label, suite in suites if label in found))
        self.options = ("-o", f"Dir={folder}", "-o", f"Dir::State::status={folder}/var/lib/dpkg/status",
                        "-o", "APT::Architecture=amd64", "-o", "APT::Install-Recommends=false",
                        "-o", "Acquire::GzipIndexes=false", *proxy())  # unpacked, they are read in a tenth of the time
        run("apt-get", *self.options, "-qq", "update")

    def resolve(self, names: Iterable[str]) -> list[Package]:
        """Those packages, what every Debian has, and all they depend on."""
        printed = run("apt-get", *self.options, "-qq", "-y", "--print-uris", "install", "?essential", "apt", *names)
        chosen = [line.split()[1].split("_")[:2] for line in printed.splitlines() if line.startswith("'")]
        shown = run("apt-cache", *self.options, "show",
                    *(f"{name}={version.replace('%3a', ':')}" for name, version in chosen))
        packages = set()
        for stanza in shown.strip().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
            packages.add(Package(fields["Package"], fields["Version"], fields["SHA256"], fields["Filename"]))
        return sorted(packages, key=lambda package: package.name)

    def version(self, name: str) -> str:
        """The version of a package that would be installed."""
        shown = run("apt-cache", *self.options, "policy", name)
        return shown.partition("Candidate: ")[2].split()[0]

    def depends(self, name: str) -> str:
        """The first package that this one depends on: what a metapackage stands for."""
        shown = run("apt-cache", *self.options, "show", "--no-all-versions", name)
        return shown.partition("\nDepends: ")[2].split()[0]


def proxy() -> list[str]:
    """This machine's proxy as options for another apt."""
    return [word for line in run("apt-config", "dump").splitlines()
            if line.startswith(("Acquire::http::Proxy ", "Acquire::https::Proxy "))
            for word in ("-o", line.rstrip(";").replace(' "', "=").rstrip('"'))]


def wheels() -> list[Package]:
    """The wheels that `make release` collected: the agent's own, which this very checkout makes, and all it needs."""
    found = []
    for wheel in sorted((PROJECT / "build/wheels").glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        found.append(Package(name.lower().replace("_", "-"), version, digest(wheel), wheel.name))
    return found


def update(tree: Iterable[str], tools: Iterable[str]) -> None:
    """Lock what the mirror has today. ``{kernel}`` in a name stands for today's kernel."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Path(folder))
        kernel = archive.depends("linux-image-amd64").removeprefix("linux-image-")
        lists = {key: archive.resolve(name.format(kernel=kernel) for name in names)
                 for key, names in (("tree", tree), ("tools", tools))}
    write(lists | {"wheels": [p for p in wheels() if p.name != OWN]})


def release(locked: list[Package]) -> None:
    """Have `make release` made with the locked wheels; with none, with those of today.

    Raises Failed if the package index does not have them any more.
    """
    constraints = PROJECT / "build/constraints.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text("".join(f"{p.name}=={p.version}\n" for p in locked))
    if {*locked} - {*wheels()}:
        (PROJECT / "build/relay-agent.tar").unlink(missing_ok=True)
    done = subprocess.run(["make", "--silent", "-C", PROJECT, "release"], check=False,
                          env=os.environ | {"PIP_CONSTRAINT": str(constraints)})
    if done.returncode:
        raise Failed("make release failed; see above")
    if locked and (other := sorted({p.path for p in {p for p in wheels() if p.name != OWN} ^ {*locked}})):
        raise Failed(f"these wheels are not as image/packages.lock says: {', '.join(other)}\nLock what the package "
                     "index has today: image/build --update-lock")


def fetch(packages: list[Package]) -> None:
    """Have all of them in the cache.

    Raises Failed, naming them, if the mirror does not have some any more: a mirror keeps the newest alone.
    """
    wanted = [package for package in packages if not package.cached.exists()]
    if not wanted:
        return
    found = mirrors()
    DEBS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DEBS) as folder:
        for package in wanted:
            label = "Debian-Security" if package.path.startswith("pool/updates/") else "Debian"
            target = Path(folder) / package.path.rpartition("/")[2]
            # apt-helper is apt's own way of fetching: its proxies, its retries, and it verifies the digest.
            subprocess.run(
                ["/usr/lib/apt/apt-helper", *proxy(), "download-file", f"{found.get(label, '')}{package.path}",
                 str(target), f"SHA256:{package.sha256}"], env=ENVIRONMENT, capture_output=True, check=False)
            if target.exists() and digest(target) == package.sha256:
                package.cached.parent.mkdir(exist_ok=True)
                os.replace(target, package.cached)
    lost = [f"{p.name} {p.version}" for p in wanted if not p.cached.exists()]
    if lost:
        raise Failed(
            f"the mirror does not have: {', '.join(lost)}\nA mirror keeps the newest versions alone. Either bring the "
            f"cache of the machine that built this image before ({DEBS}), or fetch the files from Debian's archive of "
            "all versions, snapshot.debian.org, and hand them over with `image/build --debs FOLDER`, or lock what the "
            "mirror has today: image/build --update-lock (another image, then, to be tested anew)")


def adopt(folder: Path, packages: list[Package]) -> None:
    """Take packages that were fetched by hand into the cache; files that the lock file does not name are left."""
    wanted = {package.sha256: package for package in packages}
    for deb in folder.rglob("*.deb"):
        package = wanted.get(digest(deb))
        if package and not package.cached.exists():
            package.cached.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(deb, package.cached)


def repository(folder: Path, packages: list[Package], extra: Iterable[Path] = ()) -> None:
    """Make a folder that apt takes for a mirror, with those packages and no others, and some files beside them."""
    folder.mkdir(parents=True)
    stanzas = []
    for deb, name in [*((p.cached, p.path.rpartition("/")[2]) for p in packages), *((e, e.name) for e in extra)]:
        os.link(deb, folder / name) if deb.stat().st_dev == folder.stat().st_dev else shutil.copy(deb, folder / name)
        control = run("dpkg-deb", "--field", deb).rstrip()
        stanzas.append(f"{control}\nFilename: ./{name}\nSize: {deb.stat().st_size}\nSHA256: {digest(deb)}\n")
    index = folder / "Packages"
    index.write_text("\n".join(stanzas))
    # By the codename newer versions of mmdebstrap know which of the essential packages are meant.
    (folder / "Release").write_text(
        f"Codename: {SUITE}\nSHA256:\n {digest(index)} {index.stat().st_size} {index.name}\n")
