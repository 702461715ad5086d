"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.central import Central
from tests.delivery.box import Box, everything, site, to


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., tuple[Box, Central]]]:
    """Makes a central XNAT and a box that works and delivers everything to it."""
    with ExitStack() as stack:
        def make(*, destination: dict[str, Any] | None = None, route: dict[str, Any] | None = None, more: str = "",
                 **central: Any) -> tuple[Box, Central]:
            there = stack.enter_context(site(tmp_path / "central", **central))
            settings = to(there.url, tmp_path / "box", **destination or {}) + everything(**route or {}) + more
            return stack.enter_context(Box(tmp_path / "box", settings).working()), there

        yield make
