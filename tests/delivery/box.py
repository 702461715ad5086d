"""What the tests of this folder share: a box that works inside the test, and exact looks at what arrived."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import trustme
from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from relay_agent import dicom, receipt, review, stage
from relay_agent.config import Config
from relay_agent.config_text import toml
from relay_agent.ledger import State, Stop, balance
from relay_agent.purge import purge
from relay_agent.spool import Spool
from relay_agent.worker import Worker
from tests import data
from tests.central import Central
from tests.harness import PATIENCE, SECRET, Agent, wait_for

USER, _, PASSWORD = SECRET.partition(":")
IMPORT = "/data/services/import"
SOON = '[stage]\nquiet = "300 ms"\nlongest = "1 min"\nlanding_stable = "1 s"\nrescan = "2 s"'


def table(kind: str, /, **settings: Any) -> str:
    """One table of the configuration."""
    return "\n".join([f"[[{kind}]]", *(f"{key} = {toml(value)}" for key, value in settings.items())]) + "\n"


def to(url: str, folder: Path, **settings: Any) -> str:
    """A destination that is tried again almost at once; None takes a setting away."""
    found = {"name": "central", "url": url, "credential": str(folder / "secret"), "retry_first": "200 ms",
             "retry_longest": "1 s", "timeout": "20 s"} | settings
    return table("destination", **{key: value for key, value in found.items() if value is not None})


def everything(*destinations: str, **settings: Any) -> str:
    """A route that takes everything."""
    return table("route", **{"name": "all", "destinations": list(destinations or ("central",))} | settings)


def site(folder: Path, **options: Any) -> Central:
    """A central XNAT whose user has the tests' secret; its staff is "staff"."""
    return Central(folder, **{"projects": ["P1", "P2"], "users": {USER: PASSWORD, "staff": "of the centre"},
                              "admins": ["staff"]} | options)


def certificates(folder: Path, *names: str) -> tuple[Path, Path, Path]:
    """A CA made for this test and a server's certificate: CA, certificate and key as files."""
    folder.mkdir(parents=True, exist_ok=True)
    ca = trustme.CA()
    issued = ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
    ca.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
    issued.private_key_pem.write_to_path(folder / "server.key")
    return folder / "ca.pem", folder / "server.pem", folder / "server.key"


