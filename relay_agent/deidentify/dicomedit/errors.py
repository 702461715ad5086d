"""How a function or a path says that it cannot go on; the engine adds the script's name and line."""

from __future__ import annotations


class Cannot(Exception):
    """A statement cannot be done exactly as it says; the message never holds a value of the object."""
