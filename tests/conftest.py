"""How the tests are spread over processes (``pytest -n``), and what Hypothesis asks of a machine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine needs longer than Hypothesis allows, for anything.
settings.register_profile("relay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("relay")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file that share a box or a server stay together, in their order; of the others the longest go first.

    For ``--dist loadgroup``.
    """
    for item in items:
        if _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None or _shares(item))


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Long values are no names: one of a megabyte, in which nobody can read, goes to and fro between the processes."""
    return argname if isinstance(val, bytes | str) and len(val) > 100 else None


def _shares(item: pytest.Item) -> bool:
    """Whether it uses a fixture of these folders that lives longer than a test."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(fixture.scope != "function" and fixture.baseid.startswith("tests")
               for found in fixtures for fixture in found)
