"""What ``relay-agent check`` says of raw data: settings that are hardly meant, and the way to each imager."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from relay_agent.config import Config, ConfigError
from relay_agent.config_kspace import KSpaceSource, Pull
from relay_agent.destinations import Finding
from relay_agent.kspace import room
from relay_agent.kspace.pickup import fits
from relay_agent.kspace.remote import Failed, Remote
from relay_agent.units import show_duration, show_size


def settings(config: Config) -> Iterator[Finding]:
    """What is valid and yet hardly meant, and whether files can be moved."""
    routes = [route for route in config.route if route.kspace]
    if config.kspace.source and not routes:
        yield Finding(False, "raw k-space data are picked up, and no route delivers them", "add a [route.kspace] table")
    if routes and not config.kspace.source:
        yield Finding(False, "a route delivers raw k-space data, and there is no source of them",
                      "add a [[kspace.source]]")
    for route in routes:
        if route.kspace and not route.kspace.scrub:
            yield Finding(False, f"route {route.name}: raw data leave with what identifies the patient",
                          "set kspace.scrub = true, unless the project may have them")
    if any(route.kspace and route.kspace.adjustments for route in routes):
        for source in config.kspace.source:
            if source.pull and source.pull.smallest:
                yield Finding(False, f"kspace.source {source.name}: files below {show_size(source.pull.smallest)} are "
                              "not fetched, and a route wants adjustments, of which some are small",
                              'set its pull.smallest = "0 B"')
    if config.kspace.source and config.data.is_dir():
        left = room.left(config)
        yield Finding(left > 0, f"{show_size(left)} are free for raw data",
                      "give it more disk, or change kspace.reserve and kspace.quota; until then none are fetched")
    raw = [folder for folder in (config.kspace_landing, config.kspace_spool, config.kspace_deidentified)
           if folder.exists()]
    if len({folder.stat().st_dev for folder in raw}) > 1:
        yield Finding(False, f"{raw[0].parent}: its folders are on several file systems, so raw data cannot be moved",
                      f"mount a file system at {raw[0].parent} only, not below it")


def imager(source: KSpaceSource, pull: Pull) -> Iterator[Finding]:
    """Log in to a scanner's back end as the worker does, list its folder, ask for its own list; names no file."""
    where = f"kspace.source {source.name}: {pull.user}@{pull.host} port {pull.port}"
    with tempfile.TemporaryDirectory(prefix="relay-check-") as scratch:
        remote = Remote(pull, Path(scratch))
        try:
            yield from _listed(where, source, remote, pull)
            if pull.list_command:
                running = remote.scanning()
                yield Finding(True, f"{where}: by the scanner's own list {'a' if running else 'no'} scan is running")
        except (Failed, ConfigError) as error:
            yield Finding(False, f"{where}: {error}", "mend that and check again; until then nothing is fetched, and "
                          f"the scanner overwrites its raw data after {show_duration(source.overwritten_after)}")


def _listed(where: str, source: KSpaceSource, remote: Remote, pull: Pull) -> Iterator[Finding]:
    entries = remote.entries()
    raw = [entry for entry in entries if fits(entry.name, source)]
    yield Finding(True, f"{where}: takes the key and shows the folder over {pull.method}, {len(raw)} files of raw data"
                  + (f", {show_size(sum(entry.size for entry in raw))}, the oldest written "
                     f"{show_duration(max(time.time() - min(entry.changed for entry in raw), 0))} ago" if raw else ""))
    if entries and not raw:
        yield Finding(False, f"{where}: the folder holds {len(entries)} files, and none is raw data by its name",
                      "correct pull.folder, or the source's patterns")
    if remote.strange:
        yield Finding(False, f"{where}: {remote.strange} files have names with characters that cannot be fetched",
                      "have them renamed over there")
