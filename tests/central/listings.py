"""Tables and zips of stored files, the same for the prearchive and the archive."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

from .store import Entry
from .web import Request, Response, spool

if TYPE_CHECKING:
    from .central import Central


def resource_rows(resources: list[Any], archived: bool = True) -> list[dict[str, Any]]:
    """XNAT's resource table; in the prearchive a resource has a label but no number yet."""
    rows = []
    for row in resources:
        cells = {
            "category": "scans" if row["scan"] else "resources",
            "cat_id": row["scan"],
            "label": row["label"],
            "file_count": row["files"],
            "file_size": row["bytes"],
        }
        if archived:
            cells |= {
                "xnat_abstractresource_id": row["number"],
                "element_name": "xnat:resourceCatalog",
                "cat_desc": "",
                "tags": "",
                "content": row["content"],
                "format": row["format"],
            }
        rows.append(cells)
    return rows


def file_rows(central: Central, request: Request, entries: list[Entry], base: str) -> list[dict[str, Any]]:
    """XNAT's file table. `digest` is the MD5 the catalogue holds: empty when checksums are off."""
    known = central.checksums and not central.strike("checksums-off", request)
    rows = []
    for entry in entries:
        scan = f"/scans/{entry.scan}" if entry.scan else ""
        rows.append(
            {
                "Name": entry.name.rsplit("/", 1)[-1],
                "Size": entry.size,
                "URI": f"{base}{scan}/resources/{entry.resource if 'prearchive' in base else entry.number}"
                f"/files/{entry.name}",
                "collection": entry.resource,
                "file_tags": entry.tags,
                "file_format": entry.format,
                "file_content": entry.content,
                "cat_ID": entry.number,
                "digest": entry.md5 if known else "",
            }
        )
    return rows


def send_zip(central: Central, parent: str, entries: list[Entry], label: str) -> Response:
    body = spool()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_STORED) as archive:
        for entry in entries:
            scan = f"scans/{entry.scan}/" if entry.scan else ""
            path = central.catalog.path(parent, entry.scan, entry.resource, entry.name)
            if path.exists():
                archive.write(path, f"{label}/{scan}resources/{entry.resource}/files/{entry.name}")
    return Response(
        200, body, "application/zip", {"Content-Disposition": f'attachment; filename="{label}.zip"'}
    )
