"""What the benchmark makes and measures is what it says; and memory stays flat whatever the size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relay_agent.kspace.twix import Verdict, check
from tests.bench import kspace
from tests.harness import PROJECT


def test_its_files_are_complete(tmp_path):
    path = tmp_path / "raw.dat"
    kspace.make(path, 2_000_000, 2, 256)
    found = check(path)
    assert found.verdict is Verdict.COMPLETE
    assert found.measurements[0].readouts > 300


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """A sparse file of 20 GB costs what a small one costs."""
    largest = {}
    for size in (100_000_000, 20_000_000_000):
        path = tmp_path / f"{size}.dat"
        kspace.make(path, size, 128, 65_535, sparse=True)
        done = subprocess.run([sys.executable, "-m", "tests.bench.kspace", kspace.DIGESTED, str(path)], cwd=PROJECT,
                              check=True, capture_output=True, text=True)
        largest[size] = json.loads(done.stdout)[2]
        Path(path).unlink()
    small, large = largest.values()
    assert large < 200e6
    assert large - small < 10e6
