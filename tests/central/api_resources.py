"""Resource files of projects, subjects, sessions and scans, and the catalogue refresh."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .api_archive import SCANS, SESSIONS, SUBJECTS, find_session, parent_of, resource_item
from .api_import import in_body
from .archive import session_id
from .forms import uploads
from .listings import file_rows, resource_rows, send_zip
from .routes import route
from .store import Entry, Staged, safe
from .unpack import BadArchive, members
from .web import Refusal, Request, Response, as_json, open_file, result_set, text

if TYPE_CHECKING:
    from .central import Central

OWNERS = (
    *(f"{scans}/{{scan}}" for scans in SCANS),
    *SESSIONS,
    SUBJECTS + "/{subject}",
    "/data/projects/{project}",
)
LISTS = tuple(f"{owner}/resources" for owner in OWNERS)
RESOURCES = tuple(f"{resources}/{{resource}}" for resources in LISTS)


def owner(central: Central, scan: str = "", session: str = "", **where: str) -> tuple[str, str, str]:
    """Parent, scan, and base URI of whatever the path names."""
    if session:
        found = find_session(central, session, **where)
        parent = parent_of(found)
        if scan and all(known["id"] != scan for known in central.catalog.scans(parent)):
            raise Refusal(404, f"Unable to find scan {scan}")
        return parent, scan, f"/data/experiments/{session_id(found)}"
    project = where["project"]
    if project not in central.projects:
        raise Refusal(404, f"Unable to find project with ID {project}")
    if subject := where.get("subject"):
        return (
            f"archive/{project}/subjects/{safe(subject)}",
            "",
            f"/data/projects/{project}/subjects/{subject}",
        )
    return f"archive/{project}/resources", "", f"/data/projects/{project}"


@route("GET", *LISTS)
def resources(central: Central, request: Request, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    return result_set(resource_rows(central.catalog.resources(parent, scan)))


@route("GET", *RESOURCES)
def one_resource(central: Central, request: Request, resource: str, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    for row in central.catalog.resources(parent, scan):
        if resource in (row["label"], str(row["number"])):
            return as_json({"items": [resource_item(row)]})
    raise Refusal(404, "Unable to find the specified resource.")


@route("PUT", *RESOURCES)
def create(central: Central, request: Request, resource: str, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    if not central.may_edit(request.user):
        raise Refusal(403)
    if central.catalog.resource(parent, scan, resource):
        raise Refusal(409, "Specified resource already exists.")
    central.catalog.ensure_resource(parent, scan, resource, request.get("format"), request.get("content"))
    return text("")


@route("DELETE", *RESOURCES)
def delete_resource(central: Central, request: Request, resource: str, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    found = central.catalog.resource(parent, scan, resource)
    if found is None:
        raise Refusal(404, "Unable to find the specified resource.")
    if not central.may_edit(request.user):
        raise Refusal(403)
    central.catalog.remove_resource(parent, found["number"])
    return text("")


@route("GET", *(f"{resource}/files" for resource in RESOURCES))
def files(central: Central, request: Request, resource: str, **where: str) -> Response:
    parent, scan, base = owner(central, **where)
    entries = central.catalog.files(parent, scan, resource)
    if request.get("format").lower() == "zip":
        return send_zip(central, parent, entries, where.get("session", where.get("project", "files")))
    return result_set(file_rows(central, request, entries, base))


def find_file(central: Central, parent: str, scan: str, resource: str, name: str) -> Entry:
    for entry in central.catalog.files(parent, scan, resource):
        if entry.name == name:
            return entry
    raise Refusal(404, "Unable to find the specified file.")


@route("GET", *(f"{resource}/files/{{name*}}" for resource in RESOURCES))
def one_file(central: Central, request: Request, resource: str, name: str, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    entry = find_file(central, parent, scan, resource, name)
    stream = open_file(central.catalog.path(parent, scan, entry.resource, name))
    return Response(
        200, stream, "application/dicom" if entry.format == "DICOM" else "application/octet-stream"
    )


@route("DELETE", *(f"{resource}/files/{{name*}}" for resource in RESOURCES))
def delete_file(central: Central, request: Request, resource: str, name: str, **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    entry = find_file(central, parent, scan, resource, name)
    if not central.may_edit(request.user):
        raise Refusal(403)
    central.catalog.remove_file(parent, entry)
    return text("")


@route(
    "PUT POST",
    *(f"{resource}/files/{{name*}}" for resource in RESOURCES),
    *(f"{resource}/files" for resource in RESOURCES),
)
def put_files(central: Central, request: Request, resource: str, name: str = "", **where: str) -> Response:
    parent, scan, _ = owner(central, **where)
    # XNAT has no branch for a missing right: nothing is done and the answer stays 200.
    if not central.may_edit(request.user) or central.strike("no-permission-200", request):
        return text("")
    if central.strike("disk-full", request):
        raise Refusal(500, "No space left on device")
    contents = file_contents(request, name)
    number = central.catalog.ensure_resource(
        parent, scan, resource, request.get("format"), request.get("content")
    )
    label = str(central.catalog.resource(parent, scan, resource)["label"])  # type: ignore[index]
    always = central.strike("duplicates", request)
    duplicates = []
    for path, stream in contents:
        staged = central.catalog.stage_stream(stream)
        if damage := central.strike("damage-files", request):
            staged = damaged(staged, damage["keep"])
        with central.store.transaction():
            known = central.catalog.file(number, path)
            if always or (known and not request.flag("overwrite")):
                staged.path.unlink()
                duplicates.append(path)
                continue
            central.catalog.put(
                parent,
                scan,
                label,
                path,
                staged.path,
                size=staged.size,
                md5=staged.md5,
                format=request.get("format"),
                content=request.get("content"),
                tags=request.get("tags"),
            )
    return as_json({"duplicates": duplicates}) if duplicates else text("")


def damaged(staged: Staged, keep: float | None) -> Staged:
    """What a server with a bad disk keeps: the beginning, or everything with another last byte."""
    content = staged.path.read_bytes()
    content = content[: int(len(content) * keep)] if keep is not None else content[:-1] + bytes([content[-1] ^ 1])
    staged.path.write_bytes(content)
    return Staged(staged.path, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())


def file_contents(request: Request, name: str) -> list[tuple[str, BinaryIO]]:
    """Path and content of what is to be stored: the body, the form's files, or what is in them."""
    body = in_body(request)
    if body is not None:
        found = [(name or body.name, body.stream)]
    elif request.content_type == "multipart/form-data":
        found = [(name or upload.name, upload.stream) for upload in uploads(request)]
    else:
        found = []
    if not found or not all(stream.seek(0, io.SEEK_END) for _, stream in found):
        raise Refusal(400, "Unable to identify upload format.")
    for _, stream in found:
        stream.seek(0)
    if not request.flag("extract"):
        return found
    folder = str(Path(name).parent) if "/" in name else ""
    try:
        return [
            (f"{folder}/{member}".lstrip("/"), io.BytesIO(data))
            for path, stream in found
            for member, data in members(stream, path)
        ]
    except BadArchive as error:
        raise Refusal(500, str(error)) from error


@route("POST", "/data/services/refresh/catalog")
def refresh(central: Central, request: Request) -> Response:
    """Bring catalogue and disk together: digests of what is there and, if asked, no dead entries."""
    options = set(request.get("options").split(","))
    for source in request.query.get("resource", []):
        parts = source.strip("/").removeprefix("data/").split("/")
        names = dict(zip(parts[1::2], parts[2::2], strict=False)) if parts[0] == "archive" else {}
        keys = {"projects": "project", "subjects": "subject", "experiments": "session", "scans": "scan"}
        parent, scan, _ = owner(
            central, **{keys[name]: value for name, value in names.items() if name in keys}
        )
        for entry in central.catalog.files(parent, scan or None):
            path = central.catalog.path(parent, entry.scan, entry.resource, entry.name)
            if path.exists() and "checksum" in options:
                data = path.read_bytes()
                central.store.run(
                    "UPDATE file SET size=?, md5=? WHERE resource=? AND name=?",
                    len(data),
                    hashlib.md5(data, usedforsecurity=False).hexdigest(),
                    entry.number,
                    entry.name,
                )
            elif not path.exists() and "delete" in options:
                central.catalog.remove_file(parent, entry)
    return text("")
