"""Alert: what an operator has to know, told by e-mail once a condition, again while it lasts, and when it is over.

Texts name shipments by number, destinations, AE titles and counts; never a label, which may come from a patient.
"""

from __future__ import annotations

import logging
import os
import smtplib
import socket
import sqlite3
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from itertools import groupby

from relay_agent.config import Alert, Config, ConfigError, secret
from relay_agent.kspace import account
from relay_agent.ledger import Ledger, State, Stop, balance
from relay_agent.spool import Spool
from relay_agent.units import show_duration, show_size

log = logging.getLogger(__name__)

_TIMEOUT = 30.0
_JOIN = 5  # more than this many at once become one message
_NEW, _STILL, _OVER = "", "still: ", "over: "  # kinds of message, as they stand in the subject line
_HYSTERESIS = 1.1  # space that was short is enough again only above this, so that it is not told to and fro


@dataclass(frozen=True, slots=True)
class Condition:
    """Something an operator should know. ``name`` and ``subject`` say which, ``text`` what is so and what to do."""

    name: str
    subject: str
    text: str

    @property
    def title(self) -> str:
        """Name and subject on one line, for a subject line or a log."""
        return " ".join(f"{self.name}: {self.subject}".split())


def conditions(config: Config, ledger: Ledger, spool: Spool, *, tokens: Mapping[str, str] = {},
               extra: Iterable[Condition] = (), now: float) -> list[Condition]:
    """What is wrong at ``now`` (seconds since 1970), by the limits of the configuration's ``alert`` table.

    ``tokens`` maps a destination's name to the words about a token that cannot be renewed. ``extra`` adds what others
    found (missing files, a service that does not run); it has to be given for as long as it lasts.
    """
    limits = _limits(config)
    return [*_deliveries(ledger, limits, now), *_space(config, ledger, spool), *_instances(ledger),
            *_waiting(ledger, limits, now), *_tokens(tokens), *_books(ledger), *_silence(ledger, limits, now),
            *(Condition(*one) for one in account.conditions(config, ledger, now)), *extra]


def _limits(config: Config) -> Alert:
    """The alert table, or its defaults when nobody is to be told: lists and statistics show conditions as well."""
    return config.alert or Alert.model_construct(smtp_host="", sender="", recipients=())


def _deliveries(ledger: Ledger, limits: Alert, now: float) -> Iterator[Condition]:
    rows = ledger.all("SELECT d.* FROM delivery d JOIN shipment s ON s.id = d.shipment WHERE s.state = ? "
                      "ORDER BY d.destination, d.changed", State.READY)
    for name, group in groupby(rows, key=lambda row: str(row["destination"])):
        deliveries = list(group)
        failing = [row for row in deliveries
                   if row["state"] in (Stop.WAITING, Stop.ARRIVED) and row["failing_since"] is not None]
        since = min((row["failing_since"] for row in failing), default=now)
        if now - since > limits.destination_down:
            yield Condition("destination down", name, (
                f"Deliveries to {name} have failed since {_when(since)} ({show_duration(now - since)}); "
                f"{_count(len(failing), 'shipment')} wait. Last error: {failing[-1]['error'] or 'none was noted'}. "
                "The box goes on trying by itself and keeps everything. relay-agent check shows where the way "
                "there breaks; relay-agent retry NUMBER tries a shipment at once."))
        stopped = [row for row in deliveries if row["state"] == Stop.STOPPED]
        if stopped:
            yield Condition("delivery stopped", name, (
                f"Delivery to {name} has stopped for {_numbers([row['shipment'] for row in stopped])}, the first on "
                f"{_when(stopped[0]['changed'])}; only a person can help. Last error: "
                f"{stopped[-1]['error'] or 'none was noted'}. Mend that, then relay-agent retry NUMBER."))


def _space(config: Config, ledger: Ledger, spool: Spool) -> Iterator[Condition]:
    room = os.statvfs(spool.folder)
    free, reserve = room.f_bavail * room.f_frsize, config.receive.reserve
    known = {row["condition"] for row in ledger.all("SELECT condition FROM alert WHERE subject = 'spool'")}
    for name, limit, what in (
            ("space short", 2 * reserve, f"At {show_size(reserve)} the receivers begin to refuse."),
            ("space used up", reserve, "The receivers refuse instances (A700); the scanners keep them.")):
        if free < limit * (_HYSTERESIS if name in known else 1):
            yield Condition(name, "spool", (
                f"{show_size(free)} are free for the spool. {what} relay-agent status shows what cannot leave; "
                "deliver that, shorten purge.retention, or give it more disk."))


