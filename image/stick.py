"""The stick: a GPT disk with an ESP (menu, UKIs, keys, the sites' settings) and the squashfs."""

from __future__ import annotations

from pathlib import Path

from image import tree

MIB = 1 << 20
# Any fixed numbers will do: two sticks are never in one machine for long.
DISK, ESP, IMAGE = (f"3b7c0000-0000-4000-8000-0000000000{number}" for number in (11, 12, 13))
LOADER = """\
timeout 5
default install.conf
editor no
secure-boot-enroll force
"""
ENTRIES = {
    "install": "Install this machine as a relay box (asks nothing, and leaves disks alone that hold anything)",
    "rescue": "Rescue: look at the box in this machine, changing nothing",
}
LEGACY = (b"\r\n  This stick starts machines with UEFI only.\r\n\r\n"
          b"  In the firmware's setup, switch legacy BIOS (CSM) off and UEFI on, then start again.\r\n"
          b"  Nothing on this machine was changed.\r\n\0")
# mformat's own serial number and label are fixed; mtools takes its dates from SOURCE_DATE_EPOCH.
BUILD = """\
sfdisk --quiet /work/stick.img < /work/layout
truncate -s {esp} /work/esp.img
mformat -i /work/esp.img -F -v RELAY -N 3B7C0011 ::
mcopy -i /work/esp.img -s /work/esp/* ::
dd if=/work/esp.img of=/work/stick.img bs=1M seek=1 conv=notrunc,sparse status=none
dd if=/work/root.squashfs of=/work/stick.img bs=1M seek={image} conv=notrunc status=none
"""


def boot_sector() -> bytes:
    """What a BIOS runs: clear the screen, print the message, stop. 440 bytes at most."""
    code = bytes([
        0x31, 0xC0,              # xor ax, ax
        0x8E, 0xD8,              # mov ds, ax
        0xBE, 0x1D, 0x7C,        # mov si, 0x7c1d: the text
        0xFC,                    # cld
        0xB8, 0x03, 0x00,        # mov ax, 3: text mode, 80 by 25
        0xCD, 0x10,              # int 0x10
        0xAC,                    # next: lodsb
        0x84, 0xC0,              # test al, al
        0x74, 0x08,              # jz stop
        0xB4, 0x0E,              # mov ah, 0x0e: teletype
        0x31, 0xDB,              # xor bx, bx
        0xCD, 0x10,              # int 0x10
        0xEB, 0xF3,              # jmp next
        0xF4,                    # stop: hlt
        0xEB, 0xFD,              # jmp stop
    ])
    assert len(code) == 0x1D and len(code + LEGACY) <= 440
    return code + LEGACY


def make(tools: Path, work: Path, keys: Path, parts: dict[str, bytes]) -> Path:
    """Write ``stick.img`` from what the work folder holds; ``parts`` are further files on the ESP by path."""
    esp = work / "esp"
    files = {
        "EFI/BOOT/BOOTX64.EFI": (work / "systemd-boot.efi").read_bytes(),
        "EFI/relay/install.efi": (work / "install.efi").read_bytes(),
        "EFI/relay/rescue.efi": (work / "rescue.efi").read_bytes(),
        "relay/box.efi": (work / "box.efi").read_bytes(),
        "relay/systemd-boot.efi": (work / "systemd-boot.efi").read_bytes(),
        "loader/loader.conf": LOADER.encode(),
        **{f"loader/entries/{name}.conf": f"title {title}\nefi /EFI/relay/{name}.efi\n".encode()
           for name, title in ENTRIES.items()},
        **{f"loader/keys/auto/{name}.auth": (keys / f"{name}.auth").read_bytes() for name in ("PK", "KEK", "db")},
    } | parts
    for name, content in sorted(files.items()):
        (esp / name).parent.mkdir(parents=True, exist_ok=True)
        (esp / name).write_bytes(content)
    # FAT32 needs 33 MiB; an eighth more than the files for an administrator's own notes and the installer's log.
    room = max(64, sum(len(content) for content in files.values()) * 9 // 8 // MIB + 16)
    squashfs = -(-(work / "root.squashfs").stat().st_size // MIB)
    (work / "layout").write_text(
        f"label: gpt\nlabel-id: {DISK}\n"
        f"start={MIB // 512}, size={room * MIB // 512}, type=uefi, name=relay-stick, uuid={ESP}\n"
        f"start={(1 + room) * MIB // 512}, size={squashfs * MIB // 512}, "
        f"type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=relay-image, uuid={IMAGE}\n")
    stick = work / "stick.img"
    with stick.open("wb") as stream:
        stream.truncate((1 + room + squashfs + 1) * MIB)
    tree.enter(tools, BUILD.format(esp=room * MIB, image=1 + room), {work: "/work"})
    with stick.open("r+b") as stream:
        stream.write(boot_sector())
    return stick
