"""Login, tokens, projects and site settings; and the stand-in's own controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .faults import FAULTS
from .prearchive import CODES
from .routes import route
from .web import Refusal, Request, Response, as_json, result_set, text

if TYPE_CHECKING:
    from .central import Central

SITE_SCRIPT = """version "6.1"
project != "Unassigned" ? (0008,1030) := project
(0010,0010) := subject
(0010,0020) := session
"""
MODEL = Path(__file__).with_name("model.xsd")


@route("GET", "/")
def home(central: Central, request: Request) -> Response:
    if not request.user:
        return text("<!DOCTYPE html><html><body>Stand-in for XNAT</body></html>", type="text/html")
    request.session = central.accounts.open_session(request.user)
    return text("<!DOCTYPE html><html><body>Stand-in for XNAT, logged in</body></html>", type="text/html")


# login


@route("PUT POST", "/data/services/auth")
def login(central: Central, request: Request) -> Response:
    user = central.accounts.check(
        request.get("username", "j_username"), request.get("password", "j_password")
    )
    if not user:
        raise Refusal(401, "Login attempt failed. Please try again.")
    request.session = central.accounts.open_session(user)
    return text(request.session)


@route("GET", "/data/auth")
def who(central: Central, request: Request) -> Response:
    return text(f"User '{request.user}' is logged in")


@route("GET POST", "/data/JSESSION")
def jsession(central: Central, request: Request) -> Response:
    request.session = central.accounts.open_session(request.user)
    suffix = "; XNAT_CSRF=00000000-0000-0000-0000-000000000000" if request.flag("CSRF") else ""
    return text(request.session + suffix)


@route("DELETE", "/data/JSESSION")
def logout(central: Central, request: Request) -> Response:
    central.accounts.close_sessions(request)
    return text("")


@route("GET", "/data/services/tokens/issue", "/data/services/tokens/issue/user/{user}")
def issue(central: Central, request: Request, user: str = "") -> Response:
    if user and user != request.user:
        raise Refusal(403, "Only administrators may issue tokens for other users.")
    return as_json(central.accounts.issue(request.user))


@route("GET", "/data/services/tokens/show")
def show_tokens(central: Central, request: Request) -> Response:
    return as_json(central.accounts.tokens(request.user))


@route("GET", "/data/services/tokens/validate/{alias}/{secret}")
def validate(central: Central, request: Request, alias: str, secret: str) -> Response:
    user = central.accounts.token_user(alias, secret)
    return as_json({"valid": user} if user else {})


@route(
    "GET DELETE",
    "/data/services/tokens/invalidate/{alias}",
    "/data/services/tokens/invalidate/{alias}/{secret}",
)
def invalidate(central: Central, request: Request, alias: str, secret: str = "") -> Response:
    central.accounts.invalidate(alias)
    return text("")


# site


@route("GET", "/xapi/siteConfig/buildInfo")
def build_info(central: Central, request: Request) -> Response:
    return as_json(
        {
            "version": central.version,
            "buildNumber": "stand-in",
            "commit": "none",
            "buildDate": "2024-01-01T00:00:00Z",
            "application": "stand-in for XNAT",
        }
    )


@route("GET", "/xapi/siteConfig/uptime")
def uptime(central: Central, request: Request) -> Response:
    return as_json({"days": "0", "hours": "0", "minutes": "0", "seconds": "1"})


@route("GET", "/xapi/siteConfig/checksums", "/xapi/siteConfig/values/checksums")
def checksums(central: Central, request: Request) -> Response:
    off = not central.checksums or central.strike("checksums-off", request)
    return as_json(not off)


@route("GET", "/xapi/schemas")
def schemas(central: Central, request: Request) -> Response:
    return as_json(["xnat"])


@route("GET", "/xapi/schemas/xnat")
def schema(central: Central, request: Request) -> Response:
    return Response(200, MODEL.read_bytes(), "application/xml")


@route("GET", "/data/search/elements")
def elements(central: Central, request: Request) -> Response:
    names = ("xnat:subjectData", "xnat:mrSessionData", "xnat:projectData")
    return result_set(
        [{"ELEMENT_NAME": name, "SINGULAR": name, "PLURAL": name, "SECURED": "true"} for name in names]
    )


@route("GET", "/xapi/access/projects")
def access(central: Central, request: Request) -> Response:
    role = "Owners" if central.may_edit(request.user) else "Collaborators"
    return as_json([{"ID": project, "role": role} for project in central.projects])


@route("GET", "/xapi/event_tracking/{key}", "/data/status/{key}")
def tracking(central: Central, request: Request, key: str) -> Response:
    if key not in central.events:
        raise Refusal(404, f"No event tracking entry for {key}")
    return as_json(central.events[key])


# projects


def project_row(project: str) -> dict[str, str]:
    return {
        "ID": project,
        "name": project,
        "secondary_ID": project,
        "description": "",
        "pi_firstname": "",
        "pi_lastname": "",
        "URI": f"/data/projects/{project}",
    }


@route("GET", "/data/projects")
def projects(central: Central, request: Request) -> Response:
    editing = request.get("permissions") in ("edit", "delete")
    shown = [] if editing and not central.may_edit(request.user) else central.projects
    return result_set([project_row(project) for project in shown], "Projects")


def known_project(central: Central, project: str) -> str:
    if project not in central.projects:
        raise Refusal(404, f"Unable to find project with ID {project}")
    return project


@route("GET", "/data/projects/{project}")
def one_project(central: Central, request: Request, project: str) -> Response:
    known_project(central, project)
    return as_json(
        {
            "items": [
                {
                    "children": [],
                    "meta": {"isHistory": False, "xsi:type": "xnat:projectData"},
                    "data_fields": {"ID": project, "name": project, "secondary_ID": project},
                }
            ]
        }
    )


@route("GET", "/data/projects/{project}/prearchive_code", "/data/projects/{project}/quarantine_code")
def code(central: Central, request: Request, project: str) -> Response:
    known_project(central, project)
    return text(central.store.setting(f"{request.path.rsplit('/', 1)[1]}/{project}", "0"))


@route(
    "PUT",
    "/data/projects/{project}/prearchive_code/{value}",
    "/data/projects/{project}/quarantine_code/{value}",
)
def set_code(central: Central, request: Request, project: str, value: str) -> Response:
    known_project(central, project)
    if not central.may_edit(request.user):
        raise Refusal(403)
    kind = request.path.split("/")[4]
    if kind == "prearchive_code" and value not in CODES:
        raise Refusal(400, f"Unknown prearchive code {value}")
    central.store.set(f"{kind}/{project}", value)
    return text("")


# anonymisation and other configuration: kept and shown; only the default site script is carried out


@route("GET PUT", "/xapi/anonymize/{scope}/enabled", "/xapi/anonymize/projects/{project}/enabled")
def script_enabled(central: Central, request: Request, scope: str = "", project: str = "") -> Response:
    key = "site_anon" if scope == "site" else f"anon_enabled/{project}"
    if request.method == "PUT":
        central.store.set(key, "true" if "true" in (request.get("enable") or request.text()) else "false")
        return text("")
    return as_json(central.store.setting(key, "false") == "true")


@route("GET PUT", "/xapi/anonymize/{scope}", "/xapi/anonymize/projects/{project}")
def script(central: Central, request: Request, scope: str = "", project: str = "") -> Response:
    key = f"anon/{project or 'site'}"
    if request.method == "PUT":
        central.store.set(key, request.text())
        return text("")
    content = central.store.setting(key, "" if project else SITE_SCRIPT)
    return text(content) if content else Response(204)


@route("GET PUT", "/data/config/{tool}/{path*}", "/data/projects/{project}/config/{tool}/{path*}")
def config(central: Central, request: Request, tool: str, path: str, project: str = "") -> Response:
    key = f"config/{project}/{tool}/{path}"
    if request.method == "PUT":
        central.store.set(key, request.text())
        return text("", 201)
    contents = central.store.setting(key)
    if not contents:
        raise Refusal(404, f"Config not found for tool {tool} and path {path}")
    if request.flag("contents"):
        return text(contents)
    return result_set(
        [{"tool": tool, "path": path, "project": project, "status": "enabled", "contents": contents}]
    )


# the stand-in's own controls


@route("GET", "/stand-in/requests")
def request_log(central: Central, request: Request) -> Response:
    return as_json(list(central.requests))


@route("GET", "/stand-in/misbehave")
def faults(central: Central, request: Request) -> Response:
    return as_json(
        {"active": central.faults.listing(), "known": {name: own for name, (_, own) in FAULTS.items()}}
    )


@route("POST", "/stand-in/misbehave")
def misbehave(central: Central, request: Request) -> Response:
    try:
        options = json.loads(request.text())
        central.misbehave(options.pop("name"), **options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(400, str(error)) from error
    return as_json(central.faults.listing())


@route("POST", "/stand-in/behave")
def behave(central: Central, request: Request) -> Response:
    body = request.text()
    central.behave(json.loads(body).get("name") if body else None)
    return as_json(central.faults.listing())


@route("GET", "/stand-in/instances/{project}/{session}")
def instances(central: Central, request: Request, project: str, session: str) -> Response:
    stored = central.archive_instances(project, session)
    return as_json(
        {uid: {"size": one.size, "md5": one.md5, "path": str(one.path)} for uid, one in stored.items()}
    )
