"""Root trees of Debian, from the locked packages alone, and what it takes to run a command inside one."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from image import lock
from image.common import CACHE, ENVIRONMENT, FILES, PROJECT, room, run, tag

# What a machine needs to start and to be set up; everything else is asked for by the roles. Firmware: microcode of
# both makers, network adapters of small and of server boards. Intel's own adapters and all disks need none.
BOOT = ("linux-image-{kernel}", "zfsutils-linux", "zfs-zed", "mdadm", "systemd-sysv", "systemd-boot",
        "systemd-boot-efi", "systemd-cryptsetup", "udev", "dbus", "kmod", "zstd", "busybox-static", "openssh-server",
        "python3", "python3-apt", "sudo", "iproute2", "fdisk", "dosfstools", "e2fsprogs", "efibootmgr",
        "squashfs-tools", "ansible-core", "age", "smartmontools", "tpm2-tools", "pciutils", "usbutils",
        "libtss2-esys-3.0.2-0t64", "libtss2-rc0t64", "libtss2-mu-4.0.1-0t64", "libtss2-tcti-device0t64",
        "intel-microcode", "amd64-microcode", "firmware-realtek", "firmware-bnx2x", "firmware-misc-nonfree")
# What the stick is made with; in a tree of its own, so that the building machine's versions do not matter.
TOOLS = ("linux-headers-{kernel}", "make", "gcc", "libc6-dev", "xz-utils", "kmod", "file", "systemd-ukify",
         "systemd-boot-tools", "systemd-boot-efi", "sbsigntool", "squashfs-tools", "mtools", "dosfstools", "fdisk",
         "openssl", "efitools", "faketime", "zfs-dkms", "mmdebstrap", "libtss2-esys-3.0.2-0t64",
         "libtss2-rc0t64")  # which systemd-measure opens by itself
CLAIM = """\
Package: zfs-modules-stub
Version: 1
Architecture: all
Maintainer: relay image builder <root@localhost>
Provides: zfs-modules
Description: stands for the ZFS kernel module until that is installed
"""


def wanted() -> list[str]:
    """The names of the packages of a box."""
    asked = [name for path in PROJECT.glob("roles/*/vars/main.yml")
             for key, names in yaml.safe_load(path.read_text()).items() if key.endswith("_packages") for name in names]
    return sorted({*BOOT, *asked})


def gather(folder: Path, packages: list[lock.Package], extra: Iterable[Path] = ()) -> None:
    """Put into a folder what :func:`bootstrap` needs there: those packages and no others, and room to work."""
    room(CACHE, 3 * 10**9)
    lock.fetch(packages)
    lock.repository(folder / "debs", packages, extra)
    (folder / "tmp").mkdir()


def bootstrap(folder: Path, names: Iterable[str], target: str, *words: str) -> list[str]:
    """The command that makes a folder or a tar (by its name) of those packages, from what was gathered in a folder."""
    return ["env", f"TMPDIR={folder}/tmp", "mmdebstrap", "--variant=apt", "--skip=output/mknod",
            "--aptopt=Apt::Install-Recommends \"false\"",
            *(f"--dpkgopt=path-exclude=/usr/share/{place}/*" for place in ("man", "doc", "locale", "info")),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=force-confold", *words,
            f"--include={','.join(sorted(names))}", lock.SUITE, target, f"deb [trusted=yes] copy:{folder}/debs ./"]


def enter(tree: Path, script: str, binds: dict[Path, str] | None = None) -> str:
    """Run a shell script inside a tree: no network, no service, nothing of this machine but ``binds``.

    Mounts are in a namespace of their own and end with it. systemctl knows by SYSTEMD_OFFLINE to start nothing.
    """
    # In a sticky folder not even root may write to a file of somebody's who is nobody in a user namespace.
    mounts = [f"mount -t proc proc {tree}/proc", f"mount -t tmpfs -o mode=755 tmpfs {tree}/dev",
              f"mount -t tmpfs tmpfs {tree}/run", f"mount -t tmpfs tmpfs {tree}/tmp"]
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        mounts.append(f"touch {tree}/dev/{device} && mount --bind /dev/{device} {tree}/dev/{device}")
    mounts.append(f"mkdir {tree}/dev/shm {tree}/run/lock && ln -s /proc/self/fd {tree}/dev/fd")
    for source, target in (binds or {}).items():
        make = "mkdir -p" if source.is_dir() else "touch"
        mounts.append(f"{make} {tree}{target} && mount --bind {shlex.quote(str(source))} {tree}{target}")
    inside = f"set -eu; {'; '.join(mounts)}; exec chroot {tree} /bin/sh -euc {shlex.quote(script)}"
    return run("unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--propagation", "private",
               "sh", "-c", inside, env=ENVIRONMENT | {"SYSTEMD_OFFLINE": "1", "DEBIAN_FRONTEND": "noninteractive"})


def kernel(packages: list[lock.Package]) -> str:
    """The kernel's release, as uname has it."""
    return next(p.name for p in packages if p.name.startswith("linux-image-")).removeprefix("linux-image-")


def tools(locked: dict[str, list[lock.Package]]) -> Path:
    """The tree that the stick is made with; made once for each state of the lock file."""
    packages = locked["tools"]
    folder = CACHE / f"tools-{tag(packages)}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            scratch = Path(name)
            partial = scratch / "tree"
            gather(scratch, packages)
            run("unshare", "--mount", "--propagation", "private",
                *bootstrap(scratch, {p.name for p in packages} - {"zfs-dkms"}, str(partial)))
            source = next(p for p in packages if p.name == "zfs-dkms")
            run("dpkg-deb", "--extract", source.cached, partial)  # installing it would start building at once
            if not folder.exists():  # another checkout may have been at it as well
                partial.rename(folder)
    return folder


def base(locked: dict[str, list[lock.Package]]) -> Path:
    """A tar of the box's packages as Debian installs them; made once for each state of the lock file.

    It is made in the tree of tools: another mmdebstrap or apt installs in another order, and gives users other numbers.
    The kernel module takes long to build and comes later: in its place is a package that only claims to be it.
    """
    packages, setup = locked["tree"], FILES / "setup"
    files = {str(f.relative_to(setup)): f.read_bytes() for f in sorted(setup.rglob("*")) if f.is_file()}
    maker = tools(locked)
    tar = CACHE / f"base-{tag(packages, files, maker.name)}.tar"
    if not tar.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            scratch = Path(name)
            claim = scratch / "claim/DEBIAN/control"
            claim.parent.mkdir(parents=True)
            claim.write_text(CLAIM)
            stub = scratch / "zfs-modules-stub_1_all.deb"
            run("dpkg-deb", "--build", "--root-owner-group", claim.parents[1], stub)
            gather(scratch, packages, [stub])
            names = {p.name for p in packages} | {"zfs-modules-stub"}
            enter(maker, shlex.join(bootstrap(
                Path("/work"), names, "/work/base.tar", "--setup-hook=cp -r --no-preserve=ownership /setup/. \"$1/\"")),
                {scratch: "/work", setup: "/setup"})
            (scratch / "base.tar").rename(tar)
    return tar
