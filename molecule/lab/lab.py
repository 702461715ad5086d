"""The lab: boxes that boot a real systemd in two seconds, as systemd-nspawn containers on overlays of one root tree.

All of it lives in a network namespace of its own: nothing else is reached, no address of the host's is taken, no
firewall of the host's is in the way, and several checkouts have their labs side by side. Needs root, mmdebstrap and
systemd-container. The mirror is the one that this machine's own apt uses.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "build/lab"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relay-lab"
SPACE = f"relay-lab-{hashlib.sha256(bytes(PROJECT)).hexdigest()[:8]}"  # the network namespace of this checkout
GATEWAY = "198.18.0.1/24"  # RFC 2544: for tests, and never routed
SUITE = "trixie"
ADMINISTRATOR = "lab"  # who may log in before anything was set up, as on a box that was shipped

# What a box needs before Ansible can come; everything else is asked for by the roles.
BOOT = ("systemd-sysv", "udev", "kmod", "dbus", "openssh-server", "python3", "python3-apt", "sudo", "iproute2")
# What stands in for the hospital and for the coordinating site.
PEERS = ("dcmtk", "smbclient", "python3-venv", "python3-aiosmtpd", "netcat-openbsd", "curl", "nftables")


def run(*command: str, **options: object) -> str:
    """Run a command; what it printed. A failure ends the program with the command's own words."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return str(done.stdout)


def packages(kind: str) -> list[str]:
    """The packages of a tree: for a relay box those that the roles ask for, so that none is fetched later."""
    if kind == "peer":
        return sorted({*BOOT, *PEERS})
    import yaml

    # Those of storage are for pools, which a container of this machine's kernel has not.
    asked = [name for path in PROJECT.glob("roles/*/vars/main.yml") if path.parts[-3] != "storage"
             for key, names in yaml.safe_load(path.read_text()).items() if key.endswith("_packages") for name in names]
    return sorted({*BOOT, *asked})


def mirrors() -> list[str]:
    """Sources for mmdebstrap, at the addresses that this machine's apt has for Debian and for its security updates."""
    found = dict(line.split("|") for line in run(
        "apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Origin: Debian").splitlines())
    suites = (("Debian", SUITE), ("Debian-Security", f"{SUITE}-security"))
    return [f"deb {found[label]} {suite} main non-free-firmware" for label, suite in suites if label in found]


def tree(kind: str) -> Path:
    """The root tree of that kind; made once for each list of packages and kept for all checkouts."""
    wanted = packages(kind)
    folder = CACHE / f"{kind}-{hashlib.sha256(repr((SUITE, wanted)).encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"building the {kind} tree (once, about a minute)", flush=True)
    partial = CACHE / f".partial-{os.getpid()}"
    hooks = (
        f"chroot $1 useradd --create-home --shell /bin/bash {ADMINISTRATOR}",
        f"echo '{ADMINISTRATOR} ALL=(ALL:ALL) NOPASSWD: ALL' > $1/etc/sudoers.d/first-contact",
        "echo 'AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u' > $1/etc/ssh/sshd_config.d/50-first-contact.conf",
        "rm $1/etc/ssh/ssh_host_*",
        ": > $1/etc/machine-id",
        "chroot $1 systemctl --quiet enable systemd-networkd ssh",
    )
    proxy = [f"--aptopt={line.rstrip(';')}" for line in run("apt-config", "dump").splitlines()
             if line.startswith(("Acquire::http::Proxy ", "Acquire::https::Proxy "))]
    try:
        run("mmdebstrap", "--variant=apt", f"--include={','.join(wanted)}", *proxy,
            *(f"--customize-hook={hook}" for hook in hooks), SUITE, str(partial), *mirrors())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def prepare() -> None:
    """The trees, the network, the way into it for ssh, and an authority with a certificate for the central site."""
    for kind in ("relay", "peer"):
        tree(kind)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not Path(f"/run/netns/{SPACE}").exists():
        run("ip", "netns", "add", SPACE)
        for command in ("link add lab type bridge", "link add raw type bridge", f"address add {GATEWAY} dev lab",
                        "link set lab up", "link set raw up", "link set lo up"):
            run("ip", "-n", SPACE, *command.split())
    for key in ("key", "release-key"):  # of the administrator, and of who signs releases
        if not (FOLDER / key).exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(FOLDER / key))
    (FOLDER / "ssh_config").write_text(f"""\
Host 198.18.0.*
    IdentityFile {FOLDER}/key
    IdentitiesOnly yes
    ProxyUseFdpass yes
    ProxyCommand {sys.executable} {Path(__file__).resolve()} connect %h %p
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ControlMaster auto
    ControlPersist 60s
    ControlPath /run/{SPACE}-%C
""")
    if not all((FOLDER / name).exists() for name in ("ca.pem", "central.pem", "central.key")):
        import trustme

        ca = trustme.CA()
        pair = ca.issue_cert("central")
        pair.cert_chain_pems[0].write_to_path(FOLDER / "central.pem")
        pair.private_key_pem.write_to_path(FOLDER / "central.key")
        ca.cert_pem.write_to_path(FOLDER / "ca.pem")


