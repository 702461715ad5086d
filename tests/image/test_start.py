"""The stick in a machine: UEFI, with and without Secure Boot, and an old one."""

from __future__ import annotations

from tests.image.vm import VM, stick, wait


def test_old_machine_is_refused_with_words(fast, tmp_path):
    with VM(tmp_path, [stick(fast, tmp_path)], firmware="legacy", tpm=False, memory=256) as vm:
        wait(lambda: "This stick starts machines with UEFI only." in vm.screen(), 60, vm.screen)


def test_starts_the_installer(fast, tmp_path):
    """Nobody touches it: firmware in setup mode takes our keys, starts what we signed, and the kernel knows.

    There is no disk to install to, which the installer says.
    """
    with VM(tmp_path, [stick(fast, tmp_path)]) as vm:
        vm.wait_for("Custom Secure Boot keys successfully enrolled", seconds=30)
        vm.wait_for("UEFI Secure Boot is enabled", seconds=60)
        vm.wait_for("Linux version")
        vm.wait_for("Kernel is locked down from EFI Secure Boot")
        vm.wait_for("this machine has no SSD")
        vm.wait_for("== REFUSED")
