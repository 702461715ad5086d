"""Who is asking: passwords, alias tokens and web sessions."""

from __future__ import annotations

import base64
import binascii
import secrets
import string
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

from .store import Store
from .web import Refusal, Request

REALM = 'Basic realm="XNAT Protected Area"'
SESSION_TIMEOUT = 15 * 60.0
PUBLIC = ("/", "/data/services/auth", "/xapi/siteConfig/buildInfo")


class Accounts:
    def __init__(
        self, store: Store, users: Mapping[str, str], read_only: Collection[str], token_lifetime: float
    ) -> None:
        self.store = store
        self.users = dict(users)
        self.read_only = set(read_only)
        self.token_lifetime = token_lifetime
        self._sessions: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def authenticate(self, request: Request) -> None:
        """Set the request's user, or refuse with 401."""
        user = self._basic(request.headers.get("Authorization", "")) or self._cookie(request)
        if not user and request.path not in PUBLIC and not request.path.startswith("/stand-in/"):
            raise Refusal(401, "Login attempt failed. Please try again.", **{"WWW-Authenticate": REALM})
        request.user = user

    def check(self, name: str, password: str) -> str:
        """The user a name and password (or alias and secret) belong to, or nothing."""
        known = self.users.get(name)
        if known is not None:
            return name if secrets.compare_digest(known.encode(), password.encode()) else ""
        return self.token_user(name, password)

    def _basic(self, header: str) -> str:
        scheme, _, value = header.partition(" ")
        if scheme.lower() != "basic":
            return ""
        try:
            name, _, password = base64.b64decode(value).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return ""
        return self.check(name, password)

    def _cookie(self, request: Request) -> str:
        for part in request.headers.get("Cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == "JSESSIONID":
                return self._session_user(value)
        return ""

    # web sessions

    def _session_user(self, session: str) -> str:
        with self._lock:
            user, seen = self._sessions.get(session, ("", 0.0))
            if time.monotonic() - seen > SESSION_TIMEOUT:
                self._sessions.pop(session, None)
                return ""
            self._sessions[session] = (user, time.monotonic())
            return user

    def open_session(self, user: str) -> str:
        session = secrets.token_hex(16).upper()
        with self._lock:
            self._sessions[session] = (user, time.monotonic())
        return session

    def close_sessions(self, request: Request) -> None:
        with self._lock:
            for session in [s for s in self._sessions if s in request.headers.get("Cookie", "")]:
                del self._sessions[session]

    # alias tokens

    def issue(self, user: str) -> dict[str, Any]:
        alias = str(uuid.uuid4())
        secret = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(64))
        expires = time.time() + self.token_lifetime
        self.store.run("INSERT INTO token VALUES(?,?,?,?)", alias, secret, user, expires)
        return self._describe(alias, secret, user, expires)

    @staticmethod
    def _describe(alias: str, secret: str, user: str, expires: float) -> dict[str, Any]:
        return {
            "alias": alias,
            "secret": secret,
            "xdatUserId": user,
            "singleUse": False,
            "validIPAddresses": [],
            "estimatedExpirationTime": int(expires * 1000),
            "enabled": True,
        }

    def tokens(self, user: str) -> list[dict[str, Any]]:
        self._purge()
        rows = self.store.all("SELECT * FROM token WHERE user=?", user)
        return [self._describe(**dict(row)) for row in rows]

    def token_user(self, alias: str, secret: str) -> str:
        self._purge()
        row = self.store.one("SELECT * FROM token WHERE alias=?", alias)
        return (
            str(row["user"])
            if row and secrets.compare_digest(row["secret"].encode(), secret.encode())
            else ""
        )

    def invalidate(self, alias: str) -> None:
        self.store.run("DELETE FROM token WHERE alias=?", alias)

    def _purge(self) -> None:
        # XNAT purges hourly and looks at no date otherwise; here a token dies on time.
        self.store.run("DELETE FROM token WHERE expires<=?", time.time())
