"""The key of the pool: 32 random bytes, sealed to this machine's TPM, and once more for the coordinating site."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from relay_disk.run import Failed, Refused, ask, do, log

NAME = "relay-pool"
# A box whose site's file says that it needs no TPM has its key here, in the open, on the OS disk.
OPEN_KEY = Path("/etc/relay-disk/pool.key")
_LOCKOUT = "0x00000921"  # TPM_RC_LOCKOUT
_SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")


def new() -> bytes:
    """A new key."""
    return os.urandom(32)


def seal(key: bytes) -> str:
    """The key as only this machine's TPM gives it back, while its Secure Boot state (PCR 7) is as now.

    And to a system alone whose measurements (PCR 11) are signed by the key of the UKI that runs now: boxes and
    installers of one fleet, of this version and of others.
    """
    return "".join(_creds("encrypt", "--with-key=tpm2-with-public-key", "--tpm2-pcrs=7", given=key).split())


def unseal(sealed: str) -> bytes:
    """The key; :class:`Failed` where the TPM does not give it back."""
    return bytes.fromhex(_creds("decrypt", "--newline=no", "--transcode=hex", given=sealed.encode()))


def _creds(verb: str, *options: str, given: bytes) -> str:
    """Ask the TPM, by systemd-creds; once more where it answers nobody for now.

    A TPM counts a power cut as a guess at a password, and after some it is locked out, for an hour or a day. The key
    has no password, so nothing is given up when the count begins anew.
    """
    words = ("systemd-creds", verb, f"--name={NAME}", *options, "-", "-")
    try:
        return ask(*words, given=given)
    except Failed as error:
        if _LOCKOUT not in str(error):
            raise
    log.info("the TPM is locked out, as it is after several power cuts")
    do("tpm2_dictionarylockout", "--clear-lockout")
    return ask(*words, given=given)


def prove_tpm() -> None:
    """Seal and unseal something; a TPM that is there but does not work would lock the box at its first start."""
    sample = new()
    try:
        sealed = seal(sample)
    except Failed as error:
        raise Refused("no disk was changed: this machine has no TPM 2.0 that works; look in its firmware setup (PTT, "
                      f"fTPM, Security Device). A site may allow boxes without: tpm = optional. ({error})") from None
    if unseal(sealed) != sample:
        raise Refused("no disk was changed: the TPM does not give back what was sealed")


def secure_boot() -> bool:
    """Whether the firmware checks signatures of what it starts."""
    return _SECURE_BOOT.exists() and _SECURE_BOOT.read_bytes()[-1] == 1


def binding() -> str:
    """What the sealed key is bound to, in words."""
    if secure_boot():
        return "this machine's TPM, its Secure Boot keys (PCR 7), and boxes and installers signed by them (PCR 11)"
    return ("this machine's TPM; Secure Boot is off, so whoever has the whole box can start any system on it and get "
            "the key. Turn it on, then: relay-disk seal")


def recovery(key: bytes, recipients: tuple[str, ...]) -> str:
    """The key for people: its hexadecimal digits, encrypted by age to the recipients, as text."""
    options = [word for recipient in recipients for word in ("--recipient", recipient)]
    return ask("age", "--encrypt", "--armor", *options, given=(words(key) + "\n").encode())


def words(key: bytes) -> str:
    """A key as people can type it: eight groups of eight hexadecimal digits."""
    digits = key.hex()
    return "-".join(digits[place:place + 8] for place in range(0, 64, 8))


def parse(text: str) -> bytes:
    """The key from what a person gave; spaces and dashes do not matter."""
    digits = "".join(character for character in text if not character.isspace() and character != "-")
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise Failed("that is no recovery key: 64 hexadecimal digits are needed, as `age --decrypt` shows them")
    return key


def packed(text: str) -> str:
    """Text as the value of a ZFS property."""
    return base64.b64encode(text.encode()).decode()


def unpacked(value: str) -> str:
    """The text again."""
    return base64.b64decode(value).decode()