def _instances(ledger: Ledger) -> Iterator[Condition]:
    reasons = ledger.all("SELECT problem, count(*) AS number, min(arrived) AS since FROM instance "
                         "WHERE problem IS NOT NULL GROUP BY problem ORDER BY number DESC, problem")
    if reasons:
        listed = "; ".join(f"{row['number']} × {row['problem']}" for row in reasons[:10])
        yield Condition("quarantine", "instances", (
            f"{_count(sum(row['number'] for row in reasons), 'instance')} in quarantine, the first received on "
            f"{_when(min(row['since'] for row in reasons))}: {listed}. They are kept and not delivered; see "
            "relay-agent list --quarantined."))
    rows = ledger.all("SELECT s.id, count(*) AS number, min(i.arrived) AS since FROM instance i JOIN shipment s "
                      "ON s.id = i.shipment WHERE i.conflict IS NOT NULL AND s.state <> ? GROUP BY s.id", State.PURGED)
    if rows:
        yield Condition("conflict", "instances", (
            f"{_count(sum(row['number'] for row in rows), 'instance')} came with the SOP Instance UID of another one "
            f"and other content, the first on {_when(min(row['since'] for row in rows))}, in "
            f"{_numbers([row['id'] for row in rows])}. Both versions are kept; the later one goes as a supplement. "
            "Find out why the sender uses a UID twice before the files are purged; see relay-agent show NUMBER."))


def _waiting(ledger: Ledger, limits: Alert, now: float) -> Iterator[Condition]:
    for state, name, what, verbs in ((State.HELD, "held", "held", "assign, retry or reject"),
                                     (State.REVIEW, "review", "waiting for review", "release or reject"),
                                     (State.DEIDENTIFY, "not de-identified", "not de-identified (see the log of the "
                                      "service)", "reject")):
        rows = ledger.all("SELECT id, changed FROM shipment WHERE state = ? AND changed < ? AND (kind = 'session' OR "
                          "state <> 'held') ORDER BY changed", state, now - limits.held)
        if rows:
            yield Condition(name, "shipments", (
                f"For longer than {show_duration(limits.held)} {what}, the first since {_when(rows[0]['changed'])}: "
                f"{_numbers([row['id'] for row in rows])}. relay-agent show NUMBER says why; then relay-agent {verbs} "
                "NUMBER."))


def _tokens(tokens: Mapping[str, str]) -> Iterator[Condition]:
    for destination, words in tokens.items():
        yield Condition("token", destination, (
            f"{words}. If it expires, deliveries to {destination} fail until somebody writes a valid user:password or "
            "alias:secret into the credential file; relay-agent check tries it."))


def _books(ledger: Ledger) -> Iterator[Condition]:
    total = balance(ledger)
    if total.difference:
        yield Condition("ledger out of balance", "ledger", (
            f"{_count(total.received, 'instance')} received, {abs(total.difference)} "
            f"{'not accounted for' if total.difference > 0 else 'too many accounted for'}. This is a fault of the "
            "agent or of its ledger. Keep the data folder as it is, delete nothing by hand, and report it with the "
            "output of relay-agent status."))


def _silence(ledger: Ledger, limits: Alert, now: float) -> Iterator[Condition]:
    """A box that never received anything counts from the first entry in its audit trail, and is silent without one."""
    since = ledger.value("SELECT arrived FROM instance ORDER BY id DESC LIMIT 1")
    if since is None:
        since = ledger.value("SELECT at FROM event ORDER BY id LIMIT 1")
    if limits.nothing_received is not None and since is not None and now - since > limits.nothing_received:
        yield Condition("nothing received", "receivers", (
            f"Nothing was received since {_when(since)} ({show_duration(now - since)}). Ask whether the scanners send, "
            "and to this box; relay-agent check looks at the receivers' ports."))


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(shipments: Sequence[int]) -> str:
    more = f" and {len(shipments) - 10} more" if len(shipments) > 10 else ""
    return f"shipment{'' if len(shipments) == 1 else 's'} {', '.join(map(str, shipments[:10]))}{more}"


class NotSent(Exception):
    """The mail server did not take the message; the text says why and what to do."""


