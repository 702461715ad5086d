"""Alerts: what becomes a condition, and what operators get by a real mail server."""

from __future__ import annotations

import asyncio
import email
import logging
import os
import socket
import ssl
import time
from collections import namedtuple
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, Session

from relay_agent.alert import Condition, Mailer, NotSent, conditions, tell
from relay_agent.config import Alert, Config
from relay_agent.ledger import Ledger, State, Stop
from relay_agent.spool import Spool

NOW = time.time()
HOUR, DAY = 3600.0, 86400.0


class Inbox:
    """What a mail server does with messages: keeps them, or refuses."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.envelopes: list[Envelope] = []
        self.answer = "250 OK"
        self.refused: set[str] = set()

    async def handle_RCPT(self, server: Any, session: Session, envelope: Envelope, address: str, options: Any) -> str:
        if address in self.refused:
            return "550 nobody of that name"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        if self.answer.startswith("250"):
            self.messages.append(email.message_from_bytes(envelope.original_content or b""))
            self.envelopes.append(envelope)
        return self.answer

    @property
    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.messages]

    def text(self, number: int = -1) -> str:
        payload = self.messages[number].get_payload(decode=True)
        assert isinstance(payload, bytes)
        return payload.decode()


class AnyPort(Controller):
    """A controller that takes a free port; its own first connection has to know which."""

    def _trigger_server(self) -> None:
        self.port = port(self)
        super()._trigger_server()  # type: ignore[no-untyped-call]


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def server(inbox: Inbox) -> Iterator[Controller]:
    controller = AnyPort(inbox, hostname="127.0.0.1", port=0)
    controller.start()
    yield controller
    controller.stop()


def port(controller: Controller) -> int:
    assert isinstance(controller.server, asyncio.Server)
    return int(controller.server.sockets[0].getsockname()[1])


def alert(smtp_port: int = 25, **more: Any) -> dict[str, Any]:
    return {"smtp_host": "127.0.0.1", "smtp_port": smtp_port, "sender": "relay@hospital.example",
            "recipients": ["a@hospital.example", "b@hospital.example"], **more}


def configure(folder: Path, table: dict[str, Any] | None) -> Config:
    return Config.model_validate({
        "name": "relay-0001", "data": folder, "receive": {"reserve": "1 kB"}, "alert": table,
        "receiver": [{"ae_title": "RELAY", "allow": ["MR1"]}],
        "destination": [{"name": "central", "url": "https://xnat.example.org"}]})


@pytest.fixture
def config(tmp_path: Path, server: Controller) -> Config:
    return configure(tmp_path, alert(port(server)))


@pytest.fixture
def mailer(config: Config) -> Mailer:
    assert config.alert is not None
    return Mailer(config.alert)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", 1000)


class Filler:
    """Puts rows into a ledger as the other modules do."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._count = 0

    def shipment(self, state: State, changed: float = NOW, **more: Any) -> int:
        self._count += 1
        with self.ledger.write() as connection:
            number = connection.execute(
                "INSERT INTO shipment (study_uid, receiver, supplement, state, opened, last_arrival, changed, reason, "
                "project, subject, session) VALUES (?, 'RELAY', 0, ?, ?, ?, ?, ?, 'PLANTEDP', 'PLANTEDS', 'PLANTEDE')",
                (f"1.2.{self._count}", state, changed, changed, changed, more.get("reason"))).lastrowid
        assert number is not None
        return number

    def instance(self, shipment: int | None = None, arrived: float = NOW, problem: str | None = None,
                 conflict: int | None = None) -> int:
        self._count += 1
        with self.ledger.write() as connection:
            number = connection.execute(
                "INSERT INTO instance (receiver, sop_instance, sop_class, transfer_syntax, digest, size, path, via, "
                "calling_ae, arrived, problem) VALUES ('RELAY', ?, '1.2', '1.2', ?, 10, ?, 'association', 'MR1', ?, ?)",
                (f"1.3.{self._count}", os.urandom(32), f"RELAY/{self._count}", arrived, problem)).lastrowid
            connection.execute("UPDATE instance SET shipment = ?, conflict = ? WHERE id = ?",
                               (shipment, conflict, number))
        assert number is not None
        return number

    def delivery(self, shipment: int, state: Stop, error: str | None = None, failing_since: float | None = None,
                 changed: float = NOW, destination: str = "central") -> None:
        with self.ledger.write() as connection:
            connection.execute(
                "INSERT INTO delivery (shipment, destination, state, error, failing_since, changed) VALUES "
                "(?, ?, ?, ?, ?, ?)", (shipment, destination, state, error, failing_since, changed))


