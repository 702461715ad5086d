"""relay_disk is no part of the agent: it is found where the role has it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "roles/storage/files"))
# What is compiled there would be taken for a part of the role. Everything else may be: pytest would rewrite and compile
# all tests anew in each process of each run.
keeps, sys.dont_write_bytecode = sys.dont_write_bytecode, True
importlib.import_module("relay_disk.cli")  # it needs all the others
sys.dont_write_bytecode = keeps
