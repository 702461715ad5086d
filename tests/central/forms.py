"""HTML forms in a request body."""

from __future__ import annotations

import io
import re
from email.parser import BytesHeaderParser
from urllib.parse import parse_qs

from .web import Request, Upload


def merge_form(request: Request) -> None:
    """Add the body's fields to the query."""
    if request.content_type == "application/x-www-form-urlencoded":
        for name, values in parse_qs(request.text(), keep_blank_values=True).items():
            request.query.setdefault(name, []).extend(values)
    else:
        for name, filename, content in parts(request):
            if filename is None:
                request.query.setdefault(name, []).append(content.decode("utf-8", "replace"))


def uploads(request: Request) -> list[Upload]:
    """The files of a multipart form."""
    return [Upload(filename, io.BytesIO(content)) for _, filename, content in parts(request) if filename]


def parts(request: Request) -> list[tuple[str, str | None, bytes]]:
    """Name, file name and content of every part."""
    boundary = request.headers.get_boundary()
    if not boundary:
        raise ValueError("multipart body without a boundary")
    request.body.seek(0)
    found = []
    for piece in request.body.read().split(b"--" + boundary.encode())[1:-1]:
        head, separator, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        if not separator:
            raise ValueError("malformed multipart body")
        disposition = BytesHeaderParser().parsebytes(head + b"\r\n\r\n")
        name = str(disposition.get_param("name", "", "content-disposition"))
        filename = disposition.get_filename()
        if filename is not None:
            filename = re.split(r"[\\/]", filename)[-1]
        found.append((name, filename, content.removesuffix(b"\r\n")))
    return found
