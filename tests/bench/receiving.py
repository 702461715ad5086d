"""C-STORE into this agent and its peers: small and large instances, and senders that leave Nagle's algorithm on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.corpus import Corpus, Study
from tests.bench.meter import measured
from tests.bench.results import Medians, Run, Section, Table, Target, ratio, show
from tests.bench.senders import dcmsend, stream_object
from tests.bench.servers import AGENT, DURABILITY, ORTHANC, RECEIVERS, STORESCP, Server
from tests.harness import wait_for

PEERS = (STORESCP, ORTHANC)


@dataclass(frozen=True)
class Load:
    """A study sent over so many associations at once, a series each when there are several."""

    name: str
    study: Study
    associations: int


def run(section: str, load: Load, server: Server, *, nodelay: bool = True, name: str = "") -> Run:
    """Send a load; every instance must be there afterwards. Time ends when the last sender does."""
    groups = [[folder] for folder in load.study.series] if load.associations > 1 else [list(load.study.series)]
    before = server.held()
    os.sync()  # what an earlier run left unwritten shall not burden this one
    with measured(server.roots) as cost:
        start = time.monotonic()
        dcmsend(server.port, server.aet, groups, nodelay=nodelay)
        cost.seconds = time.monotonic() - start
        expected = before + load.study.instances
        wait_for(lambda: server.held() == expected, say=f"{server.name} does not hold {expected} instances")
        filed = time.monotonic() - start
    return Run(section, load.name, name or server.name, load.study.instances, load.study.size, cost.seconds, cost.cpu,
               cost.largest, cost.together, {"filed": filed})


def compare(section: str, loads: Iterable[Load], folder: Path, rounds: int) -> list[Run]:
    """All loads on fresh servers, in turns, so that what the machine does meanwhile hits all of them.

    Nothing is deleted before the end: ext4 is slow to make files just after many were removed.
    """
    runs = []
    with TemporaryDirectory(dir=folder) as place:
        for number in range(rounds):
            for name, start in RECEIVERS.items():
                with start(Path(place, f"{number}-{name}")) as server:
                    runs += [run(section, load, server) for load in loads]
    return runs


def receive(corpus: Corpus, folder: Path, quick: bool) -> Section:
    """Small and middling instances over one and four associations."""
    if quick:
        sizes, rounds = {"MR": (24, 6), "CT": (4, 1)}, 1
    else:
        sizes, rounds = {"MR": (1500, 600), "CT": (240, 120)}, 3
    loads = []
    for kind, (one, four) in sizes.items():
        loads += [Load(f"{kind}, 1 association", corpus.study(kind, 1, one), 1),
                  Load(f"{kind}, 4 associations", corpus.study(kind, 4, four), 4)]
    runs = compare("receive", loads, folder, rounds)
    rows, targets = [], []
    for load in loads:
        found = {name: Medians(runs, load.name, name) for name in RECEIVERS}
        ours = found[AGENT]
        for name, theirs in found.items():
            peer = name != AGENT
            rows.append((
                load.name, name, show(theirs.rate), theirs.spread, ratio(ours.rate, theirs.rate) if peer else "",
                show(theirs.instances / theirs.more("filed")), f"{theirs.cpu_instance:.2f}",
                ratio(ours.cpu_instance, theirs.cpu_instance) if peer else "", show(theirs.largest),
                show(theirs.together)))
        if load.name.startswith("MR"):
            targets += [Target(f"{load.name}: rate against Orthanc", ours.rate / found[ORTHANC].rate, 3),
                        Target(f"{load.name}: rate against storescp, which does not sync",
                               ours.rate / found[STORESCP].rate, 1)]
        targets.append(Target(f"{load.name}: CPU per instance against storescp",
                              ours.cpu_instance / max(found[STORESCP].cpu_instance, 1e-3), 1.5, at_least=False))
    peak = max(Medians(runs, load.name, AGENT).together for load in loads)
    targets.append(Target("receive memory, all processes together", peak, 150, at_least=False, unit="MB"))
    sizes_kb = ", ".join(f"{kind} {corpus.study(kind, 1, one).size / one / 1000:.0f} kB"
                         for kind, (one, _) in sizes.items())
    notes = [f"medians of {rounds} interleaved rounds; instances of {sizes_kb}; TCP_NODELAY=1 for dcmsend and the "
             "DCMTK-based servers; time is that of the whole dcmsend; sender and server share the cores",
             "filed/s: the same until each instance is a file at its place and in the server's books",
             "peak MB: resident memory of the largest process; all MB: of all processes, shared pages counted once",
             *(f"{name}: {durability}" for name, durability in DURABILITY.items())]
    return Section("receive", [Table("Receive", ("load", "server", "inst/s", "range", "ours is", "filed/s",
                                                 "CPU ms/inst", "ours is", "peak MB", "all MB"), rows, notes)],
                   targets, runs)


def nagle(corpus: Corpus, folder: Path, quick: bool) -> Section:
    """A sender that leaves Nagle's algorithm on, as DCMTK's do by default and scanners may."""
    rounds, count = (1, 10) if quick else (3, 100)
    load = Load("MR, default sockets", corpus.study("MR", 1, count), 1)
    contenders = [(AGENT, AGENT, False)] + [(f"{name}{how}", name, on) for name in PEERS
                                            for how, on in (("", False), (", TCP_NODELAY", True))]
    runs = []
    for _ in range(rounds):
        for label, name, on in contenders:
            with TemporaryDirectory(dir=folder) as place, RECEIVERS[name](Path(place, "server"), nodelay=on) as server:
                runs.append(run("nagle", load, server, nodelay=False, name=label))
    found = {label: Medians(runs, load.name, label) for label, _, _ in contenders}
    ours = found[AGENT]
    rows = [(load.name, label, show(theirs.rate), theirs.spread,
             ratio(ours.rate, theirs.rate) if label != AGENT else "") for label, theirs in found.items()]
    targets = [Target(f"sender with Nagle on: rate against {label}", ours.rate / theirs.rate, 50)
               for label, theirs in found.items() if label != AGENT]
    notes = [f"{rounds} interleaved rounds of {count} instances; dcmsend without TCP_NODELAY, one association",
             "peers once as they are by default, and once with TCP_NODELAY=1 in their environment"]
    return Section("nagle", [Table("Senders that leave Nagle's algorithm on", ("load", "server", "inst/s", "range",
                                                                               "ours is"), rows, notes)], targets, runs)


def large(corpus: Corpus, folder: Path, quick: bool) -> Section:
    """Large multi-frame objects, and one that is larger than memory should ever have to hold."""
    size, huge, rounds = (8 * 2**20, 64 * 2**20, 1) if quick else (100 * 10**6, 2**31, 3)
    loads = [Load("4 objects, 1 association", corpus.large(4, size), 1)]
    loads.append(Load("4 objects, 4 associations", corpus.large(4, size + 2**20), 4))
    runs = compare("large", loads, folder, rounds)
    runs.append(_huge(folder, huge))
    rows, targets = [], []
    for load in loads:
        found = {name: Medians(runs, load.name, name) for name in RECEIVERS}
        for name, theirs in found.items():
            rows.append((load.name, name, show(theirs.speed),
                         ratio(found[AGENT].speed, theirs.speed) if name != AGENT else "",
                         f"{theirs.cpu_gb:.2f}", show(theirs.largest), show(theirs.together)))
    one = Medians(runs, runs[-1].load, AGENT)
    rows.append((runs[-1].load, AGENT, show(one.speed), "", f"{one.cpu_gb:.2f}", show(one.largest), show(one.together)))
    peak = max(Medians(runs, name, AGENT).together for name in (*(load.name for load in loads), runs[-1].load))
    targets.append(Target(f"receive memory with objects up to {huge / 1e9:.1f} GB, all processes together", peak, 150,
                          at_least=False, unit="MB"))
    notes = [f"objects of {size / 1e6:.0f} MB sent by dcmsend with TCP_NODELAY=1, medians of {rounds} interleaved "
             f"rounds; the one of {huge / 1e9:.1f} GB by a sender of the benchmark's own that makes it on the way"]
    for load in loads:
        corpus.forget(load.study)
    return Section("large", [Table("Large objects", ("load", "server", "MB/s", "ours is", "CPU s/GB", "peak MB",
                                                     "all MB"), rows, notes)], targets, runs)


def _huge(folder: Path, size: int) -> Run:
    with ExitStack() as stack:
        place = stack.enter_context(TemporaryDirectory(dir=folder))
        server = stack.enter_context(RECEIVERS[AGENT](Path(place, "server")))
        os.sync()
        with measured(server.roots) as cost:
            start = time.monotonic()
            status = stream_object(server, size)
            cost.seconds = time.monotonic() - start
            if status:
                raise RuntimeError(f"the large object was answered with status {status:04X}")
            wait_for(lambda: server.held() == 1, say="the large object is not there")
        stored = next(Path(place).rglob("*.dcm")).stat().st_size
    return Run("large", f"1 object of {stored / 1e9:.1f} GB", AGENT, 1, stored, cost.seconds, cost.cpu, cost.largest,
               cost.together)
