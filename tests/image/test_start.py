"""The stick in a machine: UEFI, with and without Secure Boot, and an old one."""

from __future__ import annotations

import pytest

from tests.image.vm import VM, stick, wait


def test_old_machine_is_refused_with_words(fast, tmp_path):
    with VM(tmp_path, [stick(fast, tmp_path)], firmware="legacy", tpm=False, memory=256) as vm:
        wait(lambda: "This stick starts machines with UEFI only." in vm.screen(), 60, vm.screen)


def test_starts_the_installer(fast, tmp_path):
    """Without anybody touching it."""
    with VM(tmp_path, [stick(fast, tmp_path)]) as vm:
        vm.wait_for("Linux version")
        vm.wait_for("relay-disk", "relay-install", seconds=120)


@pytest.mark.full
def test_secure_boot(fast, tmp_path):
    """Firmware in setup mode takes our keys; from then on it starts what we signed, and the kernel loads our ZFS."""
    with VM(tmp_path, [stick(fast, tmp_path)], firmware="secure") as vm:
        vm.wait_for("Linux version", seconds=240)
        vm.wait_for("Secure boot enabled", seconds=60)
