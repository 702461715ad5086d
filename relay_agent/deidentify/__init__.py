"""De-identify: where a route's anonymisation scripts run.

This release has no engine yet. The step stands in the path all the same and fails closed: a shipment whose route
names a script is held, never shipped as it is.
"""

from __future__ import annotations

from collections.abc import Sequence


def why_not(scripts: Sequence[str]) -> str | None:
    """Why these scripts cannot run, or None when there is nothing to run."""
    if not scripts:
        return None
    return (f"the script {scripts[0]} cannot run: this release has no anonymisation engine. "
            "Nothing is shipped without it; remove it from the route only if the project needs no de-identification")
