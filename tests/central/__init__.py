"""A stand-in for the central XNAT.

It answers the part of XNAT's REST interface that an uploader meets, stores what it is sent, and can
be told to misbehave in the ways real servers, proxies and networks do. It is not XNAT: a test that
passes here says that the relay keeps to the protocol as documented, not that a given XNAT version
accepts it.
"""

from .central import Central
from .faults import FAULTS

__all__ = ["FAULTS", "Central"]
