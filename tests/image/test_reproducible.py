"""Two builds from the same inputs are the same bit for bit: another checkout, another cache, another day."""

from __future__ import annotations

import os
import shutil

import pytest

from image.common import CACHE, digest
from tests.image.conftest import PROJECT, build


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_same_bytes(fast, tmp_path):
    """The second build has nothing of the first but Debian's packages, the tools, the ZFS module and the keys."""
    project = tmp_path / "elsewhere" / "checkout"
    shutil.copytree(PROJECT, project, symlinks=True, ignore=lambda folder, names: {
        name for name in names if name == "__pycache__" or (folder == str(PROJECT) and name in ("build", ".venv"))})
    os.symlink(PROJECT / ".venv", project / ".venv")
    cache = tmp_path / "cache/relay-image"
    cache.mkdir(parents=True)
    for entry in CACHE.iterdir():
        if entry.name.startswith(("debs", "modules", "tools-", "throw-away")):
            os.symlink(entry, cache / entry.name)
    other = build(tmp_path / "output", "--fast", project=project, cache=cache) / fast.name
    assert digest(other) == digest(fast)
