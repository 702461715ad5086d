"""One resource of an XNAT: a folder of files at a scan or a session. Listed, filled and emptied by REST."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

import requests

from relay_agent.destinations import Retry
from relay_agent.destinations.web import Web
from relay_agent.throttle import Throttle

_BLOCK = 2**20
_BYTES = "application/octet-stream"
_FORMAT = {"format": "SIEMENS_TWIX", "content": "RAW"}


class Unreached(Retry):
    """Nothing of the file was sent: this says nothing of how much a request may carry."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as XNAT lists it; ``md5`` is empty where the site has checksums switched off."""

    size: int
    md5: str

    def holds(self, size: int, md5: str) -> bool:
        """Whether it is this content, as far as the list tells."""
        return self.size == size and self.md5 in ("", md5)


class _Body:
    """A body with a length: XNAT refuses chunked ones for files."""

    def __init__(self, size: int, blocks: Iterable[bytes]) -> None:
        self._size, self._blocks = size, blocks
        self.begun = False

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return iter(self._blocks)


class Resource:
    """A resource by its address; ``ask`` sends a request with the account's token. Thread-safe."""

    def __init__(self, place: str, ask: Callable[..., requests.Response], web: Web, throttle: Throttle) -> None:
        self.place = place
        self._ask, self._web, self._throttle = ask, web, throttle

    def make(self) -> None:
        """Make it unless it is there."""
        answer = self._ask("PUT", self.place, params=_FORMAT)
        if answer.status_code not in (200, 201, 409):  # 409: it is there
            raise Retry(self._refusal(answer, "the request for a resource"))

    def put(self, path: str, size: int, blocks: Iterable[bytes]) -> None:
        """Store a file in one request, over one of that name; raises unless XNAT says so, which proves nothing yet."""
        self._throttle.limit()  # raises outside all windows
        body = _Body(size, self._throttle.paced(blocks))
        try:
            answer = self._ask("PUT", self._address(path), body=body, headers={"Content-Type": _BYTES},
                               params={"inbody": "true", "overwrite": "true", **_FORMAT})
        except Retry as error:
            raise error if body.begun else Unreached(str(error), error.after) from error
        if answer.status_code not in (200, 201):
            raise Retry(self._refusal(answer, "the upload of a file"))
        if "html" in answer.headers.get("Content-Type", ""):
            raise Retry(f"{self._web.host}: a web page came instead of XNAT's answer; does a proxy ask for a login?")
        if "duplicates" in answer.text[:10_000]:
            raise Retry(f"{self._web.host}: XNAT answered 200, but has a file of this name already and did not take "
                        "ours")

    def delete(self, path: str) -> None:
        """Delete a file; one that is gone already is as good."""
        answer = self._ask("DELETE", self._address(path))
        if answer.status_code not in (200, 204, 404):
            raise Retry(self._refusal(answer, "the request to delete a file"))

    def fetch(self, path: str) -> tuple[int, str]:
        """Size and MD5 of a file as it really is."""
        md5, size = hashlib.md5(usedforsecurity=False), 0
        with self._ask("GET", self._address(path), stream=True) as answer:
            if answer.status_code != 200:
                raise Retry(self._web.failure(answer, "the fetch for comparison"))
            try:
                for block in answer.iter_content(_BLOCK):
                    md5.update(block)
                    size += len(block)
            except requests.RequestException as error:
                raise Retry(self._web.words(error)) from error
        return size, md5.hexdigest()

    def _address(self, path: str) -> str:
        return f"{self.place}/files/{quote(path)}"

    def _refusal(self, answer: requests.Response, what: str) -> str:
        if answer.status_code == 403:
            return f"{self._web.host}: this account may not change files of the session; give it the member role"
        return self._web.failure(answer, what)
