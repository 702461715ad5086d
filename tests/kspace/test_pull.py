"""Raw data pulled from a real SSH server: complete, without disturbing a scan, and with words for all that fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from relay_agent.config import ConfigError
from relay_agent.kspace import pull
from relay_agent.kspace.keep import hidden
from relay_agent.kspace.pull import Puller
from relay_agent.kspace.remote import Entry, Failed, Interrupted, Remote
from tests.harness import wait_for
from tests.kspace.imager import Imager
from tests.kspace.path import RawBox, exam, raw, settings
from tests.small_disk import small_disk

pytestmark = pytest.mark.slow  # a real server, and files that have to be at rest for some time
METHODS = ("sftp", "rsync")
LARGE = 20_000_000


@pytest.fixture
def imager(tmp_path: Path) -> Iterator[Imager]:
    with Imager(tmp_path / "imager") as found:
        yield found


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class PullBox(RawBox):
    """A box whose puller takes steps when it is told to."""

    def __init__(self, place: Path, imager: Imager, kspace: str = "", **changes: Any) -> None:
        super().__init__(place, settings(kspace=kspace, source=imager.table(**changes)))
        self.stop = threading.Event()
        self.puller = Puller(self.config, self.ledger, self.config.kspace.source[0], self.stop)

    def steps(self, count: int = 2) -> None:
        for _ in range(count):
            self.puller.step()

    @property
    def landed(self) -> dict[str, bytes]:
        """What was put into the landing directory."""
        return {path.name: path.read_bytes() for path in self.landing.glob("*") if not path.name.startswith(".")}

    @property
    def partial(self) -> list[int]:
        """Bytes of files that are not whole yet."""
        return [path.stat().st_size for path in self.landing.glob(".*.part")]

    def when_begun(self, action: Callable[[], object]) -> threading.Thread:
        """Do something in the middle of the first file that is fetched."""
        def watch() -> None:
            with suppress(FileNotFoundError):
                wait_for(lambda: sum(self.partial) > 500_000, 60)
            action()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def row(self, name: str) -> Any:
        return self.ledger.one("SELECT * FROM listed WHERE name = ?", hidden(self.puller._key, "file", name))


Make = Callable[..., PullBox]


@pytest.fixture
def box(tmp_path: Path, imager: Imager) -> Make:
    return lambda **changes: PullBox(tmp_path / "box", imager, **changes)


def test_fetched_when_nothing_changes_and_then_picked_up(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method)
    content = raw()
    odd = 'meas "1" [2] *ü.dat'
    imager.write("meas_MID00358.dat", content, age=7200)
    imager.write(odd, raw(uid=359))
    imager.write("notes.txt", b"not raw data")
    imager.write(".hidden.dat", content)
    (imager.raw / "folder.dat").mkdir()
    made.steps(1)
    assert made.landed == {}  # one list tells nothing of whether a scan runs
    assert made.row("meas_MID00358.dat")["fetched"] is None
    made.steps(1)
    assert set(made.landed) == {"meas_MID00358.dat", odd}
    assert made.landed["meas_MID00358.dat"] == content
    row = made.row("meas_MID00358.dat")
    assert row["fetched"] and row["size"] == len(content) and abs(row["changed"] - time.time() + 7200) < 90
    assert made.puller.trouble == "" and made.partial == []
    made.work()
    assert made.ledger.value("SELECT count(*) FROM raw WHERE verdict = 'complete'") == 2
    made.steps(2)
    assert made.landed == {}  # what was fetched once is not fetched again
    imager.write("meas_MID00358.dat", raw(uid=400))  # the name is used again
    made.steps(3)
    assert set(made.landed) == {"meas_MID00358.dat"}
    assert (imager.raw / "meas_MID00358.dat").exists()  # nothing is ever deleted over there


def test_names_are_not_in_the_ledger_nor_in_the_log(box: Make, imager: Imager, method: str,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    made = box(method=method)
    imager.write("Quellenhofer.dat", raw())
    imager.write("Quellenhofer2.dat", raw(uid=9)).chmod(0o644)
    made.steps(3)
    assert len(made.landed) == 2
    made.puller._last = None
    (imager.raw / "Quellenhofer.dat").unlink()
    with pytest.raises(Failed) as caught:
        made.puller._remote.fetch(Entry("Quellenhofer.dat", 5, 0.0), made.landing / ".x.part", None, lambda: True)
    assert "Quellenhofer" not in str(caught.value) + caplog.text + str(
        [tuple(row) for table in ("listed", "event") for row in made.ledger.all(f"SELECT * FROM {table}")])


def test_nothing_while_a_file_grows(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method)
    imager.write("old.dat", raw(uid=1))
    content = raw(uid=2)
    for part in range(1, 5):
        imager.write("new.dat", content[:len(content) * part // 5], age=0)
        made.steps(1)
        assert made.landed == {}, part
    imager.write("new.dat", content, age=0)
    made.steps(1)
    assert made.landed == {}
    made.steps(1)
    assert made.landed == {"old.dat": raw(uid=1), "new.dat": content}


def test_nothing_while_the_list_shows_a_running_scan(box: Make, imager: Imager) -> None:
    made = box(list_command=f"cat '{imager.folder}/list'")
    imager.write("meas.dat", raw())
    listed = imager.folder / "list"
    listed.write_text("    355    104   t1_mprage   xxx   wip   0   0  26.11.2026 00:00:01\n")
    made.steps(3)
    assert made.landed == {}
    listed.write_text("    355    104   t1_mprage   xxx   ok   100   100  26.11.2026 00:00:01\n")
    made.steps(1)
    assert set(made.landed) == {"meas.dat"}
    listed.unlink()
    made.steps(1)  # it is not known whether a scan runs
    assert "not there" in made.puller.trouble


def test_names_that_cannot_be_fetched_are_told(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method)
    imager.write("good.dat", raw())
    for name in (b"back\\slash.dat", b"latin\xfc.dat"):
        (Path(os.fsdecode(os.fsencode(imager.raw) + b"/" + name))).write_bytes(b"x" * 100)
    made.steps(2)
    assert set(made.landed) == {"good.dat"}
    assert made.puller.trouble.startswith("2 files of prisma have names")


def test_a_lock_beside_it(box: Make, imager: Imager) -> None:
    made = box()
    imager.write("meas.dat", raw())
    lock = imager.write("meas.dat.lock", b"")
    made.steps(3)
    assert made.landed == {}
    lock.unlink()
    made.steps(2)
    assert set(made.landed) == {"meas.dat"}


def test_stops_when_a_scan_begins_and_goes_on_later(box: Make, imager: Imager, method: str) -> None:
    """The list is looked at while a large file is fetched; what came of it is kept."""
    made = box(method=method, bandwidth="16 Mbit/s", poll="300 ms")
    content = os.urandom(LARGE)
    imager.write("large.dat", content)
    made.steps(1)
    begins = made.when_begun(lambda: imager.write("scan.dat", b"begins", age=0))
    made.steps(1)
    begins.join()
    (here,) = made.partial
    assert 0 < here < LARGE and made.landed == {}
    (imager.raw / "scan.dat").unlink()
    object.__setattr__(made.puller._settings, "bandwidth", None)
    made.puller._throttle = pull.Throttle(None)
    before = os.stat(next(made.landing.glob(".*.part"))).st_ino
    made.steps(3)
    assert made.landed == {"large.dat": content}
    assert os.stat(made.landing / "large.dat").st_ino == before


def test_bandwidth(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method, bandwidth="16 Mbit/s")
    imager.write("large.dat", os.urandom(6_000_000))
    made.steps(1)
    began = time.monotonic()
    made.steps(1)
    assert set(made.landed) == {"large.dat"}
    assert time.monotonic() - began > 2.0  # 3 s at 2 MB/s, less what the programs let through at once


def test_connection_is_cut(box: Make, imager: Imager, method: str) -> None:
    """The server dies in the middle: the next time it goes on where it was."""
    made = box(method=method, bandwidth="16 Mbit/s", poll="60 s")
    content = os.urandom(LARGE)
    imager.write("large.dat", content)
    made.steps(1)
    cut = made.when_begun(imager.stop)
    made.steps(1)
    cut.join()
    assert "cannot be fetched from 127.0.0.1" in made.puller.trouble
    (here,) = made.partial
    assert 0 < here < LARGE
    made.steps(1)
    assert "nothing listens there" in made.puller.trouble
    imager.start()
    made.puller._throttle = pull.Throttle(None)
    made.steps(2)
    assert made.landed == {"large.dat": content} and made.puller.trouble == ""


def test_beginning_of_another_version_is_not_gone_on_with(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method)
    imager.write("meas.dat", raw(uid=1))
    made.steps(1)
    entry = Entry("meas.dat", 4, 1.0)
    made.landing.mkdir(parents=True, exist_ok=True)
    name = hidden(made.puller._key, "file", "meas.dat")
    (made.landing / f".{name}-{entry.size}-{entry.changed:.0f}.part").write_bytes(b"old")
    made.steps(1)
    assert made.landed == {"meas.dat": raw(uid=1)}


def test_changed_while_it_was_fetched(box: Make, imager: Imager, monkeypatch: pytest.MonkeyPatch) -> None:
    made = box()
    imager.write("meas.dat", raw(uid=1))
    made.steps(1)
    fetch = Remote.fetch

    def meanwhile(self: Remote, *arguments: Any) -> None:
        fetch(self, *arguments)
        imager.write("meas.dat", raw(uid=2), age=0)
        monkeypatch.undo()

    monkeypatch.setattr(Remote, "fetch", meanwhile)
    made.steps(1)
    assert made.landed == {} and made.partial == []
    made.steps(2)
    assert made.landed == {"meas.dat": raw(uid=2)}


def test_not_whole_over_there(box: Make, imager: Imager, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fetched again, in case that its writer ends it; in the end it is taken as it is and shown."""
    monkeypatch.setattr(pull, "_AGAIN", 0.0)
    made = box(method=method)
    content = raw()
    imager.write("cut.dat", content[:-5000])
    imager.write("later.dat", content[:-5000])
    made.steps(2)
    assert made.landed == {} and made.row("cut.dat")["attempts"] == 1
    assert "measurement" in made.row("cut.dat")["error"]
    imager.write("later.dat", content)
    made.steps(2)
    assert set(made.landed) == {"later.dat"}
    made.steps(2)
    assert made.landed == {"cut.dat": content[:-5000], "later.dat": content}
    made.steps(3)
    assert made.row("cut.dat")["attempts"] == 3 and made.row("cut.dat")["fetched"]


