"""HTTPS to a destination: verified TLS, proxy, credentials from files, failures in words."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from relay_agent import __version__
from relay_agent.config_destinations import XNAT, DICOMweb
from relay_agent.destinations import Retry

# No browser's name in it: XNAT asks browsers for a CSRF token (xdat SecureAction).
USER_AGENT = f"relay-agent/{__version__}"
_CONNECT = 30.0
# What XNAT says when it refuses (Importer, GradualDicomImporter, PrearcSessionArchiver), and what proxies say
_PHRASES = (
    "unable to read DICOM object", "unable to archive", "Session already exists", "retry with overwrite enabled",
    "Invalid modification of session UID", "Session processing may already be in progress",
    "Operation already in progress", "session document locked", "Unable to identify upload format",
    "limited to one uploaded resource", "Concurrent file sends", "No space left", "Out of resources",
    "Cannot archive sessions from the Unassigned folder", "Request Entity Too Large", "conflict",
)


def _system_trust() -> str | bool:
    """The machine's own CAs, to which administrators add; requests would take those it came with."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


def words(where: str, error: BaseException, timeout: float) -> str:
    """What went wrong on the way to ``where``, and what to do."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        reason = getattr(cause, "reason", None)
        inner = reason if isinstance(reason, BaseException) else next(
            (part for part in cause.args if isinstance(part, BaseException)), None)
        cause = inner or cause.__cause__ or cause.__context__
    for link in chain:
        if isinstance(link, ssl.SSLCertVerificationError):
            return (f"{where}: its certificate is not trusted ({link.verify_message}). If a proxy inspects "
                    "TLS here, put its CA into ca_bundle")
        if isinstance(link, ssl.SSLError):
            return f"{where}: TLS failed ({link.reason or 'connection broken'})"
        if isinstance(link, socket.gaierror):
            return f"{where}: the name cannot be resolved; check DNS and the url"
        if isinstance(link, requests.exceptions.ProxyError):
            return f"{where}: the proxy refused or cannot be reached; check proxy"
        if isinstance(link, ConnectionRefusedError):
            return f"{where}: nothing listens there; is the server up, does the firewall let us through?"
        if isinstance(link, requests.exceptions.ConnectTimeout):
            return f"{where}: no connection within {_CONNECT:.0f} s; does the firewall let us through?"
        if isinstance(link, (requests.exceptions.ReadTimeout, TimeoutError)):
            return f"{where}: no answer within {timeout:.0f} s"
    return f"{where}: the connection broke ({type(error).__name__})"


class Web:
    """Requests below one base address. Thread-safe for reading and sending; retries nothing by itself."""

    def __init__(self, config: XNAT | DICOMweb, auth: tuple[str, str] | None) -> None:
        self.config = config
        self.base = config.url.rstrip("/")
        self.auth = auth
        self._session = requests.Session()
        self._session.headers["User-Agent"] = USER_AGENT
        self._trust = str(config.ca_bundle) if config.ca_bundle else _system_trust()
        adapter = HTTPAdapter(pool_connections=4, pool_maxsize=config.streams + 4)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def ask(self, method: str, path: str, *, body: Iterable[bytes] | bytes | None = None, stream: bool = False,
            headers: dict[str, str] | None = None, params: dict[str, str] | None = None,
            ) -> requests.Response:
        """One request, redirects not followed. :class:`Retry` with words when no answer came at all.

        Answers of 502, 503 and 504 come from proxies in front as often as from the server, and say nothing of what
        it did: they are :class:`Retry` too.
        """
        # Session cookies stay out: with them XNAT would apply its CSRF rules and session limits.
        self._session.cookies.clear()
        # Given with the request, since requests puts those of a session behind the environment's.
        proxies = {"http": self.config.proxy, "https": self.config.proxy} if self.config.proxy else {}
        merged = self._session.merge_environment_settings(self.base, proxies, stream, self._trust, None)
        try:
            answer = self._session.request(
                method, self.base + path, params=params, data=body, headers=headers, auth=self.auth, stream=stream,
                timeout=(_CONNECT, self.config.timeout), allow_redirects=False, verify=merged["verify"],
                proxies=merged["proxies"])
        except requests.RequestException as error:
            raise Retry(self.words(error)) from error
        except OSError as error:  # requests says so when the file of CAs is not there
            raise Retry(f"{self.host}: the CAs in {self._trust} cannot be read; check ca_bundle") from error
        if answer.status_code in (502, 503, 504):
            answer.close()
            raise Retry(f"{self.host}: answered {answer.status_code}, its proxy or the server is busy or down")
        return answer

    @property
    def host(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.base).netloc

    def words(self, error: BaseException) -> str:
        """What went wrong on the way, and what to do."""
        return words(self.host, error, self.config.timeout)

    def failure(self, answer: requests.Response, what: str) -> str:
        """An unwelcome answer in words. Of its text only known phrases: servers quote labels, and so patients."""
        text = answer.text[:10_000].lower()
        said = ", ".join(f'"{phrase}"' for phrase in _PHRASES if phrase.lower() in text)
        return f"{self.host}: {what} was answered {answer.status_code}" + (f" ({said})" if said else "")

    def json(self, answer: requests.Response, what: str) -> Any:
        """The answer's JSON; :class:`Retry` when it is something else, as a login page of a captive proxy is."""
        try:
            return answer.json()
        except ValueError:
            kind = answer.headers.get("Content-Type", "nothing")
            raise Retry(f"{self.host}: {what} was answered with {kind} instead of JSON; does a proxy ask for a "
                        "login here?") from None
