"""Alias tokens of an XNAT: issued with the credential from the configuration, renewed before they expire.

XNAT: ``/data/services/tokens/issue``; a token may issue its successor while it is valid, so a box that is on at
least once in the token's lifetime (2 days by default) never needs an operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from relay_agent import units
from relay_agent.config import secret
from relay_agent.config_destinations import XNAT
from relay_agent.destinations import Retry


def expiry(data: Path, name: str) -> float | None:
    """When the token of a destination expires (seconds since 1970), if it has one; ``data`` is the data folder."""
    token = _token(data / "tokens" / f"{name}.json")
    return token["expires"] if token else None


def _token(file: Path) -> dict[str, float] | None:
    try:
        token: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return token if {"alias", "secret", "issued", "expires"} <= token.keys() else None
    except (OSError, ValueError):
        return None


class Tokens:
    """The current token of one destination, kept in a file that only the service may read."""

    def __init__(self, config: XNAT, folder: Path) -> None:
        self._config = config
        self._file = folder / f"{config.name}.json"
        self._lock = threading.Lock()
        self._renew_again = 0.0
        self._trouble = ""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def trouble(self) -> str:
        """Why renewing fails and when the token expires, for an early warning; empty when all is well."""
        return self._trouble

    def current(self, issue: Callable[[tuple[str, str]], dict[str, str]]) -> tuple[str, str] | None:
        """Alias and secret to use now; None without a credential.

        ``issue`` asks the server for a token with the given user and password and returns its JSON, or raises.
        """
        if not self._config.credential:
            return None
        with self._lock:
            token = _token(self._file)
            now = time.time()
            if token is None or token["expires"] <= now:
                return self._renew(secret(self._config.credential), issue)
            pair = (str(token["alias"]), str(token["secret"]))
            if now < token["issued"] + self._config.token_lifetime / 2 or time.monotonic() < self._renew_again:
                return pair
            try:
                return self._renew(pair, issue)
            except Retry as error:
                # The old one still works; try again in a while and let the operators know early.
                self._renew_again = time.monotonic() + 900
                self._trouble = (f"the token of {self._config.name} cannot be renewed ({error}); it expires in "
                                 f"{units.show_duration(token['expires'] - now)}")
                return pair

    def keep(self, issue: Callable[[tuple[str, str]], dict[str, str]]) -> None:
        """Renew a valid token when it is time; one that expired waits for :meth:`current`, so as not to log in idly."""
        token = _token(self._file)
        if token is not None and time.time() < token["expires"]:
            with contextlib.suppress(Retry):
                self.current(issue)

    def forget(self) -> None:
        """Drop the token, because the server refused it; the credential is next."""
        with self._lock:
            self._file.unlink(missing_ok=True)

    def _renew(self, pair: tuple[str, str], issue: Callable[[tuple[str, str]], dict[str, str]]) -> tuple[str, str]:
        answer = issue(pair)
        now = time.time()
        expires = float(answer.get("estimatedExpirationTime") or 0) / 1000
        if expires <= now:
            expires = now + self._config.token_lifetime
        token = {"alias": answer["alias"], "secret": answer["secret"], "issued": now, "expires": expires}
        partial = self._file.with_suffix(".new")
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(token, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)
        self._trouble = ""
        return str(answer["alias"]), str(answer["secret"])