@pytest.fixture
def fill(ledger: Ledger) -> Filler:
    return Filler(ledger)


def found(config: Config, ledger: Ledger, spool: Spool, **more: Any) -> dict[tuple[str, str], str]:
    return {(c.name, c.subject): c.text for c in conditions(config, ledger, spool, **{"now": NOW, **more})}


def test_nothing_is_wrong_with_a_new_box(config: Config, ledger: Ledger, spool: Spool) -> None:
    assert found(config, ledger, spool) == {}


def test_destination_down_counts_and_quotes_the_latest_error(config: Config, ledger: Ledger, spool: Spool,
                                                             fill: Filler) -> None:
    for age, error, changed in ((2 * HOUR, "the old error", NOW - HOUR), (HOUR / 2, "the new error", NOW)):
        shipment = fill.shipment(State.READY)
        fill.instance(shipment)
        fill.delivery(shipment, Stop.WAITING, error, NOW - age, changed)
    fill.delivery(fill.shipment(State.READY), Stop.WAITING)  # never tried: not counted
    fill.delivery(fill.shipment(State.READY), Stop.VERIFIED, "over", NOW - DAY, destination="other")
    fill.delivery(fill.shipment(State.REJECTED), Stop.WAITING, "given up", NOW - DAY, destination="third")
    text = found(config, ledger, spool)
    assert list(text) == [("destination down", "central")]
    assert "2 shipments wait" in text["destination down", "central"]
    assert "the new error" in text["destination down", "central"]
    assert "(2 h)" in text["destination down", "central"]
    assert "relay-agent retry" in text["destination down", "central"]


