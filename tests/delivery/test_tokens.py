"""Alias tokens that are to be renewed, cannot be renewed, or have run out, and credentials that are not there."""

from __future__ import annotations

import time

from relay_agent.destinations.xnat import XNATDestination
from relay_agent.ledger import Stop
from tests import data
from tests.delivery.box import PASSWORD, USER, Box, Pair, arrived_exactly, requests_for
from tests.harness import wait_for


def trouble(box: Box) -> str:
    """What the destination says of its token."""
    there = box.worker._shippers[0].there
    assert isinstance(there, XNATDestination)
    return there.trouble


def test_a_token_is_renewed_while_nothing_is_delivered(pair: Pair) -> None:
    """A weekend without a scan is longer than a token lives: it must be renewed by itself, not by the next delivery.

    The password is refused after the first log-in, as it is where the credential was a token from the start.
    """
    box, central = pair(token_lifetime=8.0, destination={"token_lifetime": "4 s"})
    box.take(list(data.study(1, 1)))
    box.wait(Stop.VERIFIED)
    central.accounts.users.pop(USER)
    time.sleep(10)
    box.take(list(data.study(1, 1, comments="Project:P1 Subject:S2 Session:S2_MR1")))
    box.wait(Stop.VERIFIED, shipment=2)
    assert trouble(box) == ""
    assert len(requests_for(central, "GET", "/data/services/tokens/issue")) >= 4
    assert all(request["status"] != 401 for request in central.requests)


def test_a_token_that_cannot_be_renewed_is_told_early(pair: Pair) -> None:
    """Renewing fails: deliveries go on with the old token, and operators hear of it before it has expired."""
    box, central = pair(token_lifetime=600.0, destination={"token_lifetime": "8 s"})
    box.take(list(data.study(1, 1)))
    box.wait(Stop.VERIFIED)
    central.misbehave("busy-500", path="/tokens/issue$")
    wait_for(lambda: trouble(box), say="it is noticed")
    assert "the token of central cannot be renewed" in trouble(box)
    assert "it expires in" in trouble(box)
    box.worker._tell()
    assert [alert["condition"] for alert in box.status()["alerts"]] == ["token"]
    box.take(list(data.study(1, 1, comments="Project:P1 Subject:S2 Session:S2_MR1")))
    box.wait(Stop.VERIFIED, shipment=2)


def test_an_expired_token_and_a_new_password(pair: Pair) -> None:
    """Off for longer than a token lives, and the password was changed: words, and back to work with the new one.

    Meanwhile an idle box must not go on logging in with what is refused, or the account is locked.
    """
    box, central = pair(token_lifetime=6.0, destination={"token_lifetime": "1 h"})
    first, second = (list(data.study(1, 2, comments=f"Project:P1 Subject:S{n} Session:S{n}_MR1")) for n in (1, 2))
    box.take(first)
    box.wait(Stop.VERIFIED)
    central.accounts.users[USER] = "another password"
    time.sleep(8)
    assert all(request["status"] != 401 for request in central.requests), "it logs in without need"
    box.take(second)
    row = box.wait_words("the credential was refused", shipment=2, attempts=2)
    assert "credential file" in row["error"]
    box.kept(first + second)
    (box.folder / "secret").write_text(f"{USER}:another password", encoding="utf-8")
    box.wait(Stop.VERIFIED, shipment=2)
    arrived_exactly(central, second, "S2_MR1")


def test_a_credential_that_is_not_there(pair: Pair) -> None:
    """A file that is missing or empty: words that name it, and on as soon as it is there."""
    box, central = pair()
    secret = box.folder / "secret"
    secret.unlink()
    images = list(data.study(1, 2))
    box.take(images)
    box.wait_words("cannot be read")
    secret.write_text("no colon", encoding="utf-8")
    assert "no colon" not in box.wait_words("must hold one line")["error"]
    secret.write_text(f"{USER}:{PASSWORD}", encoding="utf-8")
    box.wait(Stop.VERIFIED)
    arrived_exactly(central, images)
