"""Studies that a scanner of the lab sends to a box, and whether each image is in the archive, once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import Any

from pydicom.uid import generate_uid

from tests import data
from tests.box.conftest import PROJECT

SHARED = "/srv/relay"  # where peers see the project


class Study:
    """Ten images that nobody has sent before, for a session of their own."""

    def __init__(self, label: str, comments: str = "Project:P1 Subject:{session} Session:{session}") -> None:
        self.session = f"{label}_{generate_uid()[-8:]}"
        self.images = list(data.study(comments=comments.format(session=self.session)))
        self._folder = PROJECT / "build/lab/studies" / self.session
        data.write(self.images, self._folder)

    def send(self, scanner: Any, address: str) -> bool:
        """Whether the box acknowledged every image."""
        folder = self._folder.relative_to(PROJECT)
        return bool(scanner.run(f"storescu -aet SCANNER -aec RELAY {address} 11112 +sd {SHARED}/{folder}").succeeded)

    def forget(self) -> None:
        """Delete the files here."""
        shutil.rmtree(self._folder, ignore_errors=True)


def delivered(studies: list[Study], host: Any) -> bool:
    """Whether the box calls every image of them delivered."""
    rows = json.loads(host.check_output("relay-agent list --limit 10000 --json < /dev/null"))
    done = Counter[str]()
    for row in rows:
        if row["state"] == "delivered":
            done[row["session"]] += row["instances"]
    return all(done[study.session] == len(study.images) for study in studies)


def archived(studies: list[Study], central: Any) -> bool:
    """Whether the archive has every image of them, once."""
    files = central.check_output("find /var/lib/xnat -name '*.dcm'")
    return all(files.count(f"/{study.session}/") == len(study.images) for study in studies)
