"""`POST /data/services/import`, and the user cache it can take files from."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .forms import uploads
from .importer import Importer
from .routes import route
from .store import safe
from .web import Refusal, Request, Response, Upload, open_file, result_set, text, uri_list

if TYPE_CHECKING:
    from .central import Central

#: in-body content types and the file name XNAT gives them; from the name it tells the archive's kind
IN_BODY = {
    "application/zip": "upload.zip",
    "application/x-zip": "upload.zip",
    "application/x-zip-compressed": "upload.zip",
    "application/dicom": "upload.dcm",
    "application/x-gtar": "upload.tar.gz",
    "application/x-gnu-tar": "upload.tar.gz",
    "application/x-tar": "upload.tar",
    "application/x-gzip": "upload.gzip",
    "application/gzip": "upload.gzip",
    "application/octet-stream": "upload",
    "application/x-mirc": "upload",
    "application/x-mirc-dicom": "upload",
}
SINGLE_OBJECT = ("application/dicom", "application/x-mirc", "application/x-mirc-dicom")
HANDLERS = ("DICOM-zip", "gradual-DICOM", "SI")
NO_UPLOAD = "Unable to identify upload format."


def in_body(request: Request) -> Upload | None:
    """The body as a file, if this request has one that XNAT would take."""
    multipart = request.content_type == "multipart/form-data"
    if request.flag("inbody") and multipart:
        raise Refusal(406, "Multipart content is not acceptable as an in-body upload.")
    name = IN_BODY.get(request.content_type)
    if multipart or (name is None and not request.flag("inbody")):
        return None
    # Chunked bodies have no size that XNAT could see; only zip is let through without one.
    if request.size == 0 or (not request.declared and request.content_type != "application/zip"):
        raise Refusal(400, NO_UPLOAD)
    return Upload(name or "upload", request.body)


def cached(central: Central, request: Request) -> Upload:
    """The file that `src=/user/cache/resources/R/files/F` names."""
    parts = request.get("src").strip("/").removeprefix("data/").split("/")
    if len(parts) < 6 or parts[:3] != ["user", "cache", "resources"] or parts[4] != "files":
        raise Refusal(400, "src uri is invalid.")
    path = central.store.root.joinpath(
        "cache", safe(request.user), safe(parts[3]), *(safe(p) for p in parts[5:])
    )
    return Upload(path.name, open_file(path))


def find_upload(central: Central, request: Request) -> Upload:
    if request.get("src"):
        return cached(central, request)
    found = in_body(request)
    if found is None:
        files = uploads(request) if request.content_type == "multipart/form-data" else []
        if len(files) > 1:
            raise Refusal(400, "Importer is limited to one uploaded resource at a time.")
        if not files:
            raise Refusal(400, NO_UPLOAD)
        found = files[0]
    return found


@route("POST", "/data/services/import")
def import_service(central: Central, request: Request) -> Response:
    handler = request.get("import-handler")
    if not handler:
        handler = "gradual-DICOM" if request.content_type in SINGLE_OBJECT else "DICOM-zip"
    if handler not in HANDLERS:
        raise Refusal(404, f"Unknown importer: {handler}")
    if not central.may_edit(request.user):
        raise Refusal(403, "User does not have permission to create data in the specified project.")
    listener = request.get("http-session-listener")
    if listener and not request.get("src"):
        raise Refusal(400, "The http-session-listener parameter needs a src.")
    upload = find_upload(central, request)
    importer = Importer(central, request, handler)
    if listener:
        central.events[listener] = {"key": listener, "payload": None, "succeeded": None, "finalMessage": None}
        threading.Thread(target=follow, args=(central, importer, upload, listener), daemon=True).start()
        return text(f"Submitted for {handler} import")
    uris = importer.run(upload)
    return text("OK") if "mirc" in request.content_type else uri_list(uris)


def follow(central: Central, importer: Importer, upload: Upload, listener: str) -> None:
    """Import in the background and leave the outcome where the client polls for it."""
    event = dict(central.events[listener])
    try:
        uris = [uri.removeprefix("/data") for uri in importer.run(upload)]
    except Refusal as refusal:
        event.update(succeeded=False, finalMessage=refusal.text)
    else:
        where = "Archive" if importer.archived else "Prearchive"
        event.update(succeeded=True, finalMessage=f"{where}:{';'.join(uris)}")
    central.events[listener] = event


@route("PUT POST", "/data/user/cache/resources/{resource}/files/{name*}")
def fill_cache(central: Central, request: Request, resource: str, name: str) -> Response:
    upload = in_body(request) or find_upload(central, request)
    path = central.store.root.joinpath(
        "cache", safe(request.user), safe(resource), *map(safe, name.split("/"))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        while block := upload.stream.read(1 << 20):
            out.write(block)
    return text("")


@route("GET", "/data/user/cache/resources/{resource}/files")
def list_cache(central: Central, request: Request, resource: str) -> Response:
    folder = central.store.root / "cache" / safe(request.user) / safe(resource)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return result_set(
        [
            {
                "Name": path.name,
                "Size": path.stat().st_size,
                "URI": f"/data/user/cache/resources/{resource}/files/{path.relative_to(folder)}",
            }
            for path in files
        ]
    )


@route("DELETE", "/data/user/cache/resources/{resource}/files/{name*}")
def empty_cache(central: Central, request: Request, resource: str, name: str) -> Response:
    central.store.root.joinpath(
        "cache", safe(request.user), safe(resource), *map(safe, name.split("/"))
    ).unlink(missing_ok=True)
    return text("")
