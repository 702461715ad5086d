"""Archived subjects and sessions: documents, scans, creation and deletion."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .archive import Destination, session_id
from .identify import label as clean
from .listings import file_rows, send_zip
from .routes import route
from .web import Refusal, Request, Response, as_json, result_set, text

if TYPE_CHECKING:
    from .central import Central

SUBJECTS = "/data/projects/{project}/subjects"
SESSIONS = (
    "/data/experiments/{session}",
    "/data/projects/{project}/experiments/{session}",
    "/data/projects/{project}/subjects/{subject}/experiments/{session}",
)
SCANS = tuple(f"{session}/scans" for session in SESSIONS)


def find_session(
    central: Central, session: str, project: str | None = None, subject: str | None = None
) -> Any:
    row = central.archive.session(session, project)
    if (
        row is None
        or project not in (None, row["project"])
        or (subject is not None and subject not in (row["subject"], subject_id(central, row)))
    ):
        raise Refusal(404, f"Unable to find the specified experiment {session}.")
    return row


def subject_id(central: Central, session: Any) -> str:
    return f"XNAT_S{central.archive.subject(session['project'], session['subject']):05d}"


def parent_of(session: Any) -> str:
    return Destination(session["project"], session["subject"], session["label"]).parent


def xsi_type(modality: str, kind: str) -> str:
    name = {"PT": "pet", "": "mr"}.get(modality, modality.lower())
    return f"xnat:{name}{kind}"


def item(xsi: str, fields: dict[str, Any], children: list[dict[str, Any]]) -> dict[str, Any]:
    """One node of XNAT's session document; unset fields are left out."""
    filled = {name: value for name, value in fields.items() if value not in ("", None)}
    return {"children": children, "meta": {"isHistory": False, "xsi:type": xsi}, "data_fields": filled}


def resource_item(row: Any) -> dict[str, Any]:
    fields = {name: row[name] for name in ("label", "format", "content")}
    counts = {"file_count": row["files"], "file_size": row["bytes"], "xnat_abstractresource_id": row["number"]}
    return item("xnat:resourceCatalog", fields | counts, [])


def session_document(central: Central, session: Any) -> dict[str, Any]:
    parent = parent_of(session)
    scans = []
    for scan in central.catalog.scans(parent):
        resources = [resource_item(row) for row in central.catalog.resources(parent, scan["id"])]
        scans.append(
            item(
                xsi_type(scan["modality"], "ScanData"),
                {
                    "ID": scan["id"],
                    "UID": scan["uid"],
                    "modality": scan["modality"],
                    "quality": "usable",
                    "series_description": scan["description"],
                    "type": scan["description"],
                    "image_session_ID": session_id(session),
                },
                [{"field": "file", "items": resources}],
            )
        )
    fields = {
        "ID": session_id(session),
        "label": session["label"],
        "project": session["project"],
        "subject_ID": subject_id(central, session),
        "dcmPatientName": session["subject"],
        "UID": session["uid"],
        "modality": session["modality"],
        "date": session["date"],
        "time": session["time"],
    }
    return item(
        xsi_type(session["modality"], "SessionData"),
        fields,
        [{"field": "scans/scan", "items": scans}] if scans else [],
    )


def session_row(session: Any) -> dict[str, str]:
    return {
        "ID": session_id(session),
        "label": session["label"],
        "project": session["project"],
        "date": session["date"],
        "xsiType": xsi_type(session["modality"], "SessionData"),
        "URI": f"/data/experiments/{session_id(session)}",
        "session_uid": session["uid"],
        "xnat:imagesessiondata/uid": session["uid"],
        "UID": session["uid"],
        "subject_label": session["subject"],
    }


@route(
    "GET", "/data/experiments", "/data/projects/{project}/experiments", SUBJECTS + "/{subject}/experiments"
)
def sessions(
    central: Central, request: Request, project: str | None = None, subject: str | None = None
) -> Response:
    uid = request.get("UID", "xnat:imageSessionData/UID")
    wanted = request.get("label")
    rows = central.store.all("SELECT * FROM session ORDER BY number")
    return result_set(
        [
            session_row(row)
            for row in rows
            if project in (None, row["project"])
            and subject in (None, row["subject"], subject_id(central, row))
            and uid in ("", row["uid"])
            and wanted in ("", row["label"])
        ]
    )


@route("GET", *SESSIONS)
def session(central: Central, request: Request, **where: str) -> Response:
    found = find_session(central, **where)
    if request.get("format").lower() == "zip":
        return send_zip(central, parent_of(found), central.catalog.files(parent_of(found)), found["label"])
    return as_json({"items": [session_document(central, found)]})


