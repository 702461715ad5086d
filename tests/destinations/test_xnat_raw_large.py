"""A file of two gigabytes, sparse on the disk: killed on its way again and again, sent once, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from relay_agent.kspace import join
from tests.bench import raw_delivery
from tests.central import Central
from tests.harness import PROJECT, wait_for

SIZE = 2 * 2**30 + 12_345  # bytes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kspace", [{}, {"compression": "zstd"}], ids=["plain", "packed"])
def test_killed_on_its_way(tmp_path: Path, kspace: dict[str, str]) -> None:
    path = tmp_path / "MID00358_0123456789ab.dat"
    with path.open("wb") as file:
        for place in range(0, SIZE, 2**28):
            file.seek(place)
            file.write(os.urandom(1000))
        file.truncate(SIZE)
    with Central(tmp_path / "central") as central:
        raw_delivery.prepare(central.url)
        command = [sys.executable, "-m", "tests.bench.raw_delivery", central.url, str(path), str(tmp_path / "box"),
                   json.dumps(kspace)]

        def arrived() -> list[str]:
            return [one["path"] for one in list(central.requests)
                    if one["method"] == "PUT" and ".parts/0" in one["path"] and one["status"] == 200]

        for kill in range(3):
            before = len(arrived())
            process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
            wait_for(lambda before=before: len(arrived()) > before + 1, 200, f"pieces, round {kill}")
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)[2] < 250e6, "memory"
        names = arrived()
        # One for each stream and kill may have been on its way into the store when the next process looked.
        assert len(names) - len(set(names)) <= 9, "pieces that were there were sent again"
        folder = tmp_path / "central/archive/P1/arc001/E1/SCANS/4/KSPACE"
        assert join.run(folder, True) == 0
        assert (folder / path.name).stat().st_size == SIZE
    shutil.rmtree(tmp_path / "central")
