"""Studies that a scanner of the lab sends to a box, and whether each image is in the archive, once."""

from __future__ import annotations

import json
import shutil
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

    def delivered(self, host: Any) -> list[dict[str, Any]]:
        """The box's shipments that hold it and are delivered, once that is every image."""
        rows = json.loads(host.check_output("relay-agent list --limit 1000 --json < /dev/null"))
        rows = [row for row in rows if row["session"] == self.session and row["state"] == "delivered"]
        return rows if sum(row["instances"] for row in rows) == len(self.images) else []

    def archived(self, central: Any) -> int:
        """How many files of it the archive has."""
        return int(central.check_output(f"find /var/lib/xnat -path '*{self.session}*' -name '*.dcm' | wc -l"))

    def forget(self) -> None:
        """Delete the files here."""
        shutil.rmtree(self._folder, ignore_errors=True)
