"""The bill of materials: every Debian package and every wheel of the image, as SPDX 2.3 in JSON."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

from image.common import EPOCH
from image.lock import Package, wheels


def document(name: str, system: Path, locked: dict[str, list[Package]], modules: str) -> dict[str, object]:
    """The document. Debian's packages are those that dpkg has in the tree, with the digests of the lock file."""
    digests = {(p.name, p.version): p.sha256 for p in locked["tree"]}
    packages = []
    for stanza in (system / "var/lib/dpkg/status").read_text().strip().split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", stanza, re.MULTILINE))
        if not fields["Status"].endswith(" ok installed"):  # whether wanted or held
            continue
        sha256 = digests.get((fields["Package"], fields["Version"]), modules)
        packages.append(entry("deb", fields["Package"], fields["Version"], sha256, fields.get("Maintainer", ""),
                              f"pkg:deb/debian/{quote(fields['Package'])}@{quote(fields['Version'], safe='')}"
                              f"?arch={fields['Architecture']}&distro=trixie"))
    packages += [entry("wheel", p.name, p.version, p.sha256, "", f"pkg:pypi/{p.name}@{quote(p.version, safe='')}")
                 for p in wheels()]
    return {
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": name,
        "documentNamespace": f"https://spdx.org/spdxdocs/{quote(name)}",
        "creationInfo": {"created": datetime.fromtimestamp(EPOCH, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                         "creators": ["Tool: relay-image-build"]},
        "packages": packages,
        "relationships": [{"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES",
                           "relatedSpdxElement": package["SPDXID"]} for package in packages],
    }


def entry(kind: str, name: str, version: str, sha256: str, maker: str, address: str) -> dict[str, object]:
    """One package."""
    return {
        "SPDXID": "SPDXRef-" + re.sub(r"[^A-Za-z0-9.-]", "-", f"{kind}-{name}-{version}"),
        "name": name, "versionInfo": version, "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION", "copyrightText": "NOASSERTION",
        "supplier": f"Organization: {maker}" if maker else "NOASSERTION",
        "checksums": [{"algorithm": "SHA256", "checksumValue": sha256}],
        "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
                          "referenceLocator": address}],
    }
