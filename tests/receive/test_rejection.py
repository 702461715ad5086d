"""Who may not call is told so at association, with the reason of PS3.8 table 9-21, and never accepted and dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import data, peers
from tests.harness import Agent, running, wait_for
from tests.receive import proof, scu

ALLOWED = {
    "TITLES": '["MR1", "CT SCAN"]',
    "NETS": '["127.0.0.8/30", "10.0.0.0/8"]',
    "HOST": '["127.0.0.21"]',
    "PAIRS": '["MR1@127.0.0.12/30", "CT1@127.0.0.20"]',
    "MIXED": '["MR1@127.0.0.12/30", "127.0.0.20", "US1"]',
    "ANYAT": '["*@127.0.0.30"]',
    "NOBODY": "[]",
}
CALLING_UNKNOWN, CALLED_UNKNOWN, CONTEXT_UNKNOWN = (1, 1, 3), (1, 1, 7), (1, 1, 2)
VERSION_UNKNOWN, LIMIT_EXCEEDED = (1, 2, 2), (2, 3, 2)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Receivers with allow lists of each kind."""
    tables = [f'[[receiver]]\nae_title = "{title}"\naddress = "127.0.0.1"\nport = 0\nallow = {allow}'
              for title, allow in ALLOWED.items()]
    tables = [table.replace('"127.0.0.1"', '"0.0.0.0"') for table in tables]
    tables.append('[[receiver]]\nae_title = "FEW"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]\n'
                  'max_associations = 2')
    tables.append('[[receiver]]\nae_title = "SIX"\naddress = "::1"\nport = 0\nallow = ["MR6@::1", "fe80::/10"]')
    with running(Agent(tmp_path_factory.mktemp("strict"), receivers="\n".join(tables)), "receive") as agent:
        yield agent


def answer(agent: Agent, receiver: str, *, source: str = "", host: str = "127.0.0.1", **request: object
           ) -> tuple[int, int, int] | None:
    """(result, source, reason) of the rejection, or None for an acceptance; nothing else may be on the wire."""
    with scu.SCU(agent.ports[receiver], host=host, source=source) as peer:
        peer.send(scu.associate_rq(**{"called": receiver} | request))  # type: ignore[arg-type]
        first = peer.read()
        assert first is not None
        if first[0] == scu.AC:
            return None
        assert first[0] == scu.RJ and len(first[1]) == 4 and first[1][0] == 0
        assert peer.read() is None, "a rejected association must be closed"
        return first[1][1], first[1][2], first[1][3]


CALLS = [  # receiver, calling AE, from, rejection
    ("TITLES", "MR1", "127.0.0.1", None), ("TITLES", "CT SCAN", "127.0.0.9", None),
    ("TITLES", "MR2", "127.0.0.1", CALLING_UNKNOWN), ("TITLES", "mr1", "127.0.0.1", CALLING_UNKNOWN),
    ("TITLES", "MR", "127.0.0.1", CALLING_UNKNOWN), ("TITLES", "MR11", "127.0.0.1", CALLING_UNKNOWN),
    ("TITLES", "*", "127.0.0.1", CALLING_UNKNOWN),
    ("NETS", "WHOEVER", "127.0.0.8", None), ("NETS", "WHOEVER", "127.0.0.11", None),
    ("NETS", "WHOEVER", "127.0.0.12", CALLING_UNKNOWN), ("NETS", "WHOEVER", "127.0.0.7", CALLING_UNKNOWN),
    ("HOST", "WHOEVER", "127.0.0.21", None), ("HOST", "WHOEVER", "127.0.0.20", CALLING_UNKNOWN),
    ("PAIRS", "MR1", "127.0.0.12", None), ("PAIRS", "CT1", "127.0.0.20", None),
    ("PAIRS", "MR1", "127.0.0.20", CALLING_UNKNOWN), ("PAIRS", "CT1", "127.0.0.12", CALLING_UNKNOWN),
    ("MIXED", "MR1", "127.0.0.1", CALLING_UNKNOWN), ("MIXED", "XX", "127.0.0.20", None),
    ("MIXED", "US1", "127.0.0.1", None),
    ("ANYAT", "WHOEVER", "127.0.0.30", None), ("ANYAT", "WHOEVER", "127.0.0.31", CALLING_UNKNOWN),
    ("NOBODY", "MR1", "127.0.0.1", CALLING_UNKNOWN),
]