def up(name: str, address: str, kind: str, raw: str, hosts: list[str]) -> None:
    """Start a box, with what it wrote before if it was there before.

    ``raw`` is its address in the network of raw data, empty if it is not in there; ``hosts`` are lines of /etc/hosts.
    """
    if running(name):
        return
    box = FOLDER / name
    if not box.exists():
        for part in ("upper/etc/systemd/network", "upper/etc/ssh/authorized_keys.d", "work", "root"):
            (box / part).mkdir(parents=True)
        etc = box / "upper/etc"
        etc.joinpath("hostname").write_text(f"{name}\n")
        etc.joinpath("hosts").write_text("\n".join([f"127.0.0.1 localhost\n127.0.1.1 {name}", *hosts, ""]))
        etc.joinpath("systemd/network/10-lab.network").write_text(
            f"[Match]\nName=host0\n[Network]\nAddress={address}/24\nGateway={GATEWAY.partition('/')[0]}\n")
        if kind == "peer" and raw:
            etc.joinpath("systemd/network/10-raw.network").write_text(
                f"[Match]\nName=raw\n[Network]\nAddress={raw}/24\n")
        shutil.copy(FOLDER / "key.pub", etc / "ssh/authorized_keys.d" / ADMINISTRATOR)
        run("ssh-keygen", "-A", "-f", str(box / "upper"))
    # A relay box has no help but what is sent to it.
    shared = [f"--bind-ro={PROJECT}:/srv/relay"] if kind == "peer" else []
    cables = [f"--network-veth-extra=r-{name}:raw"] if raw else []
    with (box / "console").open("ab") as console:
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{SPACE}", "unshare", "--mount", "--propagation", "private",
             str(Path(__file__).with_name("boot")), name, str(tree(kind)), str(box), *shared, *cables],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            env=os.environ | {"LAB": SPACE})
    (box / "pid").write_text(str(process.pid))
    plug = ["ip", "-n", SPACE, "link", "set", f"r-{name}", "master", "raw", "up"]
    while raw and process.poll() is None and subprocess.run(plug, capture_output=True, check=False).returncode:
        time.sleep(0.05)  # until nspawn has laid the cable


def running(name: str) -> int:
    """The process of that box, 0 when it does not run; a number that another process has by now does not count."""
    try:
        pid = int((FOLDER / name / "pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return 0
    return pid if f"{FOLDER}/{name}".encode() in command else 0


def cut(name: str) -> None:
    """Cut the box's power: nothing in it gets a chance to finish."""
    pid = running(name)
    if not pid:
        return
    # systemd-nspawn cleans up after the box's first process; without its parent that one would live on.
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [pid]:
        os.kill(int(child), signal.SIGKILL)
    while running(name):
        time.sleep(0.02)
    for master in Path("/run").glob(f"{SPACE}-*"):  # they would wait for the box that was
        subprocess.run(["ssh", "-o", f"ControlPath={master}", "-O", "exit", "box"], capture_output=True, check=False)


def down() -> None:
    """End the lab and forget what its boxes wrote; key, certificates and trees stay."""
    for file in FOLDER.glob("*/pid"):
        cut(file.parent.name)
        shutil.rmtree(file.parent)
    if Path(f"/run/netns/{SPACE}").exists():
        run("ip", "netns", "delete", SPACE)


def connect(host: str, port: int) -> None:
    """Hand ssh a connection into the lab (its ProxyUseFdpass)."""
    with open(f"/run/netns/{SPACE}") as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0):
            raise SystemExit(f"cannot enter {SPACE}: {os.strerror(ctypes.get_errno())}")
    with socket.create_connection((host, port), timeout=10) as connection, socket.socket(fileno=1) as ssh:
        connection.settimeout(None)
        ssh.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help=prepare.__doc__)
    sub = commands.add_parser("up", help=up.__doc__)
    for argument in ("name", "address", "kind", "raw"):
        sub.add_argument(argument)
    sub.add_argument("hosts", nargs="*")
    sub = commands.add_parser("cut", help=cut.__doc__)
    sub.add_argument("name")
    commands.add_parser("down", help=down.__doc__)
    sub = commands.add_parser("connect", help=connect.__doc__)
    sub.add_argument("host")
    sub.add_argument("port", type=int)
    arguments = vars(parser.parse_args())
    globals()[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
