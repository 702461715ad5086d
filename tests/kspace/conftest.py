"""Files of all families, and the real ones where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kspace.synthetic import FAMILIES, REAL, File


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest) -> File:
    return FAMILIES[request.param]


@pytest.fixture(params=["gre.dat", "epi.dat"])
def real(request: pytest.FixtureRequest) -> Path:
    if not (REAL / request.param).exists():
        pytest.skip("the real files are not here; RELAY_TWIX_CORPUS names their folder")
    return REAL / request.param
