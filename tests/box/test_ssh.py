from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def settings(host) -> dict[str, str]:
    """What sshd really goes by, whatever files there are."""
    return dict(line.partition(" ")[::2] for line in host.check_output("sshd -T").splitlines())


@pytest.mark.parametrize(("key", "value"), [
    ("permitrootlogin", "no"),  # who did it would not be known
    ("passwordauthentication", "no"), ("kbdinteractiveauthentication", "no"),  # can be guessed
    ("authenticationmethods", "publickey"),
    ("disableforwarding", "yes"),  # the box would be a bridge into the hospital's network
    ("permituserenvironment", "no"), ("permituserrc", "no"),
])
def test_setting(settings, key, value):
    """Keys of named people are the only way in, and lead nowhere else."""
    assert settings[key] == value


def test_keys_belong_to_root(host, settings):
    """Whoever got in for a moment cannot leave a key behind."""
    assert settings["authorizedkeysfile"] == "/etc/ssh/authorized_keys.d/%u"
    for name in ("/etc/ssh/authorized_keys.d", *host.check_output("find /etc/ssh/authorized_keys.d -type f").split()):
        assert host.file(name).user == "root"
        assert not host.file(name).mode & 0o022


def test_accounts_are_named_ones(host):
    """Everybody who may log in is in the inventory, and nobody else has a key here."""
    allowed = {line.split()[1] for line in host.check_output("sshd -T").splitlines() if line.startswith("allowusers ")}
    assert set(host.file("/etc/ssh/authorized_keys.d").listdir()) == allowed - {"relay-share"}  # its keys open a folder


@pytest.mark.parametrize(("kind", "weak"), [
    ("ciphers", "cbc"), ("macs", "sha1"), ("kexalgorithms", "group14"), ("hostkeyalgorithms", "ecdsa"),
])
def test_no_weak_algorithms(settings, kind, weak):
    """What is broken or nearly so is not offered."""
    assert weak not in settings[kind]


def test_no_change_waits_to_be_taken_back(host):
    """The guard against lock-out would undo, at its time or at the next start, what everybody relies on by now."""
    assert not host.file("/var/lib/box-guard").exists or host.file("/var/lib/box-guard").listdir() == []
