"""`/data/prearchive`: listings, contents, and the operations on a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .archive import Overwrite
from .commit import commit, destination, store_in_archive
from .listings import file_rows, resource_rows, send_zip
from .prearchive import Key
from .routes import route
from .web import Refusal, Request, Response, open_file, result_set, text, uri_list

if TYPE_CHECKING:
    from .central import Central

ROW = "/data/prearchive/projects/{project}/{timestamp}/{folder}"


def editable(central: Central, request: Request) -> None:
    if not central.may_edit(request.user):
        raise Refusal(403, "Unable to modify session data for destination project.")


@route("GET", "/data/prearchive", "/data/prearchive/projects", "/data/prearchive/experiments")
def listing(central: Central, request: Request) -> Response:
    if request.get("tag") and request.user not in central.admins:
        raise Refusal(403, "Only users with access to all data may search the prearchive by tag.")
    return result_set(central.prearchive.rows(tag=request.get("tag")))


@route("GET", "/data/prearchive/projects/{projects}")
def project_listing(central: Central, request: Request, projects: str) -> Response:
    return result_set(central.prearchive.rows(projects.split(","), request.get("tag")))


@route("GET", ROW)
def session(central: Central, request: Request, **key: str) -> Response:
    where = Key(**key)
    row = central.prearchive.row(where)
    form = request.get("format").lower()
    if form == "json":
        return result_set([central.prearchive.describe(row)])
    if form == "zip":
        return send_zip(central, where.parent, central.catalog.files(where.parent), where.folder)
    if not row["built"]:
        raise Refusal(
            404,
            "The named session exists, but its XNAT session document is not available. "
            "The session is likely invalid or incomplete.",
        )
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<xnat:MRSession label="{row["name"]}" UID="{row["tag"]}"/>'
    )
    return text(xml, type="text/xml")


@route("GET", ROW + "/logs", ROW + "/logs/{log}")
def logs(central: Central, request: Request, log: str = "", **key: str) -> Response:
    central.prearchive.row(Key(**key))
    entries = central.prearchive.logs(Key(**key))
    if not log:
        return result_set([{"id": i, "date": e["at"], "entry": e["entry"]} for i, e in enumerate(entries)])
    index = len(entries) - 1 if log == "last" else int(log) if log.isdigit() else -1
    return text(entries[index]["entry"] if 0 <= index < len(entries) else "")


@route("GET", ROW + "/scans")
def scans(central: Central, request: Request, **key: str) -> Response:
    central.prearchive.row(Key(**key))
    return result_set([scan_row(scan) for scan in central.catalog.scans(Key(**key).parent)])


def scan_row(scan: Any) -> dict[str, str]:
    kind = (scan["modality"] or "other").lower()
    return {"ID": scan["id"], "xsiType": f"xnat:{kind}ScanData", "series_description": scan["description"]}


@route("GET", ROW + "/scans/{scan}/resources", ROW + "/resources")
def resources(central: Central, request: Request, scan: str | None = None, **key: str) -> Response:
    central.prearchive.row(Key(**key))
    return result_set(resource_rows(central.catalog.resources(Key(**key).parent, scan), archived=False))


@route("GET", ROW + "/scans/{scan}/resources/{resource}/files", ROW + "/scans/{scan}/files")
def files(central: Central, request: Request, scan: str, resource: str | None = None, **key: str) -> Response:
    where = Key(**key)
    central.prearchive.row(where)
    found = central.catalog.files(where.parent, None if scan in ("ALL", "*") else scan, resource)
    if request.get("format").lower() == "zip":
        return send_zip(central, where.parent, found, where.folder)
    return result_set(file_rows(central, request, found, f"/data{where.url}"))


@route("GET", ROW + "/scans/{scan}/resources/{resource}/files/{name*}")
def one_file(central: Central, request: Request, scan: str, resource: str, name: str, **key: str) -> Response:
    central.prearchive.row(Key(**key))
    path = central.catalog.path(Key(**key).parent, scan, resource, name)
    return Response(200, open_file(path), "application/dicom")


@route("POST", ROW)
def act(central: Central, request: Request, **key: str) -> Response:
    where = Key(**key)
    central.prearchive.row(where)
    editable(central, request)
    action = request.get("action")
    if action == "build":
        central.prearchive.build(where)
        return uri_list([f"/data{where.url}"])
    if action == "commit":
        archived, uri = commit(central, request, where)
        # Permanent redirect without a Location: the body is the answer.
        return uri_list([uri], 301 if archived else 200)
    if action == "reset-status":
        central.prearchive.update(
            where, status="READY" if central.prearchive.row(where)["built"] else "RECEIVING"
        )
        return uri_list([f"/data{where.url}"])
    if action == "set-status":
        central.prearchive.update(where, status=request.get("status"))
        return text("")
    if action == "move":
        return uri_list([f"/data{move(central, where, request.get('newProject')).url}"], 301)
    if action:
        raise Refusal(
            400, f"User {request.user} requested an unsupported action on prearchive session: {action}"
        )
    raise Refusal(400, f"No action parameter was specified for the request by user {request.user}")


def move(central: Central, key: Key, project: str) -> Key:
    if project not in central.projects:
        raise Refusal(403, "Unable to modify session data for destination project.")
    return central.prearchive.move(key, project)


@route("DELETE", ROW)
def delete(central: Central, request: Request, **key: str) -> Response:
    central.prearchive.row(Key(**key))
    editable(central, request)
    central.prearchive.forget(Key(**key))
    return text("")


@route("POST", "/data/services/prearchive/{operation}")
def batch(central: Central, request: Request, operation: str) -> Response:
    editable(central, request)
    keys = [Key.from_url(source) for source in request.query.get("src", [])]
    if operation not in ("move", "delete", "rebuild"):
        raise Refusal(404)
    for key in keys:
        central.prearchive.row(key)
        if operation == "move":
            move(central, key, request.get("newProject"))
        elif operation == "delete":
            central.prearchive.forget(key)
        else:
            central.prearchive.build(key)
    return text("")


# archiving services


def source(central: Central, request: Request) -> Key:
    if request.get("src"):
        key = Key.from_url(request.get("src"))
    else:
        key = Key(
            request.get("project"),
            request.get("PREARC_TIMESTAMP", "timestamp"),
            request.get("folder", "PREARC_SESSION_FOLDER"),
        )
    if key.project == "Unassigned":
        raise Refusal(400, "Cannot archive sessions from the Unassigned folder.")
    central.prearchive.row(key)
    return key


@route("POST", "/data/services/archive")
def archive(central: Central, request: Request) -> Response:
    editable(central, request)
    key = source(central, request)
    if central.strike("commit-409-locked", request):
        raise Refusal(403, "Operation already in progress on this prearchive entry.")
    if fault := central.strike("commit-conflict", request):
        central.prearchive.fail(key, "CONFLICT", fault["message"])
        raise Refusal(409, fault["message"])
    overwrite = Overwrite.parse(request.get("overwrite"), request.flag("overwrite_files"))
    try:
        if not central.prearchive.row(key)["built"]:
            central.prearchive.build(key)
        uri = store_in_archive(central, request, key, overwrite)
    except Refusal as refusal:
        if refusal.text == "session document locked":
            raise Refusal(403, "Operation already in progress on this prearchive entry.") from refusal
        raise
    if request.flag("redirect"):
        return Response(303, headers={"Location": uri})
    return uri_list([uri])


@route("POST", "/data/services/validate-archive")
def validate(central: Central, request: Request) -> Response:
    key = source(central, request)
    overwrite = Overwrite.parse(request.get("overwrite"), request.flag("overwrite_files"))
    notices = central.archive.notices(key, destination(central, key, request), overwrite)
    return result_set([{"code": n.code, "type": n.type, "message": n.message} for n in notices])
