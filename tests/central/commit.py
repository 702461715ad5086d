"""Building a prearchive session and, where asked for, archiving it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .archive import Destination, Overwrite
from .identify import label
from .prearchive import CODES, Key
from .web import Refusal, Request

if TYPE_CHECKING:
    from .central import Central


def project_code(central: Central, project: str) -> str:
    return CODES[central.store.setting(f"prearchive_code/{project}", "0")]


def destination(central: Central, key: Key, request: Request | None = None) -> Destination:
    """Where a row is to go: the request's labels before the row's own."""
    row = central.prearchive.row(key)
    if request is None:
        return Destination(row["project"], row["subject"], row["name"])
    return Destination(
        label(request.get("project", "PROJECT_ID", default=row["project"])),
        label(request.get("subject", "SUBJECT_ID", default=row["subject"])),
        label(request.get("session", "EXPT_LABEL", "label", default=row["name"])),
    )


def automatic(code: str) -> Overwrite:
    """The automatic path merges for the auto-archive codes, whatever `overwrite` said."""
    return Overwrite(merge=code != "Manual", files=code == "AutoArchiveOverwrite")


def archive_idle(central: Central, key: Key) -> None:
    """What the auto-builder does with a quiet row."""
    row = central.prearchive.row(key)
    code = row["autoarchive"] or project_code(central, key.project)
    central.prearchive.update(key, autoarchive=code)
    if central.prearchive.build(key) == "READY" and code != "Manual" and key.project != "Unassigned":
        central.archive.archive(key, destination(central, key), automatic(code))


def commit(central: Central, request: Request, key: Key) -> tuple[bool, str]:
    """`action=commit`: build, then archive if the row is to be auto-archived. (archived?, URI)"""
    prearchive = central.prearchive
    if central.strike("commit-409-locked", request):
        raise Refusal(409, "session document locked")
    row = prearchive.row(key)
    code = row["autoarchive"] or project_code(central, key.project)
    if wish := request.get("AA", "auto-archive") or (
        "true" if request.get("dest").startswith("/archive") else ""
    ):
        code = "Manual" if wish.lower() != "true" else code if code != "Manual" else "AutoArchive"
    prearchive.update(key, autoarchive=code)
    slow = central.strike("slow-commit", request)
    status = prearchive.build(key, slow["seconds"] if slow else 0.0)
    if status == "ERROR":
        raise Refusal(400, "No scans were found in the session.")
    if fault := central.strike("commit-conflict", request):
        prearchive.fail(key, "CONFLICT", fault["message"])
        raise Refusal(409, fault["message"])
    if status != "READY" or code == "Manual" or key.project == "Unassigned":
        return False, f"/data{key.url}"
    return True, store_in_archive(central, request, key, automatic(code))


def store_in_archive(central: Central, request: Request, key: Key, overwrite: Overwrite) -> str:
    """Archive, or only claim to have done so."""
    to = destination(central, key, request)
    fault = central.strike("lying-archive", request)
    if fault and fault["lose"] is None:
        central.prearchive.forget(key)
        return to.uri
    uri = central.archive.archive(key, to, overwrite)
    if fault:
        for entry in central.catalog.files(to.parent)[: fault["lose"]]:
            central.catalog.remove_file(to.parent, entry)
    return uri