@route("PUT", *SESSIONS)
def put_session(central: Central, request: Request, session: str, **where: str) -> Response:
    if not central.may_edit(request.user):
        raise Refusal(403)
    project = where.get("project")
    known = central.archive.session(session, project)
    if known is not None:  # also pullDataFromHeaders, fixScanTypes and triggerPipelines: nothing to do here
        return text(session_id(known))
    if project not in central.projects:
        raise Refusal(404, f"Unable to identify project: {project}")
    modality = re.sub(
        r"^xnat:|SessionData$", "", request.get("xsiType", default="xnat:mrSessionData")
    ).upper()
    to = Destination(project or "", clean(where.get("subject", session)), clean(session))
    central.archive.create(to, request.get("UID"), modality, request.get("date"), request.get("time"))
    return text(session_id(find_session(central, to.label, project)), 201)


@route("DELETE", *SESSIONS)
def delete_session(central: Central, request: Request, **where: str) -> Response:
    found = find_session(central, **where)
    if not central.may_edit(request.user):
        raise Refusal(403)
    with central.store.transaction():
        central.catalog.drop(parent_of(found))
        central.store.run("DELETE FROM session WHERE number=?", found["number"])
    return text("")


@route("GET", *SCANS)
def scans(central: Central, request: Request, **where: str) -> Response:
    found = find_session(central, **where)
    return result_set(
        [
            {
                "xnat_imagescandata_id": str(number),
                "ID": scan["id"],
                "type": scan["description"],
                "quality": "usable",
                "xsiType": xsi_type(scan["modality"], "ScanData"),
                "note": "",
                "series_description": scan["description"],
                "URI": f"/data/experiments/{session_id(found)}/scans/{scan['id']}",
                "UID": scan["uid"],
            }
            for number, scan in enumerate(central.catalog.scans(parent_of(found)))
        ]
    )


@route("GET", *(f"{scan}/{{scan}}" for scan in SCANS))
def scan(central: Central, request: Request, scan: str, **where: str) -> Response:
    found = find_session(central, **where)
    if request.get("format").lower() == "zip":
        return scan_files(central, request, scan, **where)
    document = session_document(central, found)
    for child in document["children"]:
        for one in child["items"]:
            if one["data_fields"]["ID"] == scan:
                return as_json({"items": [one]})
    raise Refusal(404, f"Unable to find scan {scan}")


@route("PUT", *(f"{scan}/{{scan}}" for scan in SCANS))
def put_scan(central: Central, request: Request, scan: str, **where: str) -> Response:
    found = find_session(central, **where)
    if not central.may_edit(request.user):
        raise Refusal(403)
    parent = parent_of(found)
    if all(known["id"] != scan for known in central.catalog.scans(parent)):
        modality = re.sub(r"^xnat:|ScanData$", "", request.get("xsiType", default="xnat:mrScanData")).upper()
        description = request.get("xnat:imageScanData/series_description", "series_description", "type")
        central.catalog.scan_for(
            parent, scan, request.get("UID", default=f"{parent}/{scan}"), modality, description
        )
    return text("")


@route("GET", *(f"{scan}/{{scan}}/files" for scan in SCANS))
def scan_files(central: Central, request: Request, scan: str, **where: str) -> Response:
    found = find_session(central, **where)
    chosen = None if scan in ("ALL", "*") else set(scan.split(","))
    entries = [
        entry
        for entry in central.catalog.files(parent_of(found))
        if entry.scan and (chosen is None or entry.scan in chosen)
    ]
    if request.get("format").lower() == "zip":
        return send_zip(central, parent_of(found), entries, found["label"])
    return result_set(file_rows(central, request, entries, f"/data/experiments/{session_id(found)}"))


# subjects


@route("GET", "/data/subjects", SUBJECTS)
def subjects(central: Central, request: Request, project: str | None = None) -> Response:
    rows = central.store.all("SELECT * FROM subject WHERE ? IS NULL OR project=?", project, project)
    return result_set(
        [
            {
                "ID": f"XNAT_S{row['number']:05d}",
                "label": row["label"],
                "project": row["project"],
                "URI": f"/data/subjects/XNAT_S{row['number']:05d}",
            }
            for row in rows
        ]
    )


@route("GET", "/data/subjects/{subject}", SUBJECTS + "/{subject}")
def subject(central: Central, request: Request, subject: str, project: str | None = None) -> Response:
    for row in central.store.all("SELECT * FROM subject WHERE ? IS NULL OR project=?", project, project):
        identifier = f"XNAT_S{row['number']:05d}"
        if subject in (identifier, row["label"]):
            fields = {"ID": identifier, "label": row["label"], "project": row["project"]}
            return as_json({"items": [item("xnat:subjectData", fields, [])]})
    raise Refusal(404, f"Unable to find the specified subject {subject}.")


@route("PUT", SUBJECTS + "/{subject}")
def put_subject(central: Central, request: Request, project: str, subject: str) -> Response:
    if not central.may_edit(request.user):
        raise Refusal(403)
    if project not in central.projects:
        raise Refusal(404, f"Unable to identify project: {project}")
    return text(f"XNAT_S{central.archive.subject(project, clean(subject)):05d}", 201)