def test_a_destination_may_fail_for_a_while(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    fill.delivery(fill.shipment(State.READY), Stop.WAITING, "it", NOW - HOUR + 5)
    assert found(config, ledger, spool) == {}
    assert ("destination down", "central") in found(config, ledger, spool, now=NOW + 6)


def test_stopped_deliveries_name_their_shipments(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    shipments = [fill.shipment(State.READY) for _ in range(12)]
    for shipment in shipments:
        fill.delivery(shipment, Stop.STOPPED, "the archive has other bytes")
    text = found(config, ledger, spool)["delivery stopped", "central"]
    assert f"shipments {', '.join(map(str, shipments[:10]))} and 2 more" in text
    assert "the archive has other bytes" in text


Room = namedtuple("Room", "f_bavail f_frsize")


def test_space_is_told_in_two_steps_and_not_to_and_fro(config: Config, ledger: Ledger, spool: Spool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def at(free: int) -> set[str]:
        monkeypatch.setattr(os, "statvfs", lambda _: Room(free, 1))
        present = conditions(config, ledger, spool, now=NOW)
        tell(config, ledger, present, None, NOW)
        return {condition.name for condition in present}

    assert at(2000) == set()
    assert at(1999) == {"space short"}
    assert at(2001) == {"space short"}
    assert at(999) == {"space short", "space used up"}
    assert at(1050) == {"space short", "space used up"}
    assert at(1150) == {"space short"}
    assert at(2200) == set()
    assert at(2001) == set()


def test_quarantine_is_counted_by_reason(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    for problem in ("no DICOM", "no DICOM", "a DICOMDIR", None):
        fill.instance(problem=problem)
    text = found(config, ledger, spool)
    assert list(text) == [("quarantine", "instances")]
    assert text["quarantine", "instances"].startswith("3 instances in quarantine")
    assert "2 × no DICOM; 1 × a DICOMDIR" in text["quarantine", "instances"]


def test_conflict_lasts_until_the_files_are_purged(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    shipment = fill.shipment(State.DELIVERED)
    fill.instance(shipment, conflict=fill.instance(shipment))
    text = found(config, ledger, spool)["conflict", "instances"]
    assert text.startswith("1 instance came")
    assert f"in shipment {shipment}. " in text
    with ledger.write() as connection:
        connection.execute("UPDATE shipment SET state = 'purged'")
    assert found(config, ledger, spool) == {}


@pytest.mark.parametrize(("state", "name"), [(State.HELD, "held"), (State.REVIEW, "review"),
                                             (State.DEIDENTIFY, "not de-identified")])
def test_sessions_that_wait_for_a_person(config: Config, ledger: Ledger, spool: Spool, fill: Filler, state: State,
                                         name: str) -> None:
    fill.shipment(state, NOW - DAY + 5, reason="PLANTEDR")
    assert found(config, ledger, spool) == {}
    old = fill.shipment(state, NOW - DAY - 5, reason="PLANTEDR")
    text = found(config, ledger, spool)
    assert list(text) == [(name, "shipments")]
    assert f": shipment {old}. " in text[name, "shipments"]


def test_tokens_and_what_others_found(config: Config, ledger: Ledger, spool: Spool) -> None:
    extra = Condition("files missing", "spool", "3 files are not there")
    text = found(config, ledger, spool, tokens={"central": "it expires in 20 h"}, extra=[extra])
    assert list(text) == [("token", "central"), ("files missing", "spool")]
    assert text["token", "central"].startswith("it expires in 20 h. ")


def test_ledger_out_of_balance(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    fill.instance(fill.shipment(State.GATHERING))
    assert found(config, ledger, spool) == {}
    with ledger.write() as connection:
        connection.execute("UPDATE tally SET value = value + 2 WHERE name = 'received'")
    text = found(config, ledger, spool)["ledger out of balance", "ledger"]
    assert text.startswith("3 instances received, 2 not accounted for")


def test_nothing_received(tmp_path: Path, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    config = configure(tmp_path, alert(nothing_received="3 d"))
    silent = ("nothing received", "receivers")
    assert found(config, ledger, spool) == {}  # never received, and no trace of a start
    with ledger.write() as connection:
        connection.execute("INSERT INTO event (at, actor, what) VALUES (?, 'agent', 'started')", (NOW - 4 * DAY,))
    assert silent in found(config, ledger, spool)
    fill.instance(arrived=NOW - 2 * DAY)
    assert found(config, ledger, spool) == {}
    assert silent in found(config, ledger, spool, now=NOW + DAY + 5)
    assert found(configure(tmp_path, alert()), ledger, spool, now=NOW + 100 * DAY) == {}  # not asked for


def test_no_label_gets_into_a_condition(config: Config, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    for state in (State.HELD, State.REVIEW, State.READY):
        shipment = fill.shipment(state, NOW - 2 * DAY, reason="PLANTEDR")
        fill.instance(shipment, conflict=1)
    fill.delivery(shipment, Stop.STOPPED, "refused")
    fill.instance(problem="no DICOM")
    present = conditions(config, ledger, spool, now=NOW)
    assert {"held", "review", "delivery stopped", "conflict", "quarantine"} == {c.name for c in present}
    assert "PLANTED" not in repr(present)


def test_limits_have_defaults(tmp_path: Path, ledger: Ledger, spool: Spool, fill: Filler) -> None:
    fill.shipment(State.HELD, NOW - 2 * DAY)
    assert ("held", "shipments") in found(configure(tmp_path, None), ledger, spool)


DOWN = Condition("destination down", "central", "It is down since noon – 1 shipment waits.")


def test_a_condition_is_told_once_then_reminded_then_over(config: Config, ledger: Ledger, mailer: Mailer,
                                                          inbox: Inbox) -> None:
    assert tell(config, ledger, [DOWN], mailer, NOW) == 1
    assert tell(config, ledger, [DOWN], mailer, NOW + 60) == 0
    later = Condition(DOWN.name, DOWN.subject, "2 shipments wait.")
    assert tell(config, ledger, [later], mailer, NOW + DAY - 1) == 0
    assert tell(config, ledger, [later], mailer, NOW + DAY) == 1
    assert tell(config, ledger, [later], mailer, NOW + DAY + 1) == 0
    assert tell(config, ledger, [], mailer, NOW + DAY + HOUR) == 1
    assert tell(config, ledger, [], mailer, NOW + DAY + 2 * HOUR) == 0
    assert inbox.subjects == ["[relay-0001] destination down: central", "[relay-0001] still: destination down: central",
                              "[relay-0001] over: destination down: central"]
    assert DOWN.text in inbox.text(0)
    assert later.text in inbox.text(1)
    assert "for 1 d 1 h" in inbox.text(2)
    assert ledger.all("SELECT * FROM alert") == []


def test_the_message_is_well_formed(config: Config, ledger: Ledger, mailer: Mailer, inbox: Inbox) -> None:
    tell(config, ledger, [DOWN], mailer, NOW)
    message = inbox.messages[0]
    assert message["From"] == "relay@hospital.example"
    assert message["To"] == "a@hospital.example, b@hospital.example"
    assert inbox.envelopes[0].rcpt_tos == ["a@hospital.example", "b@hospital.example"]
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"].endswith("@hospital.example>")
    assert email.utils.parsedate_to_datetime(message["Date"]).timestamp() == pytest.approx(time.time(), abs=60)


def test_a_line_break_in_a_subject_makes_no_header(mailer: Mailer, inbox: Inbox) -> None:
    mailer.send("one\r\nBcc: two@hospital.example", "body")
    assert inbox.subjects == ["one Bcc: two@hospital.example"]
    assert inbox.messages[0]["Bcc"] is None


def test_many_at_once_are_one_message(config: Config, ledger: Ledger, mailer: Mailer, inbox: Inbox) -> None:
    five = [Condition("token", f"d{number}", f"text {number}") for number in range(5)]
    assert tell(config, ledger, five, mailer, NOW) == 5
    six = [Condition("held", f"s{number}", f"held {number}") for number in range(6)]
    assert tell(config, ledger, [*five, *six], mailer, NOW + 1) == 1
    assert inbox.subjects[-1] == "[relay-0001] 6 conditions"
    assert all(f"held {number}" in inbox.text() for number in range(6))
    assert "text 0" not in inbox.text()
    assert tell(config, ledger, [*five, *six], mailer, NOW + 2) == 0
    assert tell(config, ledger, [], mailer, NOW + 3) == 1
    assert inbox.subjects[-1] == "[relay-0001] over: 11 conditions"


@pytest.mark.parametrize("trouble", ["450 try later", "554 no"])
def test_what_the_server_refuses_is_told_later(config: Config, ledger: Ledger, mailer: Mailer, inbox: Inbox,
                                               caplog: pytest.LogCaptureFixture, trouble: str) -> None:
    inbox.answer = trouble
    assert tell(config, ledger, [DOWN], mailer, NOW) == 0
    assert f"it answered {trouble[:3]}" in caplog.text
    inbox.answer = "250 OK"
    assert tell(config, ledger, [DOWN], mailer, NOW + 60) == 1
    inbox.answer = trouble
    assert tell(config, ledger, [], mailer, NOW + 120) == 0
    inbox.answer = "250 OK"
    assert tell(config, ledger, [], mailer, NOW + 180) == 1
    assert inbox.subjects == ["[relay-0001] destination down: central", "[relay-0001] over: destination down: central"]


def test_nobody_hears_that_something_is_over_that_nobody_heard_of(config: Config, ledger: Ledger, mailer: Mailer,
                                                                  inbox: Inbox) -> None:
    inbox.answer = "450 try later"
    tell(config, ledger, [DOWN], mailer, NOW)
    inbox.answer = "250 OK"
    assert tell(config, ledger, [], mailer, NOW + 60) == 0
    assert ledger.all("SELECT * FROM alert") == []


def test_no_server_is_no_exception(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:  # bound and never listening: nobody else can take its port
        closed.bind(("127.0.0.1", 0))
        config = configure(tmp_path, alert(closed.getsockname()[1]))
        assert config.alert is not None
        assert tell(config, ledger, [DOWN], Mailer(config.alert), NOW) == 0
    assert "nothing listens there" in caplog.text
    assert ledger.value("SELECT told FROM alert") is None


def test_a_refused_recipient_does_not_keep_it_from_the_others(config: Config, ledger: Ledger, mailer: Mailer,
                                                              inbox: Inbox, caplog: pytest.LogCaptureFixture) -> None:
    inbox.refused = {"a@hospital.example"}
    assert tell(config, ledger, [DOWN], mailer, NOW) == 1
    assert "1 of 2 recipients" in caplog.text
    inbox.refused = {"a@hospital.example", "b@hospital.example"}
    with pytest.raises(NotSent, match="refused every recipient"):
        mailer.send("subject", "body")


def test_a_clock_that_was_set_back_does_not_silence_reminders(config: Config, ledger: Ledger, mailer: Mailer,
                                                              inbox: Inbox) -> None:
    tell(config, ledger, [DOWN], mailer, NOW + 400 * DAY)
    assert tell(config, ledger, [DOWN], mailer, NOW) == 1


def test_without_a_mailer_it_is_noted(config: Config, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert tell(config, ledger, [DOWN], None, NOW) == 0
    assert tell(config, ledger, [DOWN], None, NOW + 1) == 0
    assert ledger.value("SELECT text FROM alert") == DOWN.text
    assert [record.getMessage() for record in caplog.records] == ["destination down: central"]
    tell(config, ledger, [], None, NOW + 2)
    assert ledger.all("SELECT * FROM alert") == []


class Guarded:
    """A mail server with STARTTLS and log-in, both required."""

    def __init__(self, inbox: Inbox, folder: Path) -> None:
        authority = trustme.CA()
        self.trust = folder / "mail-ca.pem"
        authority.cert_pem.write_to_path(str(self.trust))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self.controller = AnyPort(
            inbox, hostname="127.0.0.1", port=0, tls_context=context, require_starttls=True, auth_required=True,
            authenticator=lambda server, session, envelope, mechanism, data: AuthResult(
                success=(data.login, data.password) == (b"relay", b"right"), handled=False))


@pytest.fixture
def guarded(inbox: Inbox, tmp_path: Path) -> Iterator[Guarded]:
    server = Guarded(inbox, tmp_path)
    server.controller.start()
    yield server
    server.controller.stop()


def sender(server: Guarded, tmp_path: Path, password: str, starttls: bool = True) -> Mailer:
    credential = tmp_path / "smtp"
    credential.write_text(f"relay:{password}\n")
    return Mailer(Alert.model_validate(alert(port(server.controller), starttls=starttls, credential=str(credential))))


def test_starttls_and_log_in(guarded: Guarded, inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(guarded.trust))
    sender(guarded, tmp_path, "right").send("subject", "body")
    assert inbox.subjects == ["subject"]
    with pytest.raises(NotSent, match="user or password were refused") as raised:
        sender(guarded, tmp_path, "wrongpass").send("subject", "body")
    assert "wrongpass" not in str(raised.value)
    with pytest.raises(NotSent, match=r"credential .* cannot be read"):
        mailer = sender(guarded, tmp_path, "right")
        (tmp_path / "smtp").unlink()
        mailer.send("subject", "body")
    assert len(inbox.messages) == 1


def test_an_untrusted_mail_server_gets_nothing(guarded: Guarded, inbox: Inbox, tmp_path: Path) -> None:
    with pytest.raises(NotSent, match="its certificate is not trusted"):
        sender(guarded, tmp_path, "right").send("subject", "body")
    assert inbox.messages == []


def test_a_server_without_starttls_gets_nothing(server: Controller, inbox: Inbox) -> None:
    mailer = Mailer(Alert.model_validate(alert(port(server), starttls=True)))
    with pytest.raises(NotSent, match="does not offer STARTTLS"):
        mailer.probe()
    with pytest.raises(NotSent, match="does not offer STARTTLS"):
        mailer.send("subject", "body")
    assert inbox.messages == []
