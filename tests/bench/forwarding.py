"""From the scanner to the archive: this agent and Orthanc on loopback, and over a slow and distant line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from tests.bench.corpus import Corpus, Study
from tests.bench.line import Line
from tests.bench.meter import measured
from tests.bench.results import Medians, Run, Section, Table, Target, ratio, show
from tests.bench.senders import dcmsend
from tests.bench.servers import (
    AGENT,
    ORTHANC,
    STORESCP,
    CentralServer,
    OrthancServer,
    central,
    orthanc,
    storescp,
)
from tests.harness import Agent, wait_for, xnat

QUIET = 1.0  # seconds; the harness configures it
LINE_BITS, LINE_RTT = 24e6, 0.04
_LONG = 300.0  # seconds that anything may take
_LOOK = 0.02  # seconds between looks at whether it is done


@dataclass(frozen=True)
class Delivered:
    """What the agent's ledger says of a study that was delivered."""

    complete: float  # seconds since 1970
    verified: float


@contextmanager
def box(folder: Path, there: CentralServer, url: str, more: str = "") -> Iterator[Agent]:
    """The agent with both its services, delivering to the stand-in."""
    settings = xnat(url, folder, there.certificates.ca, more)
    agent = Agent(folder, f'[receive]\nreserve = "10 MB"\n{settings}')
    if agent.config.stage.quiet != QUIET:
        raise RuntimeError(f"the benchmark reckons with a quiet time of {QUIET} s")
    try:
        yield agent.start()
    finally:
        agent.stop(kill=True)


def deliver(agent: Agent, study: Study) -> Delivered:
    """Send a study to the agent and wait until it is verified in the archive, instance by instance."""
    ledger = agent.ledger
    before = ledger.value("SELECT coalesce(sum(instances), 0) FROM shipment WHERE state = 'delivered'")
    dcmsend(agent.port, "RELAY", [list(study.series)])
    end = time.monotonic() + _LONG
    while ledger.value("SELECT coalesce(sum(instances), 0) FROM shipment WHERE state = 'delivered'") \
            < before + study.instances:
        if time.monotonic() > end:
            raise RuntimeError(f"not delivered: {agent.cli('status').stdout}\n{agent.log[-2000:]}")
        time.sleep(_LOOK)
    moments = {state: ledger.value("SELECT max(at) FROM event WHERE what LIKE ?", f"{state}:%")
               for state in ("complete", "delivered")}
    return Delivered(moments["complete"], moments["delivered"])


def balanced(agent: Agent, instances: int) -> None:
    """The agent itself must say that everything was delivered."""
    sums: dict[str, Any] = agent.json("status")["balance"]
    if sums["delivered"] != instances or sums["difference"]:
        raise RuntimeError(f"the agent's books say something else: {sums}")


# Loopback

def end_to_end(corpus: Corpus, folder: Path, quick: bool) -> Section:
    """Scanner to verified archive on loopback, against Orthanc forwarding to another Orthanc."""
    rounds = 1 if quick else 3
    studies = [("CT", corpus.study("CT", 3, 4 if quick else 100)), ("MR", corpus.study("MR", 4, 5 if quick else 250))]
    runs = []
    for _ in range(rounds):
        with TemporaryDirectory(dir=folder) as place:
            runs += _through_agent(Path(place), studies)
        with TemporaryDirectory(dir=folder) as place:
            runs += _through_orthanc(Path(place), studies)
    rows, targets = [], []
    for load, study in studies:
        ours, theirs = Medians(runs, load, AGENT), Medians(runs, load, ORTHANC)
        words = f"{load}, {study.instances} inst, {study.size / 1e6:.0f} MB"
        net = ours.more("without_quiet")
        rows += [(words, f"{AGENT} → XNAT stand-in", show(ours.seconds), show(net), show(study.instances / net), "",
                  f"{ours.cpu_gb:.1f}", "", show(ours.largest), show(ours.together)),
                 (words, "Orthanc → Orthanc, STOW-RS", show(theirs.seconds), show(theirs.seconds),
                  show(study.instances / theirs.seconds), ratio(theirs.seconds, net), f"{theirs.cpu_gb:.1f}",
                  ratio(ours.cpu_gb, theirs.cpu_gb), show(theirs.largest), show(theirs.together))]
        against = f"{load}, end to end: speed against Orthanc's forwarding, "
        targets += [Target(f"{against}quiet time left out", theirs.seconds / net, 3),
                    Target(f"{against}with {QUIET:.0f} s of quiet time", theirs.seconds / ours.seconds, 3)]
    notes = [f"medians of {rounds} interleaved rounds; from the start of dcmsend until the relay's last instance is "
             "there; relay, sender and destination share the cores; CPU and memory are the relay's alone",
             f"{AGENT}: until `relay-agent status` says delivered: each instance's digest compared in the archive; "
             f"'net' leaves out the quiet time of {QUIET:.0f} s after which a session counts as complete",
             "Orthanc: each series is handed on (POST /dicom-web/servers/…/stow, default settings) as soon as its last "
             "instance is in, which is sooner than Orthanc could know by itself; until the destination counts all "
             "instances; nothing is compared",
             f"{AGENT} delivers over HTTPS with a verified certificate; Orthanc over plain HTTP, because Debian's "
             "Orthanc crashes as an HTTPS server, so that it is spared the cost of TLS",
             "destinations on the same machine: for XNAT a small stand-in in Python, for Orthanc another Orthanc"]
    return Section("end-to-end", [Table("End to end on loopback", (
        "load", "relay", "seconds", "net", "inst/s net", "ours is", "CPU s/GB", "ours is", "peak MB", "all MB"), rows,
        notes)], targets, runs)


