"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.box import Pair, pairs


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Makes a central XNAT and a box that works and delivers everything to it."""
    with pairs(tmp_path) as make:
        yield make