@pytest.mark.parametrize(("receiver", "calling", "source", "rejection"), CALLS)
def test_allow_lists(strict: Agent, receiver: str, calling: str, source: str,
                     rejection: tuple[int, int, int] | None) -> None:
    """Titles, networks, pairs of both: who is on the list is let in, everybody else gets 1/1/3."""
    assert answer(strict, receiver, calling=calling, source=source) == rejection


def test_called_title_unknown(strict: Agent) -> None:
    """A typo at the scanner: 1/1/7, also when the title exists on another port; the caller is not told who may."""
    for called in ("NOSUCH", "titles", "NETS"):
        assert answer(strict, "TITLES", called=called, calling="MR1") == CALLED_UNKNOWN
        assert answer(strict, "TITLES", called=called, calling="STRANGER") == CALLED_UNKNOWN


def test_the_log_says_who_called_whom(strict: Agent) -> None:
    """Enough to mend it at the scanner or in the list; a title that is none is empty there."""
    assert answer(strict, "TITLES", called="NOSUCH", calling="MR 1") == CALLED_UNKNOWN
    assert answer(strict, "TITLES", calling="A\nB") == CALLING_UNKNOWN

    def told() -> bool:
        lines = [json.loads(line) for line in strict.log.splitlines() if "association rejected" in line]
        calls = {(line["peer"], line["calling_ae"], line["called_ae"]) for line in lines}
        return calls >= {("127.0.0.1", "MR 1", "NOSUCH"), ("127.0.0.1", "", "TITLES")}

    wait_for(told, say=strict.log)


@pytest.mark.parametrize("title", ["", "A\\B", "A\nB", "\0\0"])
def test_a_title_that_is_none(strict: Agent, title: str) -> None:
    """Blank, with a backslash, with a control character: rejected by reason, not cut off."""
    assert answer(strict, "TITLES", called=title, calling="MR1") == CALLED_UNKNOWN
    assert answer(strict, "NETS", calling=title, source="127.0.0.8") == CALLING_UNKNOWN


def test_titles_filled_up_with_nul(strict: Agent) -> None:
    """Against the standard, but some scanners do so."""
    assert answer(strict, "TITLES", called="TITLES\0\0\0", calling="MR1".ljust(16, "\0")) is None


def test_application_context_unknown(strict: Agent) -> None:
    """PS3.7 annex A: there is one DICOM application context."""
    assert answer(strict, "TITLES", calling="MR1", name="1.2.840.10008.3.1.1.2") == CONTEXT_UNKNOWN
    with scu.SCU(strict.ports["TITLES"]) as peer:  # none at all
        peer.send(scu.pdu(scu.RQ, scu.associate_rq(called="TITLES", calling="MR1")[6:74]))
        assert peer.rest() == [(scu.RJ, bytes((0, *CONTEXT_UNKNOWN)))]


@pytest.mark.parametrize(("version", "rejection"), [(1, None), (3, None), (0xFFFF, None), (2, VERSION_UNKNOWN),
                                                    (0, VERSION_UNKNOWN), (0xFFFE, VERSION_UNKNOWN)])
def test_protocol_version(strict: Agent, version: int, rejection: tuple[int, int, int] | None) -> None:
    """Bit 0 is version 1; a later peer that still has it must be served (PS3.8 section 9.3.2)."""
    assert answer(strict, "TITLES", calling="MR1", version=version) == rejection


