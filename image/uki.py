"""The UKIs: kernel, initrd and command line in one signed EFI program each."""

from __future__ import annotations

import shutil
from datetime import datetime, timezone
from pathlib import Path

from image import tree
from image.common import EPOCH

# The screen and the first serial port; a kernel has one serial console at most. Init writes to the last one.
CONSOLES = "console=tty0 console=ttyS0,115200n8"
# systemd would mount the boot partition that it was started from at /efi; only relay-disk touches those. And it would
# add to PCR 11 how far a start has come: installers that could seal a key could then not always unseal it.
ALONE = "systemd.gpt_auto=0 systemd.mask=systemd-pcrphase-sysinit.service systemd.mask=systemd-pcrphase.service"
STICK = f"root=PARTLABEL=relay-image rootfstype=squashfs ro relay.live {ALONE}"
COMMAND_LINES = {
    "box": f"root=LABEL=relay-root rw {ALONE} {CONSOLES}",
    # The installer and what it needs, no network and no services: nothing else can fail, or be reached, meanwhile; and
    # systemd does not write over what the installer shows.
    "install": f"{STICK} relay.install systemd.unit=relay-install.service systemd.show_status=error {CONSOLES}",
    "rescue": f"{STICK} relay.rescue {CONSOLES}",
}
# Whose measurements (PCR 11) are signed: the TPM gives the pool's key to these alone. Rescue has a shell for whoever
# stands there, and is not among them.
TRUSTED = ("box", "install")
# ukify signs PCR 11 as it is at moments of a start that systemd tells it; here it is that of the start itself.
MEASURE = """\
#!/bin/sh
exec /usr/lib/systemd/systemd-measure "$@" --phase=:
"""
BUILD = """\
openssl x509 -in /keys/db.crt -pubkey -noout > /work/measure/key.pub
for name in {names}; do
    case " {trusted} " in
    *" $name "*) policy="--tools=/work/measure --pcr-private-key=/keys/db.key \
        --pcr-public-key=/work/measure/key.pub --pcr-banks=sha256" ;;
    *) policy= ;;
    esac
    ukify build --linux=/work/vmlinuz --initrd=/work/initrd --os-release=@/work/os-release --uname={kernel} \
        --cmdline=@/work/$name.cmdline --output=/work/$name.unsigned $policy
    {sign} --output /work/$name.efi /work/$name.unsigned
done
{sign} --output /work/systemd-boot.efi /usr/lib/systemd/boot/efi/systemd-bootx64.efi
"""
# sbsign puts the time into its signature, and only by force the one that all else has.
SIGN = "faketime -f {epoch} sbsign --key /keys/db.key --cert /keys/db.crt"


def make(tools: Path, system: Path, kernel: str, keys: Path, work: Path) -> None:
    """Write ``box.efi``, ``install.efi``, ``rescue.efi`` and ``systemd-boot.efi`` into the work folder, signed."""
    shutil.copy(system / f"boot/vmlinuz-{kernel}", work / "vmlinuz")
    shutil.copy(system / f"boot/initrd.img-{kernel}", work / "initrd")
    shutil.copy(system / "usr/lib/os-release", work / "os-release")
    for name, words in COMMAND_LINES.items():
        (work / f"{name}.cmdline").write_text(words)
    measure = work / "measure/systemd-measure"
    measure.parent.mkdir()
    measure.write_text(MEASURE)
    measure.chmod(0o755)
    moment = datetime.fromtimestamp(EPOCH, timezone.utc).strftime("'%Y-%m-%d %H:%M:%S'")
    tree.enter(tools, BUILD.format(names=" ".join(COMMAND_LINES), trusted=" ".join(TRUSTED), kernel=kernel,
                                   sign=SIGN.format(epoch=moment)), {work: "/work", keys: "/keys"})
