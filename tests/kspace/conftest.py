"""Files of all families, and the real ones where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kspace.synthetic import FAMILIES, File, real_file


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest) -> File:
    return FAMILIES[request.param]


@pytest.fixture(params=["gre.dat", "epi.dat"])
def real(request: pytest.FixtureRequest) -> Path:
    return real_file(request.param)