def test_found_incomplete_by_pick_up_is_fetched_again(box: Make, imager: Imager, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    """A hole that headers do not show: only the pass over all readouts finds it."""
    monkeypatch.setattr(pull, "_AGAIN", 0.0)
    made = box(kspace='incomplete_after = "0 s"')
    whole = raw()
    broken = bytearray(whole)
    broken[-900:-600] = bytes(300)
    imager.write("meas.dat", bytes(broken))
    made.steps(2)
    assert set(made.landed) == {"meas.dat"}
    made.work()
    assert made.ledger.value("SELECT count(*) FROM raw WHERE verdict = 'incomplete'") == 1
    assert made.landed == {}
    imager.write("meas.dat", whole, age=3600.0)
    os.utime(imager.raw / "meas.dat", (1e9, 1e9))
    broken_again = imager.write("meas.dat", bytes(broken))
    made.steps(3)
    assert set(made.landed) == {"meas.dat"} and broken_again.exists()


def test_only_what_sessions_need(box: Make, imager: Imager) -> None:
    made = box(everything=False, smallest="1 kB")
    imager.write("before.dat", raw(uid=1), age=3 * 86400)
    imager.write("of_the_session.dat", raw(uid=2), age=3600)
    imager.write("small.dat", b"x" * 999)
    imager.write("meas_MID3000123_FID1.dat", raw(uid=3))
    made.steps(2)
    assert made.landed == {} and made.ledger.value("SELECT count(*) FROM listed WHERE wanted") == 0
    made.dicom(exam())
    made.steps(2)
    assert set(made.landed) == {"of_the_session.dat"}


def test_overwritten_before_it_was_fetched(box: Make, imager: Imager, caplog: pytest.LogCaptureFixture) -> None:
    made = box(windows=[{"start": "00:00", "end": "00:01"}]) if time.localtime().tm_hour else box(
        windows=[{"start": "12:00", "end": "12:01"}])
    imager.write("lost.dat", raw())
    assert made.puller.step() == 1.0
    made.steps(1)
    assert made.landed == {} and made.puller.trouble == ""  # listed in all hours, fetched in none of these
    (imager.raw / "lost.dat").unlink()
    made.steps(1)
    assert made.ledger.value("SELECT what FROM event WHERE what LIKE '%never fetched%'").startswith("1 files")
    assert "never fetched" in caplog.text
    assert made.ledger.value("SELECT count(*) FROM listed") == 0


def test_no_room(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method, kspace='quota = "1 MB"')
    imager.write("large.dat", os.urandom(2_000_000))
    made.steps(2)
    assert made.landed == {} and made.partial == []
    assert "there is room for" in made.puller.trouble


def test_disk_full(imager: Imager, tmp_path: Path, method: str) -> None:
    """The disk of the box fills although there was room: told, nothing half lands, and later it goes on."""
    disk = tmp_path / "disk"
    with small_disk(disk, "12m"):
        made = PullBox(disk / "box", imager, method=method)
        imager.write("meas.dat", raw())
        imager.write("large.dat", os.urandom(4_000_000), age=60)
        made.steps(1)
        room = os.statvfs(disk)
        (disk / "others").write_bytes(bytes(room.f_bavail * room.f_frsize - 1_500_000))
        object.__setattr__(made.config.kspace, "reserve", -(10**9))  # what room tells is overtaken by others
        made.steps(1)
        assert set(made.landed) == {"meas.dat"}
        assert "the disk of this box is full" in made.puller.trouble
        (disk / "others").unlink()
        made.steps(3)
        assert set(made.landed) == {"meas.dat", "large.dat"}


@pytest.mark.parametrize(("change", "words"), [
    ({"host_key": "ssh-ed25519 " + "A" * 68}, "host key"), ({"key": "stranger"}, "the key is refused"),
    ({"port": 1}, "nothing listens there"), ({"folder": "/nowhere"}, "not there"),
    ({"host": "no-such-host.invalid"}, "cannot be resolved"), ({"key": "sshd.log"}, "no private key"),
    ({"key": "sshd_config"}, "may be read by others"),
    ({"key": "nothing"}, "not there"), ({"user": "nobody-of-that-name"}, "the key is refused")])
def test_words(box: Make, imager: Imager, method: str, change: dict[str, Any], words: str) -> None:
    if "key" in change:
        change = {"key": str(imager.folder / change["key"])}
        (imager.folder / "sshd.log").chmod(0o600)
    made = box(method=method, **change)
    made.steps(1)
    assert words in made.puller.trouble
    assert made.puller.trouble.startswith("raw data of prisma cannot be fetched from ")


def test_another_machine_answers(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method)
    imager.write("meas.dat", raw())
    made.steps(1)
    imager.stop()
    imager.start("host2")
    made.steps(2)
    assert "its host key is not the one" in made.puller.trouble and made.landed == {}


def test_pauses_grow_while_it_is_away(box: Make, imager: Imager) -> None:
    made = box(poll="10 s")
    imager.stop()
    assert [made.puller.step() for _ in range(4)] == [10, 20, 40, 80]
    imager.start()
    assert made.puller.step() == 10


def test_credential_is_looked_up(box: Make, imager: Imager, monkeypatch: pytest.MonkeyPatch) -> None:
    made = box(key="client")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    made.steps(1)
    assert "give an absolute path" in made.puller.trouble
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(imager.folder))
    imager.write("meas.dat", raw())
    made.steps(2)
    assert set(made.landed) == {"meas.dat"} and made.puller.trouble == ""


def test_ends_with_the_service(box: Make, imager: Imager, method: str) -> None:
    made = box(method=method, bandwidth="8 Mbit/s", poll="200 ms")
    imager.write("large.dat", os.urandom(LARGE))
    thread = threading.Thread(target=made.puller.run)
    thread.start()
    made.when_begun(made.stop.set).join()
    thread.join(30)
    assert not thread.is_alive()
    assert made.landed == {}


def test_interrupted_is_no_failure(box: Make, imager: Imager) -> None:
    made = box()
    imager.write("large.dat", os.urandom(LARGE))
    entry = made.puller._remote.entries()[0]
    made.landing.mkdir(parents=True, exist_ok=True)
    with pytest.raises(Interrupted):
        made.puller._remote.fetch(entry, made.landing / ".x.part", 1e6, lambda: False)
    with pytest.raises(ConfigError):
        Remote(made.puller._settings.model_copy(update={"key": "bare"}), made.landing).entries()
