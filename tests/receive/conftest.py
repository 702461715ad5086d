"""One receiving box that tests share when they do no harm to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Agent, running


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """A receiver that takes from anybody; only the receiving service runs."""
    with running(Agent(tmp_path_factory.mktemp("box")), "receive") as agent:
        yield agent