def sent_bytes(image: Dataset) -> bytes:
    """The data set of an image as it travels in C-STORE and as it lies in a file."""
    syntax = image.file_meta.TransferSyntaxUID
    encoded = encode(image, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert encoded is not None
    return encoded


def data_sets(files: Sequence[Path]) -> list[str]:
    """SHA-256 of the data set of each file, sorted."""
    return sorted(dicom.data_set_digest(file, dicom.read_meta(file).offset).hex() for file in files)


def digests(images: Sequence[Dataset]) -> list[str]:
    """The same of images that were sent."""
    return sorted(hashlib.sha256(sent_bytes(image)).hexdigest() for image in images)


def archived_files(central: Central, session: str = "S1_MR1", project: str = "P1") -> list[Path]:
    """Every file of an archived session that really lies on the central's disk."""
    return sorted((central.store.root / "archive" / project / "arc001" / session).glob("**/DICOM/*"))


def arrived_exactly(central: Central, images: Sequence[Dataset], session: str = "S1_MR1", project: str = "P1") -> None:
    """The archive holds each of these images once, byte for byte, nothing else, and the prearchive no leftovers."""
    files = archived_files(central, session, project)
    assert len(files) == len(images), f"{len(files)} files in the archive for {len(images)} images"
    assert data_sets(files) == digests(images)
    studies = {str(image.StudyInstanceUID) for image in images}
    left = [row for row in central.prearchive_rows() if row["tag"] in studies]
    assert not left, f"left in the prearchive: {left}"
    sessions = central.store.all("SELECT project, label FROM session WHERE uid IN "
                                 f"({', '.join('?' * len(studies))})", *studies)
    assert [tuple(row) for row in sessions] == [(project, session)]


def requests_for(central: Central, method: str = "POST", path: str = IMPORT) -> list[dict[str, Any]]:
    """The requests that the central saw, of one kind."""
    return [request for request in list(central.requests) if request["method"] == method and request["path"] == path]


def staff(central: Central, method: str, path: str, *, verify: Path | bool = True, **params: str) -> int:
    """What somebody at the central site does there; the answer's status."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, central.url + path, params=params, auth=("staff", "of the centre"),
                               allow_redirects=False, timeout=PATIENCE,
                               verify=str(verify) if verify is not True else True).status_code


class _Worker(Worker):
    """Does no step while something is taken in, however long that takes on a busy machine."""

    def __init__(self, config: Config, taking: threading.Lock) -> None:
        super().__init__(config)
        self._taking = taking

    def step(self) -> int:
        with self._taking:
            return super().step()


class Box(Agent):
    """A box whose worker runs in a thread of the test: the real one, without the cost of a process."""

    worker: Worker

    def __init__(self, folder: Path, settings: str = "", **options: Any) -> None:
        super().__init__(folder, settings, **{"stage": SOON} | options)
        self._book = super().ledger
        self._taking = threading.Lock()

    @property
    def ledger(self) -> Any:
        """One for all questions of the test."""
        return self._book

    @contextmanager
    def working(self) -> Iterator[Box]:
        """The worker works inside this block."""
        self.worker = _Worker(self.config, self._taking)
        thread = threading.Thread(target=self.worker.run, name="worker")
        thread.start()
        try:
            yield self
        finally:
            self.worker.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the worker did not stop"

    def take(self, images: Sequence[Dataset]) -> None:
        """Have images taken in as by ``relay-agent upload``, at once: no session of theirs is complete half way."""
        spool = Spool(self.config.spool, self.config.receive.reserve)
        paths = data.write(list(images), self.folder / "medium")
        with self._taking:
            for path in paths:
                assert stage.take_in(path, self.config.receiver[0].name, spool, self.ledger, "upload") is None
                path.unlink()

    def delivery(self, shipment: int = 1, destination: str = "central") -> Any:
        """The row of a delivery, None before it is there."""
        return self.ledger.one("SELECT d.*, s.state AS shipment_state, s.reason FROM shipment s LEFT JOIN delivery d "
                               "ON d.shipment = s.id AND d.destination = ? WHERE s.id = ?", destination, shipment)

    def wait(self, state: Stop, shipment: int = 1, destination: str = "central") -> Any:
        """Wait until a delivery is in a state; its row."""
        def there() -> Any:
            row = self.delivery(shipment, destination)
            return row if row is not None and row["state"] == state else None

        return self._until(there, state, shipment, destination)

    def _until(self, what: Callable[[], Any], say: str, shipment: int, destination: str = "central") -> Any:
        try:
            return wait_for(what)
        except AssertionError:
            raise AssertionError(f"waited in vain for {say}: "
                                 f"{dict(self.delivery(shipment, destination) or {})}") from None

    def wait_shipment(self, state: State, shipment: int = 1) -> Any:
        """Wait until a shipment is in a state; its row."""
        return self._until(lambda: self.ledger.one("SELECT * FROM shipment WHERE id = ? AND state = ?", shipment,
                                                   state), state, shipment)

    def wait_words(self, words: str, shipment: int = 1, destination: str = "central", attempts: int = 1) -> Any:
        """Wait until a delivery says why it does not get on."""
        def there() -> Any:
            row = self.delivery(shipment, destination)
            return row if row is not None and words in (row["error"] or "") and row["attempts"] >= attempts else None

        return self._until(there, words, shipment, destination)

    def retry(self, shipment: int = 1) -> None:
        """What an operator does with ``relay-agent retry``."""
        review.retry(self.ledger, shipment, "operator")

    def impatiently(self, state: Stop = Stop.VERIFIED, shipment: int = 1) -> Any:
        """Wait for a state with an operator who does not wait for a pause of more than two seconds."""
        def there() -> Any:
            row = self.delivery(shipment)
            if row is not None and row["state"] == state:
                return row
            if row is not None and row["state"] == Stop.WAITING and row["due"] > row["changed"] + 2:
                self.retry(shipment)
            return None

        return self._until(there, state, shipment)

    def all_here(self, images: Sequence[Dataset]) -> None:
        """Nothing was purged, nor would be: every image is in the spool as it came, and the ledger balances."""
        assert purge(self.ledger, Spool(self.config.spool, 0), self.config.deidentified, retention=0.0) == 0
        self.kept(images)

    def kept(self, images: Sequence[Dataset]) -> None:
        """Every image is in the spool as it came, nothing else is, and the ledger balances."""
        files = [self.config.spool / path for path, _ in Spool(self.config.spool, 0).files()]
        assert data_sets(files) == digests(images)
        self.balances()

    def balances(self) -> Any:
        """The ledger balances at this moment; the sums."""
        sums = balance(self.ledger)
        assert sums.difference == 0, sums
        return sums

    def proved(self, shipment: int = 1, destination: str = "central") -> dict[str, Any]:
        """The one receipt of a delivery, in a chain without faults."""
        assert list(receipt.faults(self.ledger)) == []
        rows = self.ledger.all("SELECT * FROM receipt WHERE shipment = ? AND destination = ?", shipment, destination)
        assert len(rows) == 1
        return receipt.read(rows[0])


Pair = Callable[..., tuple[Box, Central]]


@contextmanager
def pairs(folder: Path) -> Iterator[Pair]:
    """Makes a central XNAT and a box that works and delivers everything to it; both end with the block."""
    with ExitStack() as stack:
        def make(*, destination: dict[str, Any] | None = None, route: dict[str, Any] | None = None, more: str = "",
                 **central: Any) -> tuple[Box, Central]:
            there = stack.enter_context(site(folder / "central", **central))
            settings = to(there.url, folder / "box", **destination or {}) + everything(**route or {}) + more
            return stack.enter_context(Box(folder / "box", settings).working()), there

        yield make


class Parallel:
    """Runs the cases of a parametrised test at the same time, since all they do is wait; one result each."""

    def __init__(self, run: Callable[..., None], cases: Mapping[str, tuple[Any, ...]], folder: Path) -> None:
        self._pool = ThreadPoolExecutor(8)
        self._results = {}
        for number, (name, case) in enumerate(cases.items()):
            self._results[name] = self._pool.submit(self._one, run, folder / str(number), case)

    @staticmethod
    def _one(run: Callable[..., None], folder: Path, case: tuple[Any, ...]) -> None:
        with pairs(folder) as make:
            run(make, *case)

    def outcome(self, name: str) -> None:
        """Wait for a case; raises what it raised."""
        self._results[name].result()

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)
