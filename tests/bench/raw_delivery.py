"""Raw data on their way into an XNAT: this agent against `curl -T` of the same file to the same server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import requests

from relay_agent.config_destinations import XNAT
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.xnat_raw import XNATRaw
from relay_agent.package import Item, Manifest
from relay_agent.throttle import Throttle
from tests.bench.corpus import Corpus
from tests.bench.kspace import make
from tests.bench.results import Medians, Run, Section, Table, Target, ratio, show
from tests.harness import PROJECT, wait_for

SESSION = "/data/projects/P1/subjects/S1/experiments/E1"
ROUNDS = 3
CURL, ONE, PIECES, PACKED = "curl, one request", "one request", "pieces, 3 streams", "pieces, packed, 3 streams"
WAYS = {ONE: {"single_request": "1 TB"}, PIECES: {}, PACKED: {"compression": "zstd"}}


def manifest(path: Path) -> Manifest:
    """Of this file alone, for scan 4 of the session."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            md5.update(block)
            sha256.update(block)
    item = Item(1, path, "", path.name, "", "", "", "", path.stat().st_size, md5.hexdigest(), sha256.hexdigest(), False)
    return Manifest(1, "", 0, "P1", "S1", "E1", None, (item,), kind="raw", scan="4", resource="KSPACE")


def destination(url: str, folder: Path, **kspace: str) -> XNATRaw:
    """The stand-in as a destination of raw data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text("relay:secret", encoding="utf-8")
    config = XNAT.model_validate({"name": "central", "url": url, "credential": str(folder / "secret"),
                                  "kspace": kspace})
    return XNATRaw(config, Throttle(None), Tokens(config, folder / "tokens"), folder)


def prepare(url: str) -> None:
    """A session with scan 4."""
    with requests.Session() as session:
        session.trust_env, session.auth = False, ("relay", "secret")
        for path, kind in ((SESSION, "xnat:mrSessionData"), (f"{SESSION}/scans/4", "xnat:mrScanData")):
            session.put(url + path, params={"xsiType": kind}, timeout=30).raise_for_status()


def deliver(there: XNATRaw, what: Manifest) -> str:
    """As the Shipper does: look, send, look, end, prove; how it was proved."""
    while lacking := there.missing(what, None):
        there.send(what, lacking)
    return there.prove(what, there.finish(what))[0].how


def raw_delivery(_: Corpus, folder: Path, quick: bool) -> Section:
    """MB/s from file to proof, over HTTP on the loopback."""
    path = folder / "MID00358_0123456789ab.dat"
    make(path, 100_000_000 if quick else 2_000_000_000, 32, 512)
    runs: list[Run] = []
    for _ in range(1 if quick else ROUNDS):
        runs += [_one(way, path, folder) for way in (CURL, *WAYS)]
    path.unlink()
    found = {way: Medians(runs, "raw", way) for way in (CURL, *WAYS)}
    rows = [[way, "", show(one.speed), ratio(one.speed, found[CURL].speed), f"{one.cpu_gb:.2f}", show(one.largest)]
            for way, one in found.items()]
    columns = ["way", "", "MB/s", "of curl's", "CPU s/GB", "MB"]
    table = Table(f"Raw data into XNAT, {show(runs[0].bytes / 1e9)} GB, loopback", columns, rows, [
        "curl sends and proves nothing; the agent looks first, sends, looks, and proves by MD5",
        "client and stand-in share the machine; the stand-in takes the MD5 of what it stores"])
    best = max(found[ONE].speed, found[PIECES].speed) / found[CURL].speed
    return Section("raw-delivery", [table], [Target("delivery with proof against curl", best, 0.8)], runs)


def _one(way: str, path: Path, folder: Path) -> Run:
    data, port = folder / "central", folder / "port"
    server = subprocess.Popen([sys.executable, "-m", "tests.central", "--data", str(data), "--port-file", str(port),
                               "--user", "relay:secret"], cwd=PROJECT, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{wait_for(lambda: port.exists() and port.read_text())}"
        prepare(url)
        if way == CURL:
            place = f"{url}{SESSION}/scans/4/resources/KSPACE/files/{path.name}?inbody=true"
            began = time.perf_counter()
            subprocess.run(["curl", "-sS", "--fail", "--noproxy", "*", "-u", "relay:secret", "-T", str(path), "-H",
                            "Content-Type: application/octet-stream", place], check=True, capture_output=True)
            return Run("raw-delivery", "raw", way, 1, path.stat().st_size, time.perf_counter() - began, 0.0, 0, 0)
        done = subprocess.run([sys.executable, "-m", "tests.bench.raw_delivery", url, str(path), str(folder / "box"),
                               json.dumps(WAYS[way])], cwd=PROJECT, check=True, capture_output=True, text=True)
        took, cpu, largest = json.loads(done.stdout)
        return Run("raw-delivery", "raw", way, 1, path.stat().st_size, took, cpu, largest, 0)
    finally:
        server.terminate()
        server.wait(30)
        subprocess.run(["rm", "-rf", str(data), str(port), str(folder / "box")], check=True)


def main(url: str, path: str, folder: str, kspace: str) -> None:
    """Deliver in a process of its own; prints seconds, CPU seconds and peak memory."""
    what = manifest(Path(path))
    there = destination(url, Path(folder), **json.loads(kspace))
    start, used = time.perf_counter(), time.process_time()
    assert deliver(there, what) == "md5"
    took = [time.perf_counter() - start, time.process_time() - used]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    largest = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([*took, int(largest.split()[1]) * 1024]))


if __name__ == "__main__":
    main(*sys.argv[1:])
