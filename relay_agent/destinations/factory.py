"""Opens the destination that the configuration names."""

from __future__ import annotations

from relay_agent.config import Config
from relay_agent.config_destinations import XNAT, DICOMweb
from relay_agent.destinations import Destination
from relay_agent.destinations.dicom import DICOMDestination
from relay_agent.destinations.dicomweb import DICOMwebDestination
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.xnat import XNATDestination
from relay_agent.throttle import Throttle


def open_destination(config: Config, name: str) -> Destination:
    """A destination ready for use; ``KeyError`` when the configuration has none of that name."""
    settings = config.destination_named(name)
    throttle = Throttle(settings.bandwidth, settings.windows)
    if isinstance(settings, XNAT):
        projects = {*config.identify.projects, *(route.assign_project for route in config.route
                                                 if name in route.destinations and route.assign_project)}
        scratch = config.data / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return XNATDestination(settings, throttle, Tokens(settings, config.data / "tokens"), scratch, sorted(projects))
    if isinstance(settings, DICOMweb):
        return DICOMwebDestination(settings, throttle)
    return DICOMDestination(settings, throttle)
