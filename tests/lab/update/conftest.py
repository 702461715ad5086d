from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import releases


@pytest.fixture(scope="session")
def good() -> Path:
    """The release that comes next."""
    return releases.release("good")


@pytest.fixture(scope="session")
def deaf() -> Path:
    """One whose receiver does not start."""
    return releases.release("deaf", releases.DEAF)


@pytest.fixture(scope="session")
def idle() -> Path:
    """One that migrates the ledger and then does not work."""
    return releases.release("idle", releases.NEWER, releases.IDLE)


@pytest.fixture(scope="session")
def later() -> Path:
    """The one after the next."""
    return releases.release("later", ("relay_agent/__main__.py", "relay_agent``.", "relay_agent``: later."))
