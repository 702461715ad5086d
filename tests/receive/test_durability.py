"""What was acknowledged stays: synced before the answer, kept through full disks, kill -9 and power cuts."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from relay_agent import journal
from relay_agent.book import reconcile
from relay_agent.ledger import Ledger
from relay_agent.spool import Spool
from tests import data, peers
from tests.harness import PATIENCE, Agent, running, wait_for
from tests.receive import proof, scu

WAYS = {"journal": "8 MiB", "files": "0 B"}  # small instances by way of the journal, or each straight into its file


def receive(journal: str = "8 MiB", reserve: str = "10 MB", processes: int = 2) -> str:
    """Settings."""
    return f'[receive]\nreserve = "{reserve}"\nprocesses = {processes}\njournal = "{journal}"'


# Synced before answered

_CALL = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_PATH = re.compile(r"\d+<([^>]*)>")
RESPONSE = "\\x00\\x00\\x00\\x01\\x02\\x00\\x00\\x00\\x01\\x80"  # (0000,0100) = C-STORE-RSP
SUCCESS = "\\x00\\x00\\x00\\x09\\x02\\x00\\x00\\x00\\x00\\x00"  # (0000,0900) = 0000


@dataclass(frozen=True)
class Call:
    """A system call. The moments here are lines of the trace."""

    name: str
    arguments: str
    began: int
    result: str = ""  # none yet at its beginning


@dataclass
class File:
    """A file or folder, whatever descriptors and names it has."""

    folder: str = ""  # of its latest name; none when it was there before the trace
    named: int = -1
    written: dict[str, int] = field(default_factory=dict)  # marker: when it was in the file
    synced: int = -1  # when the latest sync that succeeded had begun


def calls(trace: str) -> Iterator[tuple[int, Call]]:
    """Each call when it begins and when it has ended: one that blocked has two lines in a trace."""
    blocked: dict[str, Call] = {}
    for line, text in enumerate(trace.splitlines()):
        found = _CALL.fullmatch(text)
        if not found:
            continue
        thread, resumed, name, rest = found.groups()
        if resumed:
            if thread not in blocked:
                continue
            call = blocked.pop(thread)
            rest = call.arguments + rest
        else:
            call = Call(name, rest.removesuffix("<unfinished ...>"), line)
            yield line, call
            if rest.endswith("<unfinished ...>"):
                blocked[thread] = call
                continue
        arguments, _, result = rest.rpartition(" = ")
        yield line, replace(call, arguments=arguments, result=result)


def unsynced(trace: str, markers: list[str]) -> list[str]:
    """What was answered before it was safe. ``markers`` are byte strings that only one instance each has in it.

    Safe is: one of the files that have the marker was synced by a sync that began after the marker was written; and
    when that file is a new one, so was the folder, by a sync that began after the file got its name. Names that
    others give in the same folder meanwhile are no matter.
    """
    files: defaultdict[str, File] = defaultdict(File)  # by every path they had

    def safe(file: File, marker: str) -> bool:
        return file.synced > file.written.get(marker, len(trace)) and \
            (not file.folder or files[file.folder].synced > file.named)

    faults = []
    answered = 0
    for line, call in calls(trace):
        path = _PATH.match(call.result if call.name == "openat" else call.arguments)
        if not call.result:
            if call.name in ("sendto", "sendmsg", "write") and RESPONSE in call.arguments:
                if SUCCESS not in call.arguments:
                    faults.append("not a success")
                if not any(safe(file, markers[answered]) for file in [*files.values()]):
                    faults.append(f"answer {answered} was sent before its instance was safe")
                answered += 1
        elif not call.result[0].isdigit():  # it failed
            continue
        elif call.name == "openat" and path and "O_CREAT" in call.arguments:
            files[path[1]] = File(str(Path(path[1]).parent), line)
        elif call.name in ("link", "linkat", "rename", "renameat", "renameat2"):
            source, target = re.findall(r'"([^"]*)"', call.arguments)
            files[target] = files[source]
            files[target].folder, files[target].named = str(Path(target).parent), line
        elif call.name in ("write", "writev", "pwrite64", "pwritev", "pwritev2") and path:
            files[path[1]].written |= {marker: line for marker in markers if marker in call.arguments}
        elif call.name in ("fsync", "fdatasync") and path:
            files[path[1]].synced = max(files[path[1]].synced, call.began)
    if answered != len(markers):
        faults.append(f"{answered} answers for {len(markers)} instances")
    return faults


def without_syncs(trace: str, path: str) -> str:
    """The same account without the syncs of such files; ``path`` is a regular expression."""
    return re.sub(rf"^\d+ +f(?:data)?sync\(\d+<{path}>.*\n", "", trace, flags=re.MULTILINE)


_NEW, _OTHER, _RING = "/spool/05/.partial-1", "/spool/05/b.dcm", "/journal/ring-0"
_EVENTS = {
    "create": f'1 openat(AT_FDCWD</>, "{_NEW}", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0640) = 11<{_NEW}>',
    "write": f'1 writev(11<{_NEW}>, [{{iov_base="MARKER", iov_len=6}}], 1) = 6',
    "link": f'1 link("{_NEW}", "/spool/05/a.dcm") = 0',
    "file": f"1 fsync(11<{_NEW}>(deleted)) = 0",
    "folder": "1 fsync(12</spool/05>) = 0",
    "answer": f'1 sendto(3<socket:[7]>, "{RESPONSE}{SUCCESS}", 170, 0, NULL, 0) = 170',
    "ring": f'1 pwritev2(4<{_RING}>, [{{iov_base="MARKER", iov_len=6}}], 1, 4096, 0) = 6',
    "sync-ring": f"1 fdatasync(4<{_RING}>) = 0",
    # By another thread
    "other": f'2 openat(AT_FDCWD</>, "{_OTHER}", O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0640) = 13<{_OTHER}>',
    "place": f'2 write(13<{_OTHER}>, "MARKER", 6) = 6',
    "number-again": f"2 fsync(11<{_OTHER}>) = 0",
    "file...": f"2 fsync(11<{_NEW}> <unfinished ...>",
    "folder...": "2 fsync(12</spool/05> <unfinished ...>",
    "sync-ring...": f"2 fdatasync(4<{_RING}> <unfinished ...>",
    "...done": "2 <... fsync resumed>) = 0",
    "...failed": "2 <... fsync resumed>) = -1 EIO (Input/output error)",
}


@pytest.mark.parametrize(("events", "guilty"), [
    ("create write link file folder answer", False),
    ("create write link file folder other answer", False),  # somebody else's name
    ("create write link file... folder ...done answer", False),
    ("create write link folder answer file", True),
    ("create write link file answer folder", True),
    ("create write link file... folder answer ...done", True),
    ("create write link file... folder ...failed answer", True),
    ("create file... write link ...done folder answer", True),
    ("create write folder... link ...done file answer", True),
    ("create write link other number-again folder answer", True),
    ("ring sync-ring answer", False),
    ("ring sync-ring other place answer", False),
    ("ring answer sync-ring", True),
    ("sync-ring... ring ...done answer", True),
    ("ring sync-ring... answer ...done", True),
])
def test_the_judge_follows_each_file(events: str, guilty: bool) -> None:
    """What counts is the file and its own name, and when a sync began."""
    trace = "\n".join(_EVENTS[event] for event in events.split())
    assert unsynced(trace, ["MARKER"]) == ["answer 0 was sent before its instance was safe"] * guilty


def hexed(raw: bytes) -> str:
    """As strace -xx writes it."""
    return "".join(f"\\x{byte:02x}" for byte in raw)


@pytest.mark.parametrize("way", WAYS)
def test_synced_before_answered(tmp_path: Path, way: str) -> None:
    """The kernel's own account: for each C-STORE a successful sync of file and name comes before the answer's bytes."""
    strace = peers.needed("strace")
    with running(Agent(tmp_path, receive(WAYS[way], processes=1)), "receive") as agent:
        (child,) = proof.children(agent.processes["receive"].pid)
        output = tmp_path / "trace"
        tracer = subprocess.Popen(
            [strace, "-f", "-y", "-xx", "-s", "900", "-o", str(output), "-p", str(child), "-e", "trace=openat,link,"
             "linkat,rename,renameat,renameat2,write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,"
             "sendto,sendmsg"], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            proof.not_permitted(f"tracing is not permitted: {said.strip()}")
        markers = [os.urandom(12) for _ in range(12)]
        with scu.SCU(agent.port) as peer:
            peer.associate()
            for number, marker in enumerate(markers):
                # Every fourth is too large for the journal, which is another way to the disk.
                size = (900, 900) if number % 4 == 3 else (16, 16)
                image = data.instance(size=size)
                image.PixelData = marker + image.PixelData[12:]
                assert peer.store(image.SOPInstanceUID, marker + scu.encode(image)) == 0
            peer.release()
        tracer.send_signal(signal.SIGINT)
        tracer.wait(PATIENCE)
        trace = decoded(output.read_text())
        assert unsynced(trace, [hexed(marker) for marker in markers]) == []
        # The judge must be able to find somebody guilty: the same account without its syncs, or without the folders'.
        straight = range(12) if way == "files" else range(3, 12, 4)
        for path, harmed in ((r"[^>]*", range(12)), (r"[^>]*/spool/RELAY/\d{8}/\d\d", straight)):
            assert unsynced(without_syncs(trace, path), [hexed(marker) for marker in markers]) == [
                f"answer {number} was sent before its instance was safe" for number in harmed]


def decoded(trace: str) -> str:
    """Paths, which -xx writes in hexadecimal too, as text again."""
    def path(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"\\x(..)", lambda byte: chr(int(byte[1], 16)), found[2]) + found[3]

    trace = re.sub(r"(<)((?:\\x..)+)(>)", path, trace)
    return re.sub(r"^(\d+ +(?:openat|link|linkat|rename\w*)\(.*)$",
                  lambda line: re.sub(r'(")((?:\\x..)+)(")', path, line[1]), trace, flags=re.MULTILINE)


# Full and read-only disks

@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A real ext4 of that size, or a tmpfs where there are no loop devices; needs root."""
    folder.mkdir(parents=True)
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    done = None
    if shutil.which("mkfs.ext4", path="/usr/sbin:/sbin"):
        proof.run("mkfs.ext4", "-q", "-m", "0", image)
        done = proof.run("mount", "-o", "loop", image, folder, check=False)
    if done is None or done.returncode != 0:
        done = proof.run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder, check=False)
    if done.returncode != 0:
        proof.not_permitted(f"a small file system cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        proof.run("umount", "--lazy", folder)  # this process may still have the ledger open


def free(folder: Path) -> int:
    """Free bytes."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def store_until_refused(agent: Agent, size: tuple[int, int], most: int = 200) -> tuple[list[str], list[int]]:
    """Send until three were refused; UIDs that were acknowledged, and the statuses of the others."""
    taken, refused = [], []
    with scu.SCU(agent.port) as peer:
        peer.associate()
        for _ in range(most):
            image = data.instance(size=size)
            status = peer.store(image.SOPInstanceUID, scu.encode(image))
            if status:
                refused.append(status)
                if len(refused) == 3:
                    break
            else:
                taken.append(str(image.SOPInstanceUID))
        peer.release()  # refusals do not cost the association
    return taken, refused


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(100, 100), (900, 900)], ids=["small", "large"])
def test_the_reserve_is_kept(tmp_path: Path, way: str, size: tuple[int, int]) -> None:
    """A700 while there is still room: the ledger, the system and what is on its way never find a full disk."""
    with small_disk(tmp_path / "box" / "data", 64) as disk:
        agent = Agent(tmp_path / "box", receive("4 MiB" if way == "journal" else "0 B", reserve="30 MB"))
        with running(agent, "receive"):
            if way == "journal":
                rings = agent.config.journal
                wait_for(lambda: sum(ring.stat().st_size for ring in rings.glob("ring-*")) == 8 * 2**20)
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(max(free(disk) - 36_000_000, 0)))
            assert free(disk) > 33_000_000
            taken, refused = store_until_refused(agent, size, 1000)
            assert refused == [0xA700] * 3 and taken
            assert free(disk) > 30_000_000 - 8_000_000, "the reserve was used up"
            before = set(proof.all_rows(agent, taken))
            ballast.unlink()
            again, refused = store_until_refused(agent, size, 3)
            assert len(again) == 3 and not refused
            proof.all_rows(agent, [*before, *again])
            assert proof.intact(agent) == len(taken) + 3


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_is_really_full(tmp_path: Path, way: str) -> None:
    """No reserve, not a block left: A700, no debris, nothing lost that was acknowledged, and on it goes with room."""
    with small_disk(tmp_path / "box" / "data", 48) as disk:
        agent = Agent(tmp_path / "box", receive("4 MiB" if way == "journal" else "0 B", reserve="1 B", processes=1))
        with running(agent, "receive"):
            first, _ = store_until_refused(agent, (100, 100), 20)
            proof.all_rows(agent, first)
            ballast = disk / "ballast"
            with ballast.open("wb") as file, contextlib.suppress(OSError):
                file.truncate(0)
                while True:
                    os.write(file.fileno(), bytes(65536))
            taken, refused = store_until_refused(agent, (300, 300), 300)
            assert refused == [0xA700] * 3
            _, refused = store_until_refused(agent, (900, 900), 3)
            assert refused == [0xA700] * 3
            assert not proof.partials(agent)
            ballast.unlink()
            again, refused = store_until_refused(agent, (300, 300), 5)
            assert len(again) == 5 and not refused
            proof.all_rows(agent, [*first, *taken, *again])
            assert proof.intact(agent) == len(first) + len(taken) + len(again)


def test_an_object_that_does_not_fit(tmp_path: Path) -> None:
    """The disk fills in the middle of one object: A700 at its end, not a byte of it left, a smaller one still fits."""
    with small_disk(tmp_path / "box" / "data", 48):
        agent = Agent(tmp_path / "box", receive("0 B", reserve="1 B", processes=1))
        with running(agent, "receive"), scu.SCU(agent.port) as peer:
            before = free(agent.config.data)
            peer.associate()
            peer.begin("1.2.3.4.5")
            peer.data(bytes(200_000) for _ in range(500))
            assert peer.status() == 0xA700
            assert not proof.partials(agent) and free(agent.config.data) > before - 2_000_000
            image = data.instance()
            assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
            peer.release()
            assert proof.intact(agent) == 1


def test_a_disk_that_became_read_only(tmp_path: Path) -> None:
    """As after an I/O error: C000 family, nothing acknowledged, and it goes on when the disk is well again."""
    agent = Agent(tmp_path, receive("0 B"))
    agent.config.spool.mkdir(parents=True)
    if proof.run("mount", "--bind", agent.config.spool, agent.config.spool, check=False).returncode != 0:
        proof.not_permitted("mounting is not permitted")
    try:
        with running(agent, "receive"):
            first, _ = store_until_refused(agent, (100, 100), 5)
            proof.all_rows(agent, first)
            proof.run("mount", "-o", "remount,ro,bind", agent.config.spool)
            for size in ((20, 20), (900, 900)):
                taken, refused = store_until_refused(agent, size, 3)
                assert not taken and len(refused) == 3 and all(0xC000 <= status <= 0xCFFF for status in refused)
            proof.run("mount", "-o", "remount,rw,bind", agent.config.spool)
            again, refused = store_until_refused(agent, (100, 100), 5)
            assert len(again) == 5 and not refused
            proof.all_rows(agent, again)
            assert proof.intact(agent) == 10
    finally:
        proof.run("umount", "--lazy", agent.config.spool)


# kill -9 and power cuts

@pytest.fixture
def leftovers() -> Iterator[list[Agent]]:
    """Agents that a test started and stopped by itself; whatever is left of them ends with the test."""
    agents: list[Agent] = []
    yield agents
    for agent in agents:
        agent.stop(kill=True)


def kill(agent: Agent) -> None:
    """kill -9 of every receiving process, and wait until the kernel has done with them, as systemd does."""
    pids = [agent.processes["receive"].pid, *proof.children(agent.processes["receive"].pid)]
    agent.stop("receive", kill=True)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), say="a killed process is still there")


class Sender(threading.Thread):
    """Sends until the connection breaks, and remembers what was acknowledged."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__()
        self._port = port
        self._random = random.Random(seed)
        self.acknowledged: list[str] = []

    def run(self) -> None:
        """Small, middle and large objects in any order."""
        with contextlib.suppress(OSError, AssertionError), scu.SCU(self._port) as peer:
            peer.associate()
            while True:
                size = self._random.choice(((32, 32), (64, 64), (64, 64), (256, 256), (900, 900)))
                image = data.instance(size=size, number=self._random.randrange(10**6))
                if peer.store(image.SOPInstanceUID, scu.encode(image)) != 0:
                    break
                self.acknowledged.append(str(image.SOPInstanceUID))


@pytest.mark.slow
def test_killed_at_random_points(tmp_path: Path, leftovers: list[Agent]) -> None:
    """Twelve times kill -9 of all processes while three associations send: not one acknowledged instance is missing.

    The journal is on, off, and so small that it is full most of the time, in turns.
    """
    random_ = random.Random(20260102)
    promised: list[str] = []
    repaired = 0
    for turn in range(12):
        agent = Agent(tmp_path, receive(("8 MiB", "0 B", "256 KiB")[turn % 3]))
        leftovers.append(agent)
        agent.start("receive")
        rows = proof.all_rows(agent, promised)
        repaired += sum(row["via"] == "recovered" for row in rows.values())
        assert len(rows) == len(promised) == len(set(promised))
        assert {row["copies"] for row in rows.values()} <= {1}
        proof.intact(agent)
        senders = [Sender(agent.port, turn * 3 + number) for number in range(3)]
        for sender in senders:
            sender.start()
        enough = random_.randrange(20, 60)
        wait_for(lambda senders=senders, enough=enough: all(sender.acknowledged for sender in senders)
                 and sum(len(sender.acknowledged) for sender in senders) >= enough)
        time.sleep(random_.uniform(0.0, 0.1))
        kill(agent)
        for sender in senders:
            sender.join(PATIENCE)
            promised += sender.acknowledged
    with running(Agent(tmp_path, receive()), "receive") as agent:
        rows = proof.all_rows(agent, promised)
        assert len(rows) == len(promised) and {row["copies"] for row in rows.values()} == {1}
        # What was stored and not yet answered may be there as well: one for each connection that was cut.
        assert proof.intact(agent) <= len(promised) + 12 * 3
    assert repaired > 0, "the kills came too early or too late to tell anything"


def unsynced_files(agent: Agent) -> set[Path]:
    """Files that a power cut may take, because the journal has not synced them yet: on a busy machine not all."""
    found: set[Path] = set()
    for ring in agent.config.journal.glob("ring-*"):
        with ring.open("rb") as file:
            settled = journal._settled(file.fileno())
            found |= {agent.config.spool / record.path for record, _ in journal._records(file.fileno())
                      if record.sequence > settled}
    return found & set(agent.config.spool.rglob("*.dcm"))


def test_power_cut_before_the_files_were_synced(tmp_path: Path, leftovers: list[Agent]) -> None:
    """What only the page cache knew is lost, files and the ledger's last commits: the journal brings both back."""
    agent = Agent(tmp_path, receive("8 MiB"))
    leftovers.append(agent)
    agent.start("receive")
    early, _ = store_until_refused(agent, (64, 64), 5)
    proof.all_rows(agent, early)
    agent.stop("receive")  # in good order: these are synced
    ledger = agent.config.ledger.read_bytes()
    known = set(agent.config.spool.rglob("*.dcm"))
    agent.start("receive")
    late, _ = store_until_refused(agent, (64, 64), 20)
    wait_for(lambda: len(set(agent.config.spool.rglob("*.dcm"))) >= len(known) + 4)
    kill(agent)
    harmed = sorted(unsynced_files(agent) - known)
    for number, path in enumerate(harmed):
        raw = path.read_bytes()
        path.write_bytes((b"", raw[:len(raw) // 2], bytes(len(raw)), raw)[number % 4])
        if number % 4 == 3:
            path.unlink()
    for file in agent.config.data.glob("ledger.sqlite*"):
        file.unlink()
    agent.config.ledger.write_bytes(ledger)
    with running(agent, "receive"):
        rows = proof.all_rows(agent, [*early, *late])
        assert len(rows) == 25 and proof.intact(agent) == 25 and len(harmed) >= 4


def test_power_cut_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """Nobody was told that it is safe: a torn file and a partial one are removed at the start, and said so."""
    agent = Agent(tmp_path, receive("0 B"))
    with running(agent, "receive"):
        kept, _ = store_until_refused(agent, (64, 64), 3)
        proof.all_rows(agent, kept)
    folder = next(agent.config.spool.rglob("*.dcm")).parent
    sample = next(folder.glob("*.dcm"))
    torn = folder / f"{'ab' * 32}.dcm"
    shutil.copy(sample, torn)
    (folder / f"{'cd' * 32}.dcm").write_bytes(b"")
    (folder / ".partial-999999999-00").write_bytes(b"half")
    with running(agent, "receive"):
        assert proof.intact(agent) == 3
        assert not torn.exists()
        assert agent.ledger.value("SELECT count(*) FROM event WHERE what LIKE '%cut off by a crash%'") == 2


@pytest.mark.parametrize("name", ["notes.txt", "lost+found/inode", "RELAY/20260102/05/readme.dcm", "RELAY/x.dcm",
                                  f"NOBODY/20260102/05/{'ef' * 32}.dcm"])
def test_a_stray_file_in_the_spool_stops_nothing(tmp_path: Path, name: str) -> None:
    """Somebody's note, a file system check's finding: what is not ours is left alone, and the box starts."""
    agent = Agent(tmp_path, receive("0 B"))
    stray = agent.config.spool / name
    stray.parent.mkdir(parents=True)
    stray.write_text("not ours")
    with running(agent, "receive"):
        taken, _ = store_until_refused(agent, (64, 64), 2)
        proof.all_rows(agent, taken)
        assert proof.failures(agent.log) == []


def test_one_process_killed(tmp_path: Path) -> None:
    """The other process's association does not notice, a new one takes the dead one's place, nothing is forgotten."""
    with running(Agent(tmp_path, receive()), "receive") as agent:
        master = agent.processes["receive"].pid
        before = proof.children(master)
        with scu.SCU(agent.port) as one, scu.SCU(agent.port) as two:
            sent: dict[int, list[str]] = {1: [], 2: []}
            for number, peer in ((1, one.associate()), (2, two.associate())):
                for _ in range(20):
                    image = data.instance()
                    assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
                    sent[number].append(str(image.SOPInstanceUID))
            os.kill(before[0], signal.SIGKILL)
            lost = []
            for number, peer in ((1, one), (2, two)):
                image = data.instance()
                try:
                    assert peer.store(image.SOPInstanceUID, scu.encode(image)) == 0
                    sent[number].append(str(image.SOPInstanceUID))
                except (OSError, AssertionError):
                    lost.append(number)
            assert len(lost) == 1, "one process served one association each"
            (two if lost == [1] else one).release()
        after = wait_for(lambda: len(c := proof.children(master)) == 2 and c != before and c)
        assert before[0] not in after and before[1] in after
        wait_for(lambda: agent.ledger.value("SELECT count(*) FROM association WHERE ended = 'lost'") == 1)
        for _ in range(4):
            taken, refused = store_until_refused(agent, (64, 64), 3)
            assert len(taken) == 3 and not refused
            sent[1] += taken
        # The worker looks for files without rows every minute; here it is done by hand.
        reconcile(Ledger(agent.config.ledger), Spool(agent.config.spool, 0), agent.config)
        proof.all_rows(agent, [*sent[1], *sent[2]])
        assert proof.intact(agent) == len(sent[1]) + len(sent[2])


def test_stopped_in_good_order(tmp_path: Path, leftovers: list[Agent]) -> None:
    """SIGTERM in the middle of sending: what was acknowledged has its row without any recovery at the next start."""
    agent = Agent(tmp_path, receive())
    leftovers.append(agent)
    agent.start("receive")
    senders = [Sender(agent.port, number) for number in range(3)]
    for sender in senders:
        sender.start()
    wait_for(lambda: all(len(sender.acknowledged) > 5 for sender in senders))
    agent.stop("receive")
    for sender in senders:
        sender.join(PATIENCE)
    promised = [uid for sender in senders for uid in sender.acknowledged]
    rows = {row["sop_instance"]: row for row in Ledger(agent.config.ledger).all("SELECT * FROM instance")}
    assert set(promised) <= set(rows) and len(set(rows) - set(promised)) <= 3
    assert {row["via"] for row in rows.values()} == {"association"}
    assert {row["ended"] for row in agent.ledger.all("SELECT ended FROM association")} == {"aborted"} or \
        agent.ledger.value("SELECT count(*) FROM association WHERE closed IS NULL") == 0
    assert proof.intact(agent) == len(rows) and proof.failures(agent.log) == []