def test_over_ipv6(strict: Agent) -> None:
    """Allow lists hold over IPv6 as well, and an association there works."""
    assert answer(strict, "SIX", host="::1", calling="MR6") is None
    assert answer(strict, "SIX", host="::1", calling="MR7") == CALLING_UNKNOWN
    image = data.instance()
    with scu.SCU(strict.ports["SIX"], host="::1") as peer:
        peer.associate(called="SIX", calling="MR6")
        assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
        peer.release()
    proof.row(strict, image.SOPInstanceUID)
    assert strict.ledger.value("SELECT peer FROM association WHERE calling_ae = 'MR6' LIMIT 1") == "::1"


def test_too_many_at_a_time(strict: Agent) -> None:
    """The third of two: a passing rejection (2/3/2), so that the sender calls again; and then there is room."""
    with scu.SCU(strict.ports["FEW"]) as one, scu.SCU(strict.ports["FEW"]) as two:
        one.associate(scu.ECHO, called="FEW")
        two.associate(scu.ECHO, called="FEW")
        for _ in range(3):
            assert answer(strict, "FEW") == LIMIT_EXCEEDED
        assert one.echo() == 0 and two.echo() == 0
        one.release()
        wait_for(lambda: answer(strict, "FEW") is None, say="nobody is let in although one has gone")
        assert two.echo() == 0
        two.release()


def test_the_limit_is_not_used_up_by_rejections(strict: Agent) -> None:
    """A hundred calls with the wrong title must not keep the right one out."""
    for _ in range(100):
        assert answer(strict, "FEW", called="NOSUCH") == CALLED_UNKNOWN
    wait_for(lambda: answer(strict, "FEW") is None, say="rejected calls count for ever")


def test_nothing_to_serve(strict: Agent) -> None:
    """Only a query class is proposed: the association stands, the context is refused, a message in it is an abort."""
    with scu.SCU(strict.ports["TITLES"]) as peer:
        peer.associate({1: ("1.2.840.10008.5.1.4.1.2.2.1", ["1.2.840.10008.1.2"])}, called="TITLES", calling="MR1")
        assert peer.results[1][0] == 3
        peer.send(scu.pdu(scu.P_DATA, scu.pdv(1, 3, scu.c_echo())))
        assert peer.rest() == [(scu.ABORT, bytes((0, 0, 2, 6)))]


def test_dcmtk_is_told_the_reason(strict: Agent) -> None:
    """What an operator reads at a DCMTK sender."""
    for title, called, reason in (("STRANGER", "TITLES", "Calling AE Title Not Recognized"),
                                  ("MR1", "NOSUCH", "Called AE Title Not Recognized")):
        done = proof.run("echoscu", "-aet", title, "-aec", called, "127.0.0.1", str(strict.ports["TITLES"]),
                         check=False)
        assert done.returncode != 0 and reason in done.stdout + done.stderr
    proof.run("echoscu", "-aet", "MR1", "-aec", "TITLES", "127.0.0.1", str(strict.ports["TITLES"]))


def test_rejected_callers_leave_a_line_in_the_log_and_no_association(strict: Agent) -> None:
    """An operator finds out why a scanner cannot send; the ledger knows only associations that were."""
    before = strict.ledger.value("SELECT count(*) FROM association")
    assert answer(strict, "TITLES", calling="INTRUDER") == CALLING_UNKNOWN
    wait_for(lambda: "not on the receiver's allow list" in strict.log)
    assert answer(strict, "TITLES", calling="MR1") is None
    wait_for(lambda: strict.ledger.value("SELECT count(*) FROM association") == before + 1)
    assert not strict.ledger.value("SELECT count(*) FROM association WHERE calling_ae IN ('INTRUDER', 'STRANGER')")
    assert proof.failures(strict.log) == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    """Two services on one port: the second says which receiver and which port, and ends."""
    port = peers.free_port()
    receivers = f'[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = {port}\nallow = ["*"]'
    with running(Agent(tmp_path / "one", receivers=receivers), "receive"):
        second = Agent(tmp_path / "two", receivers=receivers)
        done = second.cli("receive")
        assert done.returncode != 0 and str(port) in done.stderr and "RELAY" in done.stderr
        assert "Traceback" not in done.stderr

