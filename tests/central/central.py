"""The stand-in itself: state, lifetime, and what a test may ask of it."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from . import api_archive, api_import, api_prearchive, api_resources, api_site  # noqa: F401 (they register)
from .accounts import Accounts
from .archive import Archive
from .commit import archive_idle
from .dicom import read_header
from .faults import Fault, Faults
from .prearchive import Prearchive
from .routes import route
from .server import Server, prepare
from .store import Catalog, Store
from .web import Refusal, Request, Response, text

TWO_DAYS = 2 * 24 * 3600.0


class Stored(NamedTuple):
    """An instance as it really is on the stand-in's disk."""

    size: int
    md5: str
    path: Path


class Central:
    """A central XNAT in a thread: `with Central(folder) as central: … central.url …`.

    `projects` exist from the start; `users` maps names to passwords, of whom those in `read_only` may
    look but not edit and those in `admins` have access to all data. `idle` is the number of seconds
    after which the auto-builder takes a quiet session. `site_anon` makes it behave as if XNAT's default
    site-wide script were on. Everything but web sessions survives in `data`, so it can be killed and
    started again.
    """

    def __init__(
        self,
        data: Path,
        *,
        projects: Iterable[str] = ("P1",),
        users: Mapping[str, str] | None = None,
        read_only: Collection[str] = (),
        admins: Collection[str] = (),
        tls: tuple[Path | str, Path | str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        idle: float = 300.0,
        checksums: bool = True,
        site_anon: bool = False,
        token_lifetime: float = TWO_DAYS,
        version: str = "1.8.11",
    ) -> None:
        self.store = Store(Path(data))
        self.catalog = Catalog(self.store)
        self.prearchive = Prearchive(self.store, self.catalog)
        self.archive = Archive(self.store, self.catalog, self.prearchive)
        self.accounts = Accounts(self.store, users or {"relay": "secret"}, read_only, token_lifetime)
        self.faults = Faults()
        self.projects = list(projects)
        self.admins = set(admins)
        self.idle = idle
        self.checksums = checksums
        self.version = version
        self.store.set("site_anon", "true" if site_anon else "false")
        self.events: dict[str, dict[str, Any]] = {}  # asynchronous imports by listener id
        self.requests: list[dict[str, Any]] = []
        self.stopping = threading.Event()
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        self._server = Server(self, host, port, context)
        scheme = "https" if tls else "http"
        self.port = self._server.server_address[1]
        self.url = f"{scheme}://{host}:{self.port}"
        self._threads: list[threading.Thread] = []

    # lifetime

    def start(self) -> Self:
        jobs = (lambda: self._server.serve_forever(poll_interval=0.05), self._auto_build)
        self._threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        if self._threads:
            self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        for thread in self._threads:
            thread.join()
        self.store.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _auto_build(self) -> None:
        """XNAT looks every minute for sessions idle for five; the ratio is kept."""
        while not self.stopping.wait(min(60.0, max(0.05, self.idle / 5))):
            for key in self.prearchive.idle_rows(self.idle):
                with suppress(Refusal):  # another request has it now, or the row's log says why
                    archive_idle(self, key)

    # requests

    def handle(self, request: Request) -> Response:
        """Answer one request; called in the connection's thread."""
        try:
            self.accounts.authenticate(request)
            prepare(request)
            response = route.dispatch(self, request)
        except Refusal as refusal:
            response = text(refusal.text, refusal.status)
            response.headers.update(refusal.headers)
        except Exception as error:  # a fault of the stand-in's own must be visible to the test
            if not self.stopping.is_set():
                traceback.print_exc()
            response = text(f"{type(error).__name__}: {error}", 500)
        if request.session:
            response.headers["Set-Cookie"] = f"JSESSIONID={request.session}; Path=/; HttpOnly"
        return response

    def record(
        self,
        method: str,
        path: str,
        query: Mapping[str, list[str]],
        status: int | None,
        size: int,
        started: float,
    ) -> None:
        self.requests.append(
            {
                "method": method,
                "path": path,
                "query": {name: values[-1] for name, values in query.items()},
                "status": status,
                "bytes": size,
                "at": started,
                "seconds": round(time.time() - started, 4),
            }
        )

    def may_edit(self, user: str) -> bool:
        return bool(user) and user not in self.accounts.read_only

    # misbehaviour

    def misbehave(self, name: str, **options: Any) -> Fault:
        """Switch a fault on (see `faults.py` for the names and their options)."""
        return self.faults.add(name, **options)

    def behave(self, name: str | None = None) -> None:
        """Switch one fault off, or all of them."""
        self.faults.clear(name)

    def strike(self, name: str, request: Request) -> Fault | None:
        return self.faults.strike(name, request.method, request.path)

    # what a test may look at

    def prearchive_rows(self) -> list[dict[str, Any]]:
        return self.prearchive.rows()

    def archive_instances(self, project: str, session: str) -> dict[str, Stored]:
        """SOP instance UID to size, MD5 and place of every file really on disk, whatever the index says."""
        return self._instances(self.store.root / "archive" / project / "arc001" / session)

    def prearchive_instances(self, project: str) -> dict[str, Stored]:
        return self._instances(self.store.root / "prearchive" / project)

    @staticmethod
    def _instances(folder: Path) -> dict[str, Stored]:
        found = {}
        for path in sorted(folder.glob("**/DICOM/*")):
            data = path.read_bytes()
            found[read_header(data).sop_uid] = Stored(
                len(data), hashlib.md5(data, usedforsecurity=False).hexdigest(), path
            )
        return found
