"""`python -m tests.bench`: figures of this agent and its peers, measured side by side in the same run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench import deidentifying, forwarding, kspace, machine, raw_delivery, receiving, servers
from tests.bench.corpus import Corpus
from tests.bench.results import Section

SECTIONS: dict[str, Callable[[Corpus, Path, bool], Section]] = {
    "receive": receiving.receive,
    "nagle": receiving.nagle,
    "large": receiving.large,
    "end-to-end": forwarding.end_to_end,
    "slow-line": forwarding.slow_line,
    "deidentify": deidentifying.deidentify,
    "kspace": kspace.kspace,
    "raw-delivery": raw_delivery.raw_delivery,
}


def main() -> int:
    """Run what was asked for; 1 when the machine lacks the peers."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition(": ")[2])
    parser.add_argument("section", nargs="*", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="little data and one round: does the benchmark work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"),
                        help="where data and spools go; on a disk, because syncs are measured (default: %(default)s)")
    options = parser.parse_args()
    unknown = [name for name in options.section if name not in SECTIONS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    missing = servers.missing()
    if missing:
        print(f"Not installed: {', '.join(missing)}. On Debian, as root: make peers", file=sys.stderr)
        return 1
    start = time.monotonic()
    facts = machine.facts(options.folder)
    for name, fact in facts.items():
        print(f"{name:>21}: {fact}")
    if facts["file system"] in machine.MEMORY_ONLY:
        print("WARNING: this file system is memory, so syncs cost nothing and the figures say little; see --folder")
    found: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=options.folder) as name:
        folder = Path(name)
        _spread(folder)
        corpus = Corpus(folder / "corpus")
        for section in options.section or SECTIONS:
            began = time.monotonic()
            found.append(SECTIONS[section](corpus, folder, options.quick))
            print()
            print(*found[-1].tables, *found[-1].targets, sep="\n", flush=True)
            print(f"({time.monotonic() - began:.0f} s)")
    targets = [target for section in found for target in section.targets]
    print(f"\n{sum(target.met for target in targets)} of {len(targets)} targets met; took "
          f"{time.monotonic() - start:.0f} s")
    if options.quick:
        print("This was --quick: it shows that the benchmark works; its figures mean nothing.")
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "durability": servers.DURABILITY, "quick": options.quick,
                                            "sections": [section.json() for section in found]}, indent=1))
    return 0


def _spread(folder: Path) -> None:
    """Have ext4 make each server's files in a group of their own.

    Without a journal it avoids inodes that were deleted in the last minutes, and looking for others near them costs a
    server a quarter of its CPU after the one before has been cleaned up.
    """
    subprocess.run(["chattr", "+T", str(folder)], capture_output=True, check=False)  # other file systems do not know it


if __name__ == "__main__":
    sys.exit(main())
