"""The ZFS kernel module as a Debian package, built once for each kernel and each ZFS: the box has no compiler."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from image import tree
from image.common import CACHE, ENVIRONMENT, run, tag
from image.lock import Package

# The module outlives many lock files: its dates are no image's.
EPOCH = 1767225600
CONTROL = """\
Package: zfs-modules-{kernel}
Version: {version}
Architecture: amd64
Maintainer: relay image builder <root@localhost>
Depends: linux-image-{kernel}, kmod
Provides: zfs-modules
Section: contrib/kernel
Description: ZFS for Linux {kernel}
"""
# As Debian's dkms.conf builds it. -fdebug-prefix-map is not needed: the tree's path is the same in every chroot.
BUILD = """\
export SOURCE_DATE_EPOCH={epoch}
cp -r /usr/src/zfs-* /build/zfs && cd /build/zfs
./configure --quiet --disable-dependency-tracking --prefix=/usr --with-config=kernel \
    --with-linux=/usr/src/linux-headers-{common} --with-linux-obj=/usr/src/linux-headers-{kernel} > /build/log 2>&1 \
    || {{ tail -30 /build/log; exit 1; }}
make --silent -j{jobs} KBUILD_BUILD_TIMESTAMP=@{epoch} KBUILD_BUILD_USER=relay KBUILD_BUILD_HOST=relay \
    >> /build/log 2>&1 || {{ tail -30 /build/log; exit 1; }}
for module in spl zfs; do strip --strip-debug module/$module.ko; cp module/$module.ko /build/; done
"""


def deb(locked: dict[str, list[Package]]) -> Path:
    """The package; about eight minutes on two cores when the cache does not have it."""
    tools = locked["tools"]
    kernel = tree.kernel(locked["tree"])
    source = next(p for p in tools if p.name == "zfs-dkms")
    makes = [p for p in tools if p.name.startswith(("linux-headers", "linux-kbuild", "gcc-", "binutils", "zfs-dkms"))]
    file = CACHE / "modules" / f"zfs-modules-{kernel}_{source.version}~{tag(makes)}_amd64.deb"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        work = Path(scratch) / "build"
        work.mkdir()
        common = kernel.replace("-amd64", "-common")
        tree.enter(tree.tools(locked), BUILD.format(kernel=kernel, common=common, jobs=os.cpu_count(), epoch=EPOCH),
                   {work: "/build"})
        pack(work, Path(scratch), kernel, source.version).rename(file)
    return file


def pack(built: Path, scratch: Path, kernel: str, version: str) -> Path:
    """Make a package of the modules in the folder ``built``."""
    root = scratch / "root"
    modules = root / f"usr/lib/modules/{kernel}/extra"
    (root / "DEBIAN").mkdir(parents=True)
    modules.mkdir(parents=True)
    for name in ("spl.ko", "zfs.ko"):
        shutil.copy(built / name, modules)
    (root / "DEBIAN/control").write_text(CONTROL.format(kernel=kernel, version=version))
    script = root / "DEBIAN/postinst"
    script.write_text(f"#!/bin/sh\nset -e\ndepmod {kernel}\n")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path == script else 0o644)
        os.utime(path, (EPOCH, EPOCH))
    run("dpkg-deb", "--build", "--root-owner-group", "-Zxz", root, scratch,
        env=ENVIRONMENT | {"SOURCE_DATE_EPOCH": str(EPOCH)})
    return next(scratch.glob("*.deb"))
