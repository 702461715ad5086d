"""Requests, responses and the routing table: everything about HTTP that needs no socket."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from .central import Central

SPOOL = 32 << 20  # bodies up to this size stay in memory
TRUE = {"true", "1", "yes", "on", "t", "y"}


class Refusal(Exception):
    """An answer other than success; XNAT's error bodies are the bare text."""

    def __init__(self, status: int, text: str = "", **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


@dataclass(slots=True)
class Response:
    status: int = 200
    body: bytes | BinaryIO = b""
    type: str = "text/plain;charset=UTF-8"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Upload:
    """One file that came with a request: in the body, in a multipart form, or from the user cache."""

    name: str
    stream: BinaryIO


@dataclass(slots=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: BinaryIO
    size: int
    declared: bool  # a Content-Length was given (XNAT refuses most bodies without one)
    user: str = ""
    session: str | None = None  # JSESSIONID to hand out

    def get(self, *names: str, default: str = "") -> str:
        """First value found under any of the names (XNAT has several spellings for many parameters)."""
        for name in names:
            if values := self.query.get(name):
                return values[0]
        return default

    def flag(self, *names: str) -> bool:
        return self.get(*names).lower() in TRUE

    @property
    def content_type(self) -> str:
        return str(self.headers.get_content_type()) if self.headers.get("Content-Type") else ""

    def text(self) -> str:
        self.body.seek(0)
        return self.body.read().decode("utf-8", "replace")


def text(body: str, status: int = 200, type: str = "text/plain;charset=UTF-8") -> Response:
    return Response(status, body.encode(), type)


def as_json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode(), "application/json;charset=UTF-8")


def uri_list(uris: Iterable[str], status: int = 200) -> Response:
    return text("".join(f"{uri}\r\n" for uri in uris), status, "text/uri-list;charset=UTF-8")


def result_set(rows: list[dict[str, Any]], title: str | None = None) -> Response:
    """XNAT's table: every cell is a string."""
    cells = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    table: dict[str, Any] = {"Result": cells, "totalRecords": str(len(rows))}
    if title:
        table["title"] = title
    return as_json({"ResultSet": table})


def spool() -> BinaryIO:
    # SpooledTemporaryFile is a BinaryIO in all but its declared type.
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=SPOOL))


def canonical(target: str) -> tuple[str, dict[str, list[str]]]:
    """Path with XNAT's synonyms folded together (/REST = /data, /data/archive = /data), and the query."""
    parts = urlsplit(target)
    path = "/" + unquote(parts.path).strip("/")
    path = re.sub(r"^/REST(?=/|$)", "/data", path)
    path = re.sub(r"^/data/archive/(?=projects|subjects|experiments)", "/data/", path)
    return path, parse_qs(parts.query, keep_blank_values=True)


Handler = Callable[..., Response]


class Router:
    """Method and path template to handler; `{name}` is one segment, `{name*}` the rest of the path."""

    def __init__(self) -> None:
        self.table: list[tuple[str, re.Pattern[str], Handler]] = []

    def __call__(self, methods: str, *templates: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            for template in templates:
                escaped = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", template)
                pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", escaped) + "/?$")
                self.table.extend((method, pattern, handler) for method in methods.split())
            return handler

        return register

    def find(self, method: str, path: str) -> tuple[Handler, Mapping[str, str]]:
        known = False
        for verb, pattern, handler in self.table:
            if match := pattern.match(path):
                if verb == method or (method == "HEAD" and verb == "GET"):
                    return handler, match.groupdict()
                known = True
        if known:
            raise Refusal(405, "The method specified in the request is not allowed for the resource")
        raise Refusal(404, f"The stand-in has no resource {path}")

    def dispatch(self, central: Central, request: Request) -> Response:
        handler, params = self.find(request.method, request.path)
        try:
            return handler(central, request, **params)
        except Refusal as refusal:
            response = text(refusal.text, refusal.status)
            response.headers.update(refusal.headers)
            return response


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError:
        raise Refusal(404, "Unable to find the specified file.") from None
