"""Patients and passwords: values planted everywhere, misbehaviour all round, and then a search through what comes out.

Logs go to whoever runs the hospital's log server, and alerts travel as plain e-mail: neither may hold a patient's name.
"""

from __future__ import annotations

import base64
import email
import email.policy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope, Session
from pydicom.dataset import Dataset

from relay_agent.ledger import Stop
from tests import data
from tests.delivery.box import PASSWORD, SOON, USER, Box, archived_files, everything, site, to
from tests.harness import SECRET, running, send, wait_for

BIRTH_DATE = "19700203"
LABEL = "Planted_Name"  # what identification makes of the name where the comments say nothing
# Every planted value holds this word, whatever becomes of the characters around it.
WORD = "planted"
LIMITS = ('destination_down = "1 s"\nheld = "1 s"\nsender = "relay@hospital.example.org"\n'
          'recipients = ["imaging@example.org"]\n')


class Inbox:
    """Keeps what the mail server was given, decoded, headers and all."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def handle_DATA(self, _server: Any, _session: Session, envelope: Envelope) -> str:
        content = envelope.original_content or b""
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.texts.append(f"{content.decode('utf-8', 'replace')}\n{message['Subject']}\n{message.get_content()}")
        return "250 OK"

    def has(self, words: str) -> bool:
        """Whether a message speaks of this."""
        return any(words in text for text in list(self.texts))


class AnyPort(Controller):
    """A mail server on a free port; its own first connection has to know which."""

    def _trigger_server(self) -> None:
        sockets: Any = self.server
        self.port = sockets.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


@contextmanager
def mail_server() -> Iterator[tuple[Inbox, int]]:
    """An inbox and the port of its server."""
    inbox = Inbox()
    controller = AnyPort(inbox, hostname="127.0.0.1", port=0)
    controller.start()  # type: ignore[no-untyped-call]
    try:
        yield inbox, controller.port
    finally:
        controller.stop()  # type: ignore[no-untyped-call]


def changed(images: Sequence[Dataset], folder: Path, old: bytes, new: bytes) -> Path:
    """Files of these images in which a value is another one of the same length."""
    assert len(old) == len(new)
    for path in data.write(list(images), folder):
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
    return folder


def planted_in(text: str) -> list[str]:
    """The lines of a text that hold something of a patient."""
    return [line for line in text.splitlines() if WORD in line.lower() or BIRTH_DATE in line]


def test_no_patient_and_no_secret_comes_out(tmp_path: Path) -> None:
    """At the chattiest log level, with broken files, odd characters, a server that quotes labels, and alerts."""
    assert all(WORD in value.lower() for value in (data.PATIENT_NAME, data.PATIENT_ID, LABEL))
    with mail_server() as (inbox, port), site(tmp_path / "central") as central:
        alert = f'[alert]\nsmtp_host = "127.0.0.1"\nsmtp_port = {port}\n{LIMITS}'
        settings = to(central.url, tmp_path / "box") + everything(project=["P1"]) + alert
        box = Box(tmp_path / "box", settings, stage=SOON, general='log_level = "debug"')
        with running(box):
            central.misbehave("400-wrap")
            # 1: labels from the patient's name and ID, by C-STORE
            good = list(data.study(1, 3, comments="Project:P1"))
            assert set(send(box.port, good)) == {0}
            wait_for(lambda: box.delivery(1), say="the first study is shipment 1")
            # 2: a name that is not in its own character set, and the session label of the first
            undecodable = changed(list(data.study(1, 2, comments="Project:P1", SpecificCharacterSet="ISO_IR 192")),
                                  tmp_path / "undecodable", b"Planted^Name", b"Planted^\xff\xfe\xc3\x28")
            assert box.cli("upload", str(undecodable)).returncode == 0
            # 3: no project, so it is held
            assert set(send(box.port, list(data.study(1, 1, comments=None)))) == {0}
            # Broken: a number that is a name, a file that ends within the header, and one that is no DICOM at all
            number = changed([data.instance(InstanceNumber=2147483647)], tmp_path / "number", b"2147483647",
                             b"Planted^IS")
            box.cli("upload", str(number))
            [whole] = data.write([data.instance()], tmp_path / "whole")
            content = whole.read_bytes()
            cut = tmp_path / "number" / f"{data.PATIENT_NAME}.dcm"
            cut.write_bytes(content[:content.index(data.PATIENT_ID.encode()) + 8])
            box.cli("upload", str(cut))
            landing = box.config.landing / f"{data.PATIENT_NAME} {BIRTH_DATE}"
            landing.mkdir()
            (landing / f"{data.PATIENT_ID}.dcm").write_bytes(cut.read_bytes()[:-2])
            (landing / "letter.txt").write_text(f"{data.PATIENT_NAME}, born {BIRTH_DATE}", encoding="utf-8")
            for condition in ("destination down", "quarantine", "held"):
                wait_for(partial(inbox.has, condition), say=f"a mail about {condition}")
            quotes = f"Session {data.PATIENT_ID} of {LABEL}, {data.PATIENT_NAME}, born {BIRTH_DATE}: conflict"
            conflict = central.misbehave("commit-conflict", message=quotes, times=1)
            central.behave("400-wrap")
            ends = (Stop.VERIFIED, Stop.STOPPED)
            wait_for(lambda: all(box.delivery(number)["state"] in ends for number in (1, 2)), say="both have ended")
            tokens = central.accounts.tokens(USER)
            printed = "".join(box.cli(*command, "--json").stdout for command in (
                ("status",), ("list",), ("list", "--quarantined"), ("show", "1"), ("show", "2"), ("show", "3"),
                ("receipt", "1"), ("receipt", "2"), ("check",)))
            ledger = b"".join(path.read_bytes() for path in box.config.data.glob("ledger.sqlite*"))
            errors = [str(row["error"]) for row in box.ledger.all("SELECT error FROM delivery")]
            quarantined = box.ledger.value("SELECT count(*) FROM instance WHERE problem IS NOT NULL")
        log = box.log

    # What is searched is what it should be: everything happened, and was written about.
    assert quarantined >= 3
    assert conflict.struck == 1
    assert any("the request to archive was answered 409" in error for error in errors)
    assert "delivery put off" in log
    assert '"verified"' in log
    assert '"shipment": 1' in log
    assert "quarantined" in log
    assert '"level": "debug"' in log or '"level": "info"' in log
    assert archived_files(central, data.PATIENT_ID), "no session is named after the patient"
    assert LABEL.encode() in ledger
    assert LABEL in printed
    assert planted_in(f"x\n{data.PATIENT_NAME}") == [data.PATIENT_NAME]
    assert tokens

    assert planted_in(log) == []
    assert [planted_in(text) for text in inbox.texts] == [[]] * len(inbox.texts)
    assert planted_in("\n".join(errors)) == [], "these words go into alerts"
    secrets = [PASSWORD, base64.b64encode(SECRET.encode()).decode()]
    for token in tokens:
        pair = f"{token['alias']}:{token['secret']}"
        secrets += [token["secret"], base64.b64encode(pair.encode()).decode()]
    for secret in secrets:
        assert secret not in log
        assert secret not in printed
        assert secret.encode() not in ledger
        assert not any(secret in text for text in inbox.texts)
