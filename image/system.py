"""The system of every box: the base tree as the roles set it up, sealed, and as a squashfs; what a site adds to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

from image import tree
from image.common import EPOCH, PROJECT, Failed, digest, run

CHECKOUT = "/run/relay/project"
# What stands for a secret while a site's roles run: credentials never travel on a stick, commission.yml brings them.
SECRET = "NOT-ON-THE-STICK"
PLAY = f"""\
mkdir /run/sshd /run/relay-share && ssh-keygen -A > /dev/null # or sshd and smbd would not check their settings
cd {CHECKOUT}
export ANSIBLE_LOCALHOST_WARNING=False ANSIBLE_NOCOLOR=1 ANSIBLE_HOME=/tmp/ansible ANSIBLE_LOCAL_TEMP=/tmp/ansible
ansible-playbook --extra-vars @/run/relay/variables.json {{words}}
"""
SIGN = """\
for module in /system/usr/lib/modules/*/extra/*.ko; do
    /usr/lib/linux-kbuild-*/scripts/sign-file sha256 /keys/db.key /keys/db.crt "$module"
done
"""
# Of this build or of this machine, not of the box: identities, logs, lists, caches, what dpkg and debconf had before.
SEALED = ("etc/ssh/ssh_host_*", "etc/apt/sources.list", "etc/apt/sources.list.d/0000*",
          "var/lib/apt/lists/*", "var/cache/apt/*", "var/cache/apt/archives/*.deb", "var/cache/ldconfig/*",
          "var/cache/debconf/*-old", "var/lib/dpkg/*-old", "var/log/*.log", "var/log/apt/*", "var/lib/dbus/machine-id",
          "etc/aliases.db",  # no two are alike, and the role smtp uses none
          "var/lib/systemd/random-seed", "root/.ansible", "root/.cache", "etc/apt/apt.conf.d/99mmdebstrap")
SQUASH = """\
mksquashfs /system /work/root.squashfs -comp zstd -Xcompression-level {level} -b 1M -no-progress -quiet -xattrs \
    -wildcards -e 'boot/vmlinuz-*' 'boot/initrd.img-*' > /work/log 2>&1 || {{ cat /work/log; exit 1; }}
"""


def set_up(base: Path, modules: Path, folder: Path, fleet: Path, version: str) -> None:
    """Unpack the base tree into the folder, install the kernel module and play playbooks/image.yml inside."""
    folder.mkdir(parents=True)
    run("tar", "--extract", "--file", base, "--directory", folder, "--numeric-owner", "--xattrs",
        "--xattrs-include=*", "--preserve-permissions")
    # mmdebstrap takes these from the machine that it runs on.
    (folder / "etc/hostname").write_text("relay\n")
    (folder / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
    (folder / "etc/resolv.conf").write_text("")
    tree.enter(folder, f"dpkg --install /run/modules/{modules.name}\ndpkg --purge zfs-modules-stub",
               {modules.parent: "/run/modules"})
    play(folder, fleet, "--inventory box, --connection local playbooks/image.yml", {})
    (folder / "etc/relay-release").write_text(f"{version}\n")


def play(folder: Path, fleet: Path, words: str, variables: dict[str, object]) -> None:
    """Run ansible-playbook inside the tree, which sees this checkout, with the fleet's inventory in its place."""
    scratch = folder.with_name(f"{folder.name}.play")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "run").mkdir(parents=True)
    shutil.copytree(fleet, scratch / "inventory", ignore=shutil.ignore_patterns("vault.yml"))
    text = "".join(f.read_text() for f in sorted((scratch / "inventory").rglob("*.yml")))
    secrets = {name: SECRET for name in re.findall(r"\b(vault_\w+)", text)}
    (scratch / "variables.json").write_text(json.dumps(secrets | variables | {
        "box_image": True, "ansible_connection": "local", "ansible_become": False,
        "ansible_python_interpreter": "/usr/bin/python3"}))
    tree.enter(folder, PLAY.format(words=words), {
        PROJECT: CHECKOUT, scratch / "inventory": f"{CHECKOUT}/inventory",
        scratch / "variables.json": "/run/relay/variables.json"})
    shutil.rmtree(scratch)


def seal(folder: Path, tools: Path, keys: Path) -> None:
    """Take out what is of this build, sign the kernel module, and give all files dates that no clock made."""
    for pattern in SEALED:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / "etc/machine-id").write_text("")
    # What systemd makes anew when /usr is newer than these (caches of the linker, of hardware) is made already.
    for place in ("etc", "var"):
        (folder / place / ".updated").touch()
    tree.enter(tools, SIGN, {folder: "/system", keys: "/keys"})
    clamp(folder)


def clamp(folder: Path) -> None:
    """No file is newer than the lock file."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if os.lstat(path).st_mtime > EPOCH:
                os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    os.utime(folder, (EPOCH, EPOCH))


def squash(tools: Path, folder: Path, work: Path, level: int) -> None:
    """Write ``root.squashfs``: what the stick runs from and what it installs."""
    tree.enter(tools, SQUASH.format(level=level), {folder: "/system", work: "/work"})


def site_part(sealed: Path, folder: Path, fleet: Path, box: str, target: Path) -> list[str]:
    """Play playbooks/site.yml for a box on a copy of the sealed tree and write a tar of what it made and changed.

    Returns what it took away, what is in a folder before the folder. Raises Failed if a secret would be in the tar.
    """
    shutil.rmtree(folder, ignore_errors=True)
    run("cp", "--archive", "--reflink=auto", sealed, folder)
    before = inventory(folder)
    play(folder, fleet, f"--inventory inventory --limit {box} playbooks/site.yml", {})
    for pattern in SEALED:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    after = inventory(folder)
    clamp(folder)
    changed = sorted(name for name, what in after.items() if before.get(name) != what)
    secret = [n for n in changed if (folder / n).is_file() and SECRET.encode() in (folder / n).read_bytes()]
    if secret:
        raise Failed(f"a role would put a secret on the stick, in {', '.join(secret)}; it must not do that where "
                     "box_image is true")
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in changed:
            tar.add(folder / name, name, recursive=False)
    shutil.rmtree(folder)
    return sorted(before.keys() - after.keys(), reverse=True)


def inventory(folder: Path) -> dict[str, object]:
    """What is in a tree: of each path its kind, rights, owner and content."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            state = path.lstat()
            content = os.readlink(path) if path.is_symlink() else digest(path) if path.is_file() else ""
            found[str(path.relative_to(folder))] = (state.st_mode, state.st_uid, state.st_gid, content)
    return found
