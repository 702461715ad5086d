"""The configuration's destinations: where data go, when, how fast, and how arrival is proved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from relay_agent.config_values import AETitle, Credential, Duration, Name, Rate, Size, Table, Window


class _Destination(Table):
    name: Name = Field(description="Name of the destination.", examples=["central"])
    bandwidth: Rate | None = Field(None, description="Limit of what is sent, over all streams; absent means none.", examples=["24 Mbit/s"])
    windows: tuple[Window, ...] = Field((), description="Hours in which to send; none means always.")
    streams: int = Field(3, ge=1, le=16, description="Parallel streams.")
    retry_first: Duration = Field(10.0, gt=0, description="Pause after the first failure; it doubles from there, with jitter.", examples=["10 s"])
    retry_longest: Duration = Field(900.0, gt=0, description="Longest pause. Retries never end.", examples=["15 min"])


class _HTTP(_Destination):
    url: str = Field(pattern=r"^https?://[^/@\s]+(/\S*)?$", description="Base address, without a user. TLS is always verified; plain http is for tests on one machine.", examples=["https://xnat.example.org"])
    credential: Credential | None = Field(None, description='File with one line "user:password" or "alias:secret"; a bare name is looked up in $CREDENTIALS_DIRECTORY.', examples=["central"])
    ca_bundle: Path | None = Field(None, description="PEM file of the CAs to trust instead of the system's, for example of an inspecting proxy.", examples=["/etc/relay-agent/ca.pem"])
    proxy: str | None = Field(None, pattern=r"^https?://[^/\s]+/?$", description="HTTP(S) proxy; absent means that of the environment.", examples=["http://proxy.example.org:3128"])
    part_size: Size = Field(256 * 2**20, ge=2**20, le=2**31, description="Largest part that travels in one request.", examples=["256 MiB"])
    timeout: Duration = Field(120.0, gt=0, description="How long an answer may take. After a time-out the server is looked at first; only what is missing is sent again.", examples=["2 min"])
    verify: Literal["whole", "sample"] = Field("whole", description="How much is fetched back where the server's digests cannot prove arrival: everything, or one instance of each series.")


class XNATKSpace(Table):
    """How raw k-space data go to this XNAT: always after DICOM, in pieces where a request would be cut on its way."""

    bandwidth: Rate | None = Field(None, description="Limit of raw data, within that of the destination; absent means none of their own.", examples=["16 Mbit/s"])
    windows: tuple[Window, ...] = Field((), description="Hours in which raw data are sent, within those of the destination; none means always.")
    single_request: Size = Field(0, description="Files up to this size travel in one request, for a way on which nothing cuts long requests. Larger ones go in pieces, which somebody joins over there (relay-agent kspace join).", examples=["100 GB"])
    piece_time: Duration = Field(25.0, gt=0, description="A piece is as large as the line moves in this time, at most part_size; well below the 100 s after which proxies cut.", examples=["25 s"])
    compression: Literal["none", "zstd"] = Field("none", description='"zstd" packs the pieces without loss (a shuffle of 4 bytes, then zstd), which whoever joins them over there undoes; "none" sends the original bytes.')


class XNAT(_HTTP):
    """A central XNAT."""

    kind: Literal["xnat"] = Field("xnat", description="xnat, dicomweb or dicom.")
    compression: Literal["auto", "deflate", "store"] = Field("auto", description="Deflate when the line is slower than the compressor, store when it is faster.")
    archive: bool = Field(True, description="Archive at once unless the session says otherwise (AA:false).")
    accept_prearchive: bool = Field(False, description="Take a session that waits in the prearchive as delivered. Otherwise the box keeps it until it is archived.")
    prevent_anon: bool = Field(False, description="Ask XNAT not to run its site-wide script on these sessions. Only if the central site agrees.")
    token_lifetime: Duration = Field(2 * 86400.0, description="Lifetime of alias tokens at that XNAT (aliasTokenTimeout); refreshed at half of it.", examples=["2 d"])
    kspace: XNATKSpace = Field(default_factory=XNATKSpace)

    @model_validator(mode="after")
    def _meet(self) -> XNAT:
        raw = self.kspace.windows
        if raw and self.windows and not any(one.holds(other.start) or other.holds(one.start)
                                            for one in self.windows for other in raw):
            raise ValueError("windows and kspace.windows have no time in common, so that raw data would never be sent; "
                             "make them overlap")
        return self


class DICOMweb(_HTTP):
    """An archive that takes STOW-RS and answers QIDO-RS and WADO-RS (PS3.18)."""

    name: Name = Field(description="Name of the destination.", examples=["archive"])
    kind: Literal["dicomweb"] = Field(description="A DICOMweb archive.", examples=["dicomweb"])


class DICOM(_Destination):
    """Another Storage SCP."""

    name: Name = Field(description="Name of the destination.", examples=["pacs"])
    kind: Literal["dicom"] = Field(description="A DICOM receiver.", examples=["dicom"])
    host: str = Field(description="Host name or address.", examples=["pacs.example.org"])
    port: int = Field(description="TCP port.", examples=[104], ge=1, le=65535)
    ae_title: AETitle = Field(description="AE title of the receiver there.", examples=["PACS"])
    calling_ae_title: AETitle = Field("RELAY", description="AE title to call with.")
    tls_ca: Path | None = Field(None, description="PEM file of the CAs to trust; given, DICOM TLS is spoken.", examples=["/etc/relay-agent/ca.pem"])
    verify: Literal["find", "status"] = Field("find", description="Proof of arrival: C-FIND at IMAGE level after sending, or the C-STORE status alone.")


def _kind(value: Any) -> Any:
    # `kind` may be left out: XNAT is what this box is for.
    return {"kind": "xnat", **value} if isinstance(value, dict) else value


Destination = Annotated[XNAT | DICOMweb | DICOM, Field(discriminator="kind"), BeforeValidator(_kind)]
KINDS: dict[str | int, type[_Destination]] = {"xnat": XNAT, "dicomweb": DICOMweb, "dicom": DICOM}
