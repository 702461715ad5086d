"""The relay agent: from C-STORE to proof of arrival."""

__version__ = "0.1.0"
