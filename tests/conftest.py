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
    """Tests that share a box or a server stay together, in their order; of the others the longest go first.

    For ``--dist loadgroup``.
    """
    for item in items:
        if group := _shared(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None or _shared(item) != "")


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Long values are no names: one of a megabyte, in which nobody can read, goes to and fro between the processes."""
    return argname if isinstance(val, bytes | str) and len(val) > 100 else None


def _shared(item: pytest.Item) -> str:
    """What it has in common with others: the box it looks at, or all of its file that lives longer than a test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "_testinfra_host" in params:
        return str(params["_testinfra_host"].backend.get_pytest_id())
    if item.get_closest_marker("apart"):
        return ""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    shares = any(fixture.scope != "function" and fixture.baseid.startswith("tests")
                 for found in fixtures for fixture in found)
    return item.path.stem if shares else ""
