"""relay_disk is no part of the agent: it is found where the role has it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / "roles/storage/files"

sys.path.insert(0, str(PLACE))
# What is compiled there would be taken for a part of the role. Everything else may be: pytest would rewrite and compile
# all tests anew in each process of each run.
keeps, sys.dont_write_bytecode = sys.dont_write_bytecode, True
for module in pkgutil.iter_modules([str(PLACE / "relay_disk")]):
    importlib.import_module(f"relay_disk.{module.name}")
sys.dont_write_bytecode = keeps
