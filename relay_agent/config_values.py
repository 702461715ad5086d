"""The configuration's values: what a setting may hold, checked and converted while the file is read."""

from __future__ import annotations

import ipaddress
import re
from datetime import time
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from relay_agent import units


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise ValueError("use letters, digits, '_', '.' and '-' (it becomes a folder name), at most 64 characters")
    return text


def _ae_title(text: str) -> str:
    if not 1 <= len(text.strip()) <= 16 or "\\" in text or not text.isascii() or not text.isprintable():
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash (DICOM PS3.5, VR AE)")
    return text.strip()


def _caller(text: str) -> str:
    text = text.strip()
    ae_title, _, network = text.rpartition("@") if "@" in text else (text, "", "")
    if "@" not in text and re.fullmatch(r"[0-9a-fA-F.:]+(/\d+)?", text) and ("." in text or ":" in text):
        ae_title, network = "", text
    if ae_title and ae_title != "*":
        _ae_title(ae_title)
    if network:
        ipaddress.ip_network(network, strict=False)
    return text


def _peer(text: str) -> str:
    ae_title, _, rest = text.partition("@")
    host, _, port = rest.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError('write a peer as "AE@host:port"')
    _ae_title(ae_title)
    return text


def _tag(text: str) -> str:
    found = re.fullmatch(r"\(?([0-9a-fA-F]{4}),?([0-9a-fA-F]{4})\)?", text)
    if not found:
        raise ValueError('write a tag as "gggg,eeee", for example "0008,1030"')
    return (found[1] + found[2]).upper()


def _credential(text: str) -> str:
    if ":" in text or not text.strip():
        raise ValueError("name the file, never write the secret itself here")
    return text


def _template(text: str) -> str:
    try:
        text.format_map(dict.fromkeys(("project", "subject", "session", "accession"), ""))
    except (KeyError, ValueError, IndexError, AttributeError):
        raise ValueError("use {project}, {subject}, {session} and {accession}, and no other braces") from None
    return text


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Duration = Annotated[float, BeforeValidator(units.duration), PlainSerializer(units.show_duration)]
Size = Annotated[int, BeforeValidator(units.size), PlainSerializer(units.show_size)]
Rate = Annotated[float, BeforeValidator(units.rate), Field(gt=0)]
Name = Annotated[str, AfterValidator(_name)]
AETitle = Annotated[str, AfterValidator(_ae_title)]
Caller = Annotated[str, AfterValidator(_caller)]
Peer = Annotated[str, AfterValidator(_peer)]
Tag = Annotated[str, AfterValidator(_tag)]
Template = Annotated[str, AfterValidator(_template)]
Regex = Annotated[str, AfterValidator(_regex)]
Credential = Annotated[str, AfterValidator(_credential)]


class Table(BaseModel):
    """A table of the file: unknown settings are errors, and nothing is changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Window(Table):
    """One of these windows, and how fast data travel in it."""

    start: time = Field(description="Local time at which the window opens.", examples=["18:00"])
    end: time = Field(description="Local time at which it closes; earlier than start means past midnight.", examples=["06:00"])
    bandwidth: Rate | None = Field(None, description="Limit inside this window; absent means the bandwidth beside windows.", examples=["80 Mbit/s"])

    @model_validator(mode="after")
    def _opens(self) -> Window:
        if self.start == self.end:
            raise ValueError(f"start = end = {self.start} would never open; no window at all means always")
        return self

    def holds(self, moment: time) -> bool:
        """Whether it is open at this time of day."""
        if self.start <= self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end
