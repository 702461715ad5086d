"""Pytest fixtures; a test module asks for them with `pytest_plugins = "tests.central.fixtures"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .central import Central
from .testing import Client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Central, Client]]]:
    running: list[Central] = []

    def begin(**options: Any) -> tuple[Central, Client]:
        users = {"relay": "secret", "looker": "secret"}
        options = {
            "projects": ["P1", "P2"],
            "users": users,
            "read_only": ["looker"],
            "admins": ["relay"],
        } | options
        central = Central(options.pop("data", tmp_path / "central"), **options).start()
        running.append(central)
        return central, Client(central.url)

    yield begin
    for central in running:
        if not central.stopping.is_set():
            central.stop()


@pytest.fixture
def site(start: Callable[..., tuple[Central, Client]]) -> tuple[Central, Client]:
    return start()
