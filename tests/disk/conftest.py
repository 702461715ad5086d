"""relay-disk is no part of the agent: it is found where the role has it."""

from __future__ import annotations

import sys
from pathlib import Path

# What is compiled there would be taken for a part of the role.
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "roles/storage/files"))
