"""An account at an XNAT: requests with its token, XNAT's tables and documents, and what is wrong in words."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import requests

from relay_agent.config_destinations import XNAT
from relay_agent.destinations import Retry, Stopped
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.web import Web
from relay_agent.package import Manifest


class Account:
    """What all that is delivered to an XNAT has in common. Thread-safe."""

    def __init__(self, config: XNAT, tokens: Tokens) -> None:
        self._config = config
        self._tokens = tokens
        self._web = Web(config, None)

    @property
    def trouble(self) -> str:
        """What operators should know early about the credential; empty when all is well."""
        return self._tokens.trouble

    def idle(self) -> None:
        """Renew the token when it is time: a box that was idle for its lifetime would need an operator."""
        self._tokens.keep(self._issue)

    def _ask(self, method: str, path: str, **request: Any) -> requests.Response:
        """A request with the current token; a refused one is dropped, so that the next try uses the credential."""
        self._web.auth = self._tokens.current(self._issue)
        answer = self._web.ask(method, path, **request)
        if answer.status_code == 401:
            self._tokens.forget()
            raise Retry(self._refused)
        return answer

    @property
    def _refused(self) -> str:
        return (f"{self._web.host}: the credential was refused. If this lasts, write a valid user:password or "
                "alias:secret into the credential file")

    def _issue(self, pair: tuple[str, str]) -> dict[str, str]:
        self._web.auth = pair
        answer = self._web.ask("GET", "/data/services/tokens/issue")
        if answer.status_code == 401:
            raise Retry(self._refused)
        if answer.status_code != 200:
            raise Retry(self._web.failure(answer, "the request for a token"))
        token = self._web.json(answer, "the request for a token")
        if not isinstance(token, dict) or not {"alias", "secret"} <= token.keys():
            raise Retry(f"{self._web.host}: the answer to the request for a token has no alias")
        return token

    def _list(self, path: str, **params: str) -> list[dict[str, Any]]:
        """Rows of one of XNAT's result sets; none when it is not there (404)."""
        answer = self._ask("GET", path, params={"format": "json", **params})
        if answer.status_code == 404:
            return []
        if answer.status_code == 403:
            raise Retry(f"{self._web.host}: this account may not read {short(path)}; give it the member role there")
        if answer.status_code != 200:
            raise Retry(self._web.failure(answer, f"GET {short(path)}"))
        body = self._web.json(answer, f"GET {short(path)}")
        try:
            return list(body["ResultSet"]["Result"])
        except (KeyError, TypeError):
            raise Retry(f"{self._web.host}: GET {short(path)} has no result set") from None

    def _session(self, manifest: Manifest) -> dict[str, Any] | None:
        """The archived session's document; :class:`Stopped` when its label belongs to another study."""
        path = (f"/data/projects/{quote(manifest.project)}/subjects/{quote(manifest.subject)}"
                f"/experiments/{quote(manifest.session)}")
        answer = self._ask("GET", path, params={"format": "json"})
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise Retry(self._web.failure(answer, "the look into the archive"))
        try:
            found: dict[str, Any] = self._web.json(answer, "the look into the archive")["items"][0]
            _, study = str(found["data_fields"]["ID"]), str(found["data_fields"].get("UID") or "")
        except (KeyError, IndexError, TypeError):
            raise Retry(f"{self._web.host}: the look into the archive has no session in it") from None
        if manifest.study_uid not in ("", study):  # raw data of other makers do not know their study
            raise Stopped("the archive has another study under this project, subject and session label. Give this one "
                          "other labels: relay-agent assign")
        return found


def short(text: str) -> str:
    """An address for a message, up to the project: what follows may be labels, and those patients' names."""
    return re.sub(r"(/(?:projects|experiments)/[^/\s]+)/\S+", r"\1/…", " ".join(text.split()))[:200]
