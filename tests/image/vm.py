"""Machines that the stick is put into: QEMU with UEFI, a TPM, disks as a box has them, a serial log, and ssh.

KVM where this machine has it, otherwise QEMU's own interpreter (about ten times slower; ``patience`` follows).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

FIRMWARE = Path("/usr/share/OVMF")
# Without these flags /dev/kvm is there for another kind of virtual machine, and OVMF does not start in it.
KVM = os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
PATIENCE = 1 if KVM else 10  # what waiting times are multiplied with
# Addresses of QEMU's own network: this machine as the guest sees it, and who answers for names.
HOST = GATEWAY = "10.0.2.2"
NAMES = "10.0.2.3"
MAC = "52:54:00:12:34:56"


def run(*command: str | Path) -> str:
    """Run a command; what it printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk as the guest sees it: ``hdd``, ``ssd`` (both SATA), ``nvme`` or ``usb``; its size in bytes in the file.

    One that is ``failing`` is there and answers every read with an error.
    """

    path: Path
    kind: str
    serial: str
    failing: bool = False

    @classmethod
    def blank(cls, folder: Path, kind: str, serial: str, size: str = "8G") -> Disk:
        """A new, empty one."""
        path = folder / f"{serial}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
        return cls(path, kind, serial)

    def overlay(self, folder: Path) -> Disk:
        """The same disk with what is written going to another file: the original stays as it is."""
        path = folder / f"{self.serial}.qcow2"
        form = json.loads(run("qemu-img", "info", "--output=json", self.path))["format"]
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.path.resolve(), "-F", form, path)
        return type(self)(path, self.kind, self.serial)


def stick(image: Path, folder: Path) -> Disk:
    """A stick with that image; what is written to it goes to a file in the folder."""
    return Disk(image, "usb", "STICK").overlay(folder)


class VM:
    """One machine. Its folder keeps what belongs to the board (firmware variables, TPM) over all of its starts."""

    def __init__(self, folder: Path, disks: list[Disk], *, memory: int = 2048, firmware: str = "uefi",
                 tpm: bool = True, network: bool = True, forwards: dict[str, int] | None = None) -> None:
        """``firmware``: ``uefi`` (in setup mode: it takes the keys of the first stick it starts), or ``legacy`` BIOS.

        ``forwards`` are ports of the guest by name, reached at ``port(name)``; ssh always is.
        """
        self.folder, self.disks, self.memory, self.firmware, self.tpm = folder, disks, memory, firmware, tpm
        self.network = network
        self.ports = {name: (port, free_port()) for name, port in ({"ssh": 22} | (forwards or {})).items()}
        self.serial = folder / "serial.log"
        self.read_from = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> VM:
        """Press the power button."""
        assert not self.running, "it runs"
        for left in (self.serial, self.folder / "qmp.socket"):
            left.unlink(missing_ok=True)
        self.serial.touch()
        self.read_from = 0
        command = ["qemu-system-x86_64", "-machine", "q35",
                   # With two, kernels have stopped in the interpreter as if it had lost a timer of the second
                   # (docs/image.md); side by side, machines with one are faster too.
                   *(("-accel", "kvm", "-cpu", "host", "-smp", "2") if KVM
                     else ("-accel", "tcg", "-cpu", "max,svm=off", "-smp", "1")),
                   "-m", str(self.memory), "-nodefaults", "-display", "none",
                   # Old firmware has no other way to say something; for others it is only slow.
                   "-vga", "std" if self.firmware == "legacy" else "none",
                   "-no-user-config", "-device", "virtio-rng-pci",
                   "-chardev", f"socket,id=serial,path={self.folder}/serial.socket,server=on,wait=off,"
                   f"logfile={self.serial}", "-serial", "chardev:serial",
                   "-qmp", f"unix:{self.folder}/qmp.socket,server=on,wait=off",
                   *self.board(), *self.drives(), *self.nic()]
        with (self.folder / "qemu.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        wait(lambda: (self.folder / "qmp.socket").exists() or not self.running, 60, "QEMU")
        assert self.running, self.complaint()
        return self

    def board(self) -> list[str]:
        """Firmware with its variables, and the TPM."""
        words: list[str] = []
        if self.firmware != "legacy":
            variables = self.folder / "variables.fd"
            if not variables.exists():
                shutil.copy(FIRMWARE / "OVMF_VARS_4M.fd", variables)
            words += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE / 'OVMF_CODE_4M.fd'}",
                      "-drive", f"if=pflash,format=raw,unit=1,file={variables}"]
        if self.tpm:
            state = self.folder / "tpm"
            if not state.exists():
                state.mkdir()
                run("swtpm_setup", "--tpm2", "--tpmstate", state, "--createek", "--pcr-banks", "sha256")
            (self.folder / "tpm.socket").unlink(missing_ok=True)
            self.processes.append(subprocess.Popen(
                ["swtpm", "socket", "--tpm2", "--ctrl", f"type=unixio,path={self.folder}/tpm.socket",
                 "--tpmstate", f"dir={state}", "--flags", "startup-clear"], stderr=subprocess.DEVNULL))
            wait((self.folder / "tpm.socket").exists, 10, "swtpm")
            words += ["-chardev", f"socket,id=tpm,path={self.folder}/tpm.socket",
                      "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"]
        return words

    def drives(self) -> list[str]:
        """The disks, each at a port of its own in the order of the list; a stick is started from before all others."""
        words = ["-device", "qemu-xhci,id=usb", "-device", "ich9-ahci,id=sata", "-device", "ich9-ahci,id=more"]
        ports = (f"{controller}.{port}" for controller in ("sata", "more") for port in range(6))
        for number, disk in enumerate(self.disks):
            form = json.loads(run("qemu-img", "info", "-U", "--output=json", disk.path))["format"]
            source = f"file={disk.path},format={form}"
            if disk.failing:
                source = (f"driver=blkdebug,image.driver={form},image.file.filename={disk.path},"
                          "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5")
            words += ["-drive", f"if=none,id=d{number},{source},cache=unsafe,discard=unmap"]
            order = f"bootindex={number if disk.kind == 'usb' else number + 10}"
            if disk.kind == "usb":
                device = f"usb-storage,bus=usb.0,removable=on,serial={disk.serial}"
            elif disk.kind == "nvme":
                device = f"nvme,serial={disk.serial}"
            else:
                rate = {"ssd": 1, "hdd": 7200}[disk.kind]
                device = f"ide-hd,bus={next(ports)},serial={disk.serial},rotation_rate={rate}"
            words += ["-device", f"{device},drive=d{number},{order}"]
        return words

    def nic(self) -> list[str]:
        """One network adapter; the guest reaches this machine at HOST, and nothing else."""
        if not self.network:
            return []
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for there, here in self.ports.values())
        return ["-netdev", f"user,id=net,restrict=off{forwards}", "-device", f"e1000e,netdev=net,romfile=,mac={MAC}"]

    @property
    def running(self) -> bool:
        """Whether the power is on."""
        return bool(self.processes) and self.processes[-1].poll() is None

    def port(self, name: str) -> int:
        """The port of this machine that leads to that port of the guest."""
        return self.ports[name][1]

    def log(self) -> str:
        """What the serial console has shown since the last start."""
        return self.serial.read_text(errors="replace")

    def wait_for(self, *texts: str, seconds: float = 120) -> str:
        """Wait until the console shows one of the texts, from where the last wait ended; which one it was."""
        end = time.monotonic() + seconds * PATIENCE
        while True:
            shown = self.log()[self.read_from:]
            found = [(shown.index(text), text) for text in texts if text in shown]
            if found:
                place, text = min(found)
                self.read_from += place + len(text)
                return text
            assert self.running, f"the machine is off; no {texts} in:\n{self.log()[-3000:]}\n{self.complaint()}"
            assert time.monotonic() < end, f"no {texts} after {seconds * PATIENCE:.0f} s:\n{self.log()[-3000:]}"
            time.sleep(0.5)

    def complaint(self) -> str:
        """What QEMU itself said."""
        return (self.folder / "qemu.log").read_text(errors="replace")

    def type(self, text: str) -> None:
        """Type on the serial console, as fast as people do: what the guest has not taken is lost when the line ends."""
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(f"{self.folder}/serial.socket")
            for character in text:
                console.sendall(character.encode())
                time.sleep(0.05)
            time.sleep(1)

    def wait_off(self, seconds: float = 300) -> None:
        """Wait until the machine has switched itself off."""
        wait(lambda: not self.running, seconds * PATIENCE, lambda: f"still on:\n{self.log()[-3000:]}")
        self.cut()

    def cut(self) -> None:
        """Cut the power: nothing in it gets a chance to finish."""
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.processes.clear()

    def __enter__(self) -> VM:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.cut()

    def ssh(self, command: str, *, user: str = "first-contact", key: Path, seconds: float = 60,
            check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the guest."""
        done = subprocess.run([*self.ssh_words(key), f"{user}@127.0.0.1", command], capture_output=True, text=True,
                              timeout=seconds * PATIENCE, stdin=subprocess.DEVNULL, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def ssh_words(self, key: Path) -> list[str]:
        """The beginning of an ssh command to the guest, whoever it is by now."""
        return ["ssh", "-p", str(self.port("ssh")), "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
                "-o", "ConnectTimeout=120"]  # sshd shuts out for a while who hangs up on it

    def wait_ssh(self, *, user: str = "first-contact", key: Path, seconds: float = 120) -> None:
        """Wait until that user gets in."""
        end = time.monotonic() + seconds * PATIENCE
        while self.ssh("true", user=user, key=key, check=False).returncode:
            assert self.running, f"the machine is off:\n{self.log()[-3000:]}\n{self.complaint()}"
            assert time.monotonic() < end, f"no ssh after {seconds * PATIENCE:.0f} s:\n{self.log()[-3000:]}"
            time.sleep(5)

    def qmp(self, command: str, **arguments: object) -> object:
        """Ask QEMU."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self.folder}/qmp.socket")
            stream = connection.makefile("rw")
            stream.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    if "return" in answer or "error" in answer:
                        break
            assert "error" not in answer, answer
            return answer["return"]

    def screen(self) -> str:
        """The screen of a machine in text mode: 25 lines of 80 characters."""
        file = self.folder / "screen.bin"
        self.qmp("pmemsave", val=0xB8000, size=80 * 25 * 2, filename=str(file))
        text = file.read_bytes()[::2].decode("cp437")
        return "\n".join(text[line * 80:line * 80 + 80].rstrip() for line in range(25))


def wait(condition, seconds: float, what) -> None:
    """Wait for a condition; ``what`` (or what it returns) is said when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else f"no {what} after {seconds} s"
        time.sleep(0.1)


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