def _through_agent(place: Path, studies: Sequence[tuple[str, Study]]) -> list[Run]:
    runs = []
    with central(place / "central") as there, box(place / "box", there, there.url) as agent:
        roots = [process.pid for process in agent.processes.values()]
        for load, study in studies:
            os.sync()
            with measured(roots) as cost:
                start = time.monotonic()
                deliver(agent, study)
                cost.seconds = time.monotonic() - start
            runs.append(Run("end-to-end", load, AGENT, study.instances, study.size, cost.seconds, cost.cpu,
                            cost.largest, cost.together, {"without_quiet": cost.seconds - QUIET}))
        balanced(agent, sum(study.instances for _, study in studies))
    return runs


def _through_orthanc(place: Path, studies: Sequence[tuple[str, Study]]) -> list[Run]:
    runs = []
    with orthanc(place / "b") as there, \
            orthanc(place / "a", servers={"b": {"Url": f"{there.rest}/dicom-web/"}}) as relay:
        for load, study in studies:
            os.sync()
            with measured(relay.roots) as cost:
                start = time.monotonic()
                _forward(relay, there, study)
                cost.seconds = time.monotonic() - start
            runs.append(Run("end-to-end", load, ORTHANC, study.instances, study.size, cost.seconds, cost.cpu,
                            cost.largest, cost.together))
    return runs


