"""The box's key: what all mappings of UIDs, dates and numbers depend on, and nobody without it can undo."""

from __future__ import annotations

import secrets

from relay_agent.config import Config, secret
from relay_agent.ledger import Ledger


def box_key(config: Config, ledger: Ledger) -> bytes:
    """The key of all mappings: from the credential that the configuration names, or made once for this box."""
    if config.deidentify.key:
        return ":".join(secret(config.deidentify.key)).encode()
    with ledger.write() as connection:
        connection.execute("INSERT OR IGNORE INTO secret VALUES ('key', ?)", (secrets.token_bytes(32),))
        return bytes(connection.execute("SELECT value FROM secret WHERE name = 'key'").fetchone()["value"])
