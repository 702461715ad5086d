"""Misbehaviours: what goes wrong between a hospital and a central archive, on demand.

A fault is switched on by name with options. Every fault understands

* ``times``: only the first so many requests it applies to (default: all),
* ``skip``: leave the first so many alone,
* ``probability`` and ``seed``: strike at random, reproducibly,
* ``path`` and ``method``: a regular expression on the path, and the HTTP verb.
"""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass, field
from typing import Any

IMPORT = r"/data/services/import$"
FILES = r"/files(/|$)"
COMMIT = r"/data/(prearchive/projects/[^/]+/[^/]+/[^/]+|services/(archive|import))$"
ANY = r"/(data|xapi)(/|$)"

#: name -> (where it applies unless told otherwise, its own options with their defaults)
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    # the import service
    "empty-list": (IMPORT, {}),
    "400-wrap": (IMPORT, {"after": 0}),
    "disk-full": (f"{IMPORT}|{FILES}", {"after": 0}),
    "concurrent-400": (IMPORT, {}),
    "wrong-project": (IMPORT, {"project": "Unassigned"}),
    "drop-instances": (IMPORT, {"k": 1}),
    "corrupt-instances": (IMPORT, {"k": 1, "silent": False}),
    "truncate-instances": (IMPORT, {"k": 1, "keep": 0.5}),
    # resource files
    "duplicates": (FILES, {}),
    "no-permission-200": (FILES, {}),
    "damage-files": (FILES, {"keep": None}),
    # committing and archiving
    "commit-409-locked": (COMMIT, {}),
    "commit-conflict": (COMMIT, {"message": "Session already exists, retry with overwrite enabled"}),
    "slow-commit": (COMMIT, {"seconds": 5.0}),
    "lying-archive": (COMMIT, {"lose": None}),
    "checksums-off": (ANY, {}),
    # the network and what stands in it
    "slow": (ANY, {"rate": None, "delay": 0.0}),
    "black-hole": (ANY, {}),
    "cut-at": (IMPORT, {"bytes": 100_000}),
    "proxy-cut": (ANY, {"seconds": 1.0, "work": 0.0, "how": "504"}),
    "body-limit": (ANY, {"seconds": 1.0}),
    "busy-500": (ANY, {}),
    "busy-502": (ANY, {}),
    "busy-503": (ANY, {"retry_after": None}),
    "401": (ANY, {}),
    "redirect-html": (ANY, {}),
}
COMMON: dict[str, Any] = {
    "times": None,
    "skip": 0,
    "probability": 1.0,
    "seed": 0,
    "path": None,
    "method": None,
}


@dataclass
class Fault:
    name: str
    options: dict[str, Any]
    seen: int = 0
    struck: int = 0
    dice: random.Random = field(default_factory=random.Random)

    def __getitem__(self, option: str) -> Any:
        return self.options[option]

    def strikes(self, method: str, path: str) -> bool:
        """Decide for one request, counting it (call with the owner's lock held)."""
        where = self["path"] or FAULTS[self.name][0]
        if not re.search(where, path) or self["method"] not in (None, method):
            return False
        self.seen += 1
        if self.seen <= self["skip"] or (self["times"] is not None and self.struck >= self["times"]):
            return False
        if self.dice.random() >= self["probability"]:
            return False
        self.struck += 1
        return True


class Faults:
    """The faults that are switched on; at most one of each name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str, Fault] = {}

    def add(self, name: str, **options: Any) -> Fault:
        if name not in FAULTS:
            raise ValueError(f"no misbehaviour called {name!r}; there are {', '.join(sorted(FAULTS))}")
        allowed = COMMON | FAULTS[name][1]
        if unknown := options.keys() - allowed.keys():
            raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}")
        fault = Fault(name, allowed | options)
        fault.dice.seed(fault["seed"])
        with self._lock:
            self._active[name] = fault
        return fault

    def clear(self, name: str | None = None) -> None:
        with self._lock:
            if name is None:
                self._active.clear()
            else:
                self._active.pop(name, None)

    def strike(self, name: str, method: str, path: str) -> Fault | None:
        """The fault, if it is on and hits this request."""
        with self._lock:
            fault = self._active.get(name)
            return fault if fault is not None and fault.strikes(method, path) else None

    def active(self, name: str) -> bool:
        with self._lock:
            return name in self._active

    def listing(self) -> list[dict[str, Any]]:
        with self._lock:
            return [{"name": f.name, "struck": f.struck, **f.options} for f in self._active.values()]
