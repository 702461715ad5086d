"""HTTPS to a destination: verified TLS, proxy, credentials from files, failures in words."""

from __future__ import annotations

import re
import socket
import ssl
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from relay_agent import __version__
from relay_agent.config import XNAT, DICOMweb
from relay_agent.destinations import Retry
from relay_agent.package import blocks
from relay_agent.throttle import Throttle

# No browser's name in it: XNAT asks browsers for a CSRF token (xdat SecureAction).
USER_AGENT = f"relay-agent/{__version__}"
_CONNECT = 30.0
_BLOCK = 2**20


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
        self._session.verify = str(config.ca_bundle) if config.ca_bundle else True
        if config.proxy:
            self._session.proxies = {"http": config.proxy, "https": config.proxy}
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
        merged = self._session.merge_environment_settings(self.base, {}, stream, self._session.verify, None)
        try:
            answer = self._session.request(
                method, self.base + path, params=params, data=body, headers=headers, auth=self.auth, stream=stream,
                timeout=(_CONNECT, self.config.timeout), allow_redirects=False, verify=merged["verify"],
                proxies=merged["proxies"])
        except requests.RequestException as error:
            raise Retry(self.words(error)) from error
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
        """An unwelcome answer in words, with the beginning of its text made safe for a log."""
        text = ""
        if "html" not in answer.headers.get("Content-Type", ""):
            text = re.sub(r"[^\x20-\x7e]+", " ", answer.text[:200]).strip()
        return f"{self.host}: {what} was answered {answer.status_code}" + (f" ({text})" if text else "")

    def json(self, answer: requests.Response, what: str) -> Any:
        """The answer's JSON; :class:`Retry` when it is something else, as a login page of a captive proxy is."""
        try:
            return answer.json()
        except ValueError:
            kind = answer.headers.get("Content-Type", "nothing")
            raise Retry(f"{self.host}: {what} was answered with {kind} instead of JSON; does a proxy ask for a "
                        "login here?") from None

    def parts(self, answer: requests.Response, file: Path) -> Iterator[None]:
        """Write the parts of a streamed multipart answer to the file, one after the other (RFC 2046 section 5.1).

        An answer of another kind is one part. Memory stays flat however large a part is. :class:`Retry` when the
        connection breaks or the answer is cut off.
        """
        kind = Message()
        kind["Content-Type"] = answer.headers.get("Content-Type", "")
        boundary = str(kind.get_boundary(""))
        reader = _Reader(answer.iter_content(_BLOCK))
        delimiter = f"\r\n--{boundary}".encode()
        try:
            if not boundary:
                with file.open("wb") as out:
                    for block in answer.iter_content(_BLOCK):
                        out.write(block)
                yield
                return
            reader.copy(delimiter, lambda preamble: None)
            while reader.peek(2) != b"--":
                reader.copy(b"\r\n\r\n", lambda headers: None)
                with file.open("wb") as out:
                    reader.copy(delimiter, out.write)
                yield
        except requests.RequestException as error:
            raise Retry(self.words(error)) from error
        except EOFError:
            raise Retry(f"{self.host}: the answer is cut off") from None


class Multipart:
    """DICOM files as a multipart body (RFC 2046 section 5.1), made while it is sent; of known length.

    The length keeps it out of chunked transfer coding, of which some servers store nothing and answer 200.
    """

    def __init__(self, files: Sequence[Path], throttle: Throttle) -> None:
        self._files = files
        self._throttle = throttle
        boundary = uuid.uuid4().hex
        self.content_type = f'multipart/related; type="application/dicom"; boundary={boundary}'
        self._before = f"\r\n--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._end = f"\r\n--{boundary}--\r\n".encode()

    def __len__(self) -> int:
        """Bytes of the body."""
        return sum(len(self._before) + file.stat().st_size for file in self._files) + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        """The body, as fast as the throttle allows."""
        return self._throttle.paced(blocks(self._pieces()))

    def _pieces(self) -> Iterator[bytes]:
        for path in self._files:
            yield self._before
            with path.open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    yield block
        yield self._end


class _Reader:
    """Finds marks in a stream of blocks, also across their borders."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self._rest = b"\r\n"  # the first delimiter may come without a line before it

    def copy(self, mark: bytes, sink: Callable[[bytes], object]) -> None:
        """Hand everything before the mark to ``sink`` and go behind it; ``EOFError`` when it does not come."""
        while (found := self._rest.find(mark)) < 0:
            border = max(len(self._rest) - len(mark) + 1, 0)
            sink(self._rest[:border])
            self._rest = self._rest[border:] + self._next()
        sink(self._rest[:found])
        self._rest = self._rest[found + len(mark):]

    def peek(self, count: int) -> bytes:
        """The next bytes, without taking them."""
        while len(self._rest) < count:
            self._rest += self._next()
        return self._rest[:count]

    def _next(self) -> bytes:
        try:
            return next(self._stream)
        except StopIteration:
            raise EOFError from None