def _forward(relay: OrthancServer, there: OrthancServer, study: Study) -> None:
    """Send a study and hand on each series as soon as it is in."""
    before, expected = relay.held(), there.held() + study.instances
    jobs: list[str] = []
    each = study.instances // len(study.series)

    def hand_on() -> None:
        # dcmsend sends series after series, so a count tells which are in.
        for uid in study.uids[len(jobs):(relay.held() - before) // each]:
            found = relay.ask("POST", "/tools/lookup", data=uid)
            series = next(row["ID"] for row in found if row["Type"] == "Series")
            answer = relay.ask("POST", "/dicom-web/servers/b/stow", json={"Resources": [series], "Synchronous": False})
            jobs.append(answer["ID"])

    with _sending(relay, study):
        end = time.monotonic() + _LONG
        while len(jobs) < len(study.series) or there.held() < expected:
            if time.monotonic() > end or any(relay.ask("GET", f"/jobs/{job}")["State"] == "Failure" for job in jobs):
                raise RuntimeError("Orthanc did not forward everything")
            hand_on()
            time.sleep(_LOOK)


@contextmanager
def _sending(relay: OrthancServer, study: Study) -> Iterator[None]:
    thread = Thread(target=dcmsend, args=(relay.port, relay.aet, [list(study.series)]))
    thread.start()
    try:
        yield
    finally:
        thread.join()


# A slow and distant line

def slow_line(corpus: Corpus, folder: Path, quick: bool) -> Section:
    """Delivery over a slow line, stored and compressed, against one C-STORE association over the same line."""
    studies = [("CT", corpus.study("CT", 3, 1 if quick else 40)), ("MR", corpus.study("MR", 4, 5 if quick else 250))]
    runs = []
    for compression in ("store", "auto"):
        with TemporaryDirectory(dir=folder) as place:
            runs += _over_https(Path(place), studies, compression)
    with TemporaryDirectory(dir=folder) as place:
        runs += _over_dicom(Path(place), studies)
    rows, targets = [], []
    names = (f"{AGENT}, store", f"{AGENT}, auto", f"{STORESCP}, one association")
    for load, study in studies:
        found = {name: Medians(runs, load, name) for name in names}
        peer = found[names[2]].more("share")
        words = f"{load}, {study.instances} inst, {study.size / 1e6:.0f} MB"
        for name in names:
            one = found[name]
            share, ours = one.more("share"), name != names[2]
            rows.append((words, name, show(one.more("transfer")), f"{share:.1f} %", f"{one.more('wire'):.1f} %",
                         ratio(share, peer) if ours else "", show(one.seconds), f"{one.cpu_gb:.1f}" if ours else "",
                         show(one.together) if ours else ""))
        targets.append(Target(f"{load}, stored: share of the line rate", found[names[0]].more("share"), 95, unit="%"))
    notes = [f"{LINE_BITS / 1e6:.0f} Mbit/s = {LINE_BITS / 8e6:.0f} MB/s, round trip {LINE_RTT * 1000:.0f} ms, a relay "
             "in user space: no loss and no congestion control, which is kinder to all than a real line; 1 round",
             "transfer: from the first to the end of the last upload in the destination's request log, its work on the "
             "last one included; for C-STORE from the association's first to its last byte",
             "of line: bytes of DICOM a second in that time, against the line's bytes a second; above 100 % is the "
             "gain of compression. On the wire: the same with the bytes as sent",
             "whole: from the moment in which the session counts as complete until it is verified; for C-STORE that of "
             "dcmsend, after which nothing is verified"]
    return Section("slow-line", [Table(f"Over {LINE_BITS / 1e6:.0f} Mbit/s with a round trip of {LINE_RTT * 1000:.0f} "
                                       "ms", ("load", "way", "transfer s", "of line", "on the wire", "to C-STORE",
                                              "whole s", "CPU s/GB", "all MB"), rows, notes)], targets, runs)


def _over_https(place: Path, studies: Sequence[tuple[str, Study]], compression: str) -> list[Run]:
    runs = []
    with central(place / "central") as there, Line("127.0.0.1", there.port, LINE_BITS, LINE_RTT) as line, \
            box(place / "box", there, f"https://127.0.0.1:{line.port}", f'compression = "{compression}"') as agent:
        roots = [process.pid for process in agent.processes.values()]
        for load, study in studies:
            os.sync()
            seen = len(there.requests())
            line.reset()
            with measured(roots) as cost:
                done = deliver(agent, study)
            uploads = [row for row in there.requests()[seen:] if row["path"].endswith("/services/import")]
            transfer = max(row["at"] + row["seconds"] for row in uploads) - min(row["at"] for row in uploads)
            runs.append(Run("slow-line", load, f"{AGENT}, {compression}", study.instances, study.size,
                            done.verified - done.complete, cost.cpu, cost.largest, cost.together,
                            {"transfer": transfer, "share": _share(study.size, transfer),
                             "wire": _share(sum(row["bytes"] for row in uploads), transfer)}))
        balanced(agent, sum(study.instances for _, study in studies))
    return runs


def _over_dicom(place: Path, studies: Sequence[tuple[str, Study]]) -> list[Run]:
    runs = []
    with storescp(place / "server") as there, Line("127.0.0.1", there.port, LINE_BITS, LINE_RTT) as line:
        for load, study in studies:
            os.sync()
            before = there.held()
            line.reset()
            with measured(there.roots) as cost:
                start = time.monotonic()
                dcmsend(line.port, there.aet, [list(study.series)])
                cost.seconds = time.monotonic() - start
            wait_for(lambda: there.held() == before + study.instances, say="storescp does not hold all")  # noqa: B023
            transfer = line.down.last - line.up.first
            runs.append(Run("slow-line", load, f"{STORESCP}, one association", study.instances, study.size,
                            cost.seconds, cost.cpu, cost.largest, cost.together,
                            {"transfer": transfer, "share": _share(study.size, transfer),
                             "wire": _share(line.up.bytes, transfer)}))
    return runs


def _share(size: int, seconds: float) -> float:
    """Bytes in seconds, as percent of what the line could carry."""
    return size / seconds / (LINE_BITS / 8) * 100