class Mailer:
    """Sends e-mail as the ``alert`` table says; one connection a message."""

    def __init__(self, config: Alert) -> None:
        self._config = config

    def send(self, subject: str, body: str) -> None:
        """Send one message of plain text to all recipients; :class:`NotSent` when none of them gets it."""
        with self._server() as server:
            message = EmailMessage()
            message["Subject"] = " ".join(subject.split())
            message["From"] = self._config.sender
            message["To"] = ", ".join(self._config.recipients)
            message["Date"] = formatdate()
            message["Message-ID"] = make_msgid(domain=self._config.sender.rpartition("@")[2])
            message["Auto-Submitted"] = "auto-generated"  # keeps out-of-office replies away (RFC 3834)
            message.set_content(body, cte="quoted-printable")
            refused = server.send_message(message)
        if refused:
            log.error("%d of %d recipients of an alert were refused; check alert.recipients", len(refused),
                      len(self._config.recipients))

    def probe(self) -> None:
        """Go all the way to the point of sending; :class:`NotSent` when that fails."""
        with self._server():
            pass

    @contextmanager
    def _server(self) -> Iterator[smtplib.SMTP]:
        try:
            with closing(smtplib.SMTP(self._config.smtp_host, self._config.smtp_port, timeout=_TIMEOUT)) as server:
                server.ehlo_or_helo_if_needed()
                if self._config.starttls:
                    server.starttls(context=ssl.create_default_context())
                if self._config.credential:
                    server.login(*secret(self._config.credential))
                yield server
                with suppress(OSError):  # whatever it says to that, the message was taken
                    server.quit()
        except (OSError, ValueError, ConfigError) as error:  # all that smtplib raises is an OSError
            where = f"{self._config.smtp_host} port {self._config.smtp_port}"
            raise NotSent(f"mail server {where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    match error:
        case ConfigError():
            return str(error)
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({error.verify_message}); add its CA to the system's"
        case smtplib.SMTPAuthenticationError():
            return f"user or password were refused ({error.smtp_code}); correct alert.credential"
        case smtplib.SMTPNotSupportedError():
            return "it does not offer STARTTLS or log-in; correct alert.starttls or alert.credential"
        case smtplib.SMTPRecipientsRefused():
            return "it refused every recipient; correct alert.recipients, or let it relay for this box"
        case smtplib.SMTPSenderRefused():
            return f"it refused the sender ({error.smtp_code}); correct alert.sender, or let it relay for this box"
        case smtplib.SMTPResponseException():
            return f"it answered {error.smtp_code}"
        case socket.gaierror():
            return "the name cannot be resolved; check DNS and alert.smtp_host"
        case ConnectionRefusedError():
            return "nothing listens there; check alert.smtp_host and alert.smtp_port"
        case TimeoutError():
            return f"no answer within {_TIMEOUT:.0f} s; does the firewall let us through?"
        case ValueError():
            return "the message cannot be written; correct alert.sender and alert.recipients"
    return f"the connection broke ({type(error).__name__})"


def tell(config: Config, ledger: Ledger, conditions: Iterable[Condition], mailer: Mailer | None, now: float) -> int:
    """Compare with what was told before and send what is new, due again or over; the number of messages sent.

    To be called about once a minute. At most one message a condition; more than five of a kind in one round are joined.
    What could not be sent goes out in a later round: nothing is raised for it and nothing lost. Without a mailer
    conditions are only noted in the ledger and in the log.
    """
    current = {(condition.name, condition.subject): condition for condition in conditions}
    rows = _note(ledger, current, now)
    lasting = [row for row in rows if _key(row) in current]
    over = [row for row in rows if _key(row) not in current]
    # Nobody heard of it, so nobody has to hear that it is over.
    _remember(ledger, [row for row in over if row["told"] is None or mailer is None], None)
    if mailer is None:
        return 0
    # The absolute value: `told` may lie in the future after a clock was set right.
    again = [row for row in lasting if row["told"] is not None and abs(now - row["told"]) >= _limits(config).reminder]
    sent = 0
    try:
        for kind, which in ((_NEW, [row for row in lasting if row["told"] is None]), (_STILL, again),
                            (_OVER, [row for row in over if row["told"] is not None])):
            for group in [which] if len(which) > _JOIN else [[row] for row in which]:
                mailer.send(*_message(config, kind, group, now))
                sent += 1
                _remember(ledger, group, None if kind == _OVER else now)
    except NotSent as error:
        log.error("an alert could not be sent and is tried again: %s", error)
    return sent


def _key(row: sqlite3.Row) -> tuple[str, str]:
    return row["condition"], row["subject"]


def _note(ledger: Ledger, current: Mapping[tuple[str, str], Condition], now: float) -> list[sqlite3.Row]:
    """Enter what is new and the latest texts; all rows of the table, those included that are over."""
    with ledger.write() as connection:
        known = {_key(row) for row in connection.execute("SELECT * FROM alert")}
        for key, condition in current.items():
            if key not in known:
                log.warning("%s", condition.title, extra={"text": condition.text})
            connection.execute(
                "INSERT INTO alert (condition, subject, since, text) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                "SET text = excluded.text WHERE text <> excluded.text", (*key, now, condition.text))
        return connection.execute("SELECT * FROM alert ORDER BY since, condition, subject").fetchall()


def _remember(ledger: Ledger, rows: Sequence[sqlite3.Row], told: float | None) -> None:
    """Note when these were told; None forgets them, because they are over."""
    with ledger.write() as connection:
        for row in rows:
            if told is None:
                connection.execute("DELETE FROM alert WHERE condition = ? AND subject = ?", _key(row))
            else:
                connection.execute("UPDATE alert SET told = ? WHERE condition = ? AND subject = ?", (told, *_key(row)))


def _message(config: Config, kind: str, rows: Sequence[sqlite3.Row], now: float) -> tuple[str, str]:
    """Subject and body of a message about one condition, or about many of the same kind."""
    titles = [Condition(*_key(row), "").title for row in rows]
    subject = f"[{config.name}] {kind}{titles[0] if len(rows) == 1 else f'{len(rows)} conditions'}"
    if kind == _OVER:
        texts = [f"{title} is over. It lasted from {_when(row['since'])} for {show_duration(now - row['since'])}."
                 for title, row in zip(titles, rows, strict=True)]
    else:
        texts = [f"{title} (noticed {_when(row['since'])})\n{row['text']}"
                 for title, row in zip(titles, rows, strict=True)]
        texts.append(f"This is told again every {show_duration(_limits(config).reminder)}, and once when it is over.")
    return subject, "\n\n".join(texts) + "\n"
