"""The configuration: one TOML file, read once, checked in full before anything starts.

Its classes, here and in :mod:`relay_agent.config_destinations` and :mod:`relay_agent.config_kspace`, are its only
description: they validate, their texts become the commented example (:func:`example`) and the remedy in an error message.
Secrets are never in it, only the names of files.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from relay_agent import config_text
from relay_agent.config_destinations import DICOM, KINDS, XNAT, Destination, DICOMweb
from relay_agent.config_kspace import KSpace, RouteKSpace
from relay_agent.config_values import (
    AETitle,
    Caller,
    Credential,
    Duration,
    Name,
    Peer,
    Regex,
    Size,
    Table,
    Tag,
    Template,
)
from relay_agent.deidentify.risk import Kind as Risk
from relay_agent.identify import Rules

DEFAULT_PATH = Path("/etc/relay-agent/config.toml")


class ConfigError(Exception):
    """The configuration file cannot be used; one finding a line, each with key, value and remedy."""


class TLS(Table):
    """DICOM TLS with the BCP 195 profile (PS3.15 section B.9 and B.12): TLS 1.2 or later, forward secrecy."""

    certificate: Path = Field(description="PEM file with the certificate and its chain.", examples=["/etc/relay-agent/dicom.crt"])
    key: Path = Field(description="PEM file with the private key; give the service read access only.", examples=["/etc/relay-agent/dicom.key"])
    client_ca: Path | None = Field(None, description="PEM file of the CAs whose client certificates are asked for; without it callers need none.", examples=["/etc/relay-agent/scanners-ca.crt"])


class Receiver(Table):
    """A Storage SCP: one AE title on one port. Several may share a port."""

    ae_title: AETitle = Field(description="Called AE title; also the receiver's name in routes and in the ledger.", examples=["RELAY"])
    port: int = Field(11112, ge=0, le=65535, description="TCP port.")
    address: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104 - scanners are on the network
    allow: tuple[Caller, ...] = Field(description='Who may call: AE titles, networks, or both as "AE@network"; "*" is anybody. Everybody else is rejected at association.', examples=[["MR1@192.0.2.0/24", "CTSCAN", "198.51.100.7"]])
    max_associations: int = Field(100, ge=1, description="More associations than this at a time are rejected as a passing shortage.")
    idle_timeout: Duration = Field(300.0, gt=0, description="An association on which nothing was heard for this long is aborted.", examples=["5 min"])
    commitment_to: tuple[Peer, ...] = Field((), description='Callers that expect the storage commitment report over an association of its own, as "AE@host:port". Everybody else gets it on the association that asked.', examples=[["MR1@192.0.2.10:104"]])
    tls: TLS | None = Field(None, description="DICOM TLS; absent means plain DICOM.")

    @property
    def name(self) -> str:
        """The receiver's name as a folder and in the ledger."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.ae_title)


class Receive(Table):
    """What all receivers share."""

    processes: int = Field(0, ge=0, description="Receiving processes; 0 is one for each core.")
    max_pdu: Size = Field(256 * 1024, ge=4096, le=64 * 2**20, description="Largest PDU that is accepted (PS3.8 section D.1).", examples=["256 KiB"])
    journal: Size = Field(64 * 2**20, description="Ring of each process in which small instances are made durable before they become files; 0 B switches it off.", examples=["64 MiB"])
    reserve: Size = Field(5 * 2**30, description="Below this much free space instances are refused with A700, so that the disk never fills.", examples=["5 GiB"])


class Stage(Table):
    """When a session is complete."""

    quiet: Duration = Field(300.0, description="A session is complete when nothing came for this long and no open association still carries it.", examples=["5 min"])
    longest: Duration = Field(12 * 3600.0, description="It is taken as complete after this long in any case.", examples=["12 h"])
    landing_stable: Duration = Field(30.0, description="A file in the landing directory is taken in when it has not changed for this long.", examples=["30 s"])
    rescan: Duration = Field(60.0, description="The landing directory is read again this often, because notifications get lost.", examples=["60 s"])

    @model_validator(mode="after")
    def _ends(self) -> Stage:
        if self.longest < self.quiet:
            raise ValueError("longest is shorter than quiet, so that sessions would be cut; make it the longer one")
        return self


class Identify(Table):
    """Routing rules in XNAT's own syntax; they come before Project:/Subject:/Session:/AA: in the comments."""

    project_rules: tuple[str, ...] = Field((), description="XNAT's dicom/projectRules, one rule a line.", examples=[["(0008,1030):([A-Z]+)_.*:1"]])
    subject_rules: tuple[str, ...] = Field((), description="XNAT's dicom/subjectRules.", examples=[["(0010,0010):([^^]+).*:1"]])
    session_rules: tuple[str, ...] = Field((), description="XNAT's dicom/sessionRules.", examples=[["(0010,0020):(.*):1"]])
    auto_archive_rules: tuple[str, ...] = Field((), description="XNAT's dicom/aaRules.")
    projects: tuple[Name, ...] = Field((), description="Projects of the central XNAT that this box may assign. Only these are accepted from the whole Study Description or Accession Number, as XNAT itself accepts only projects that exist; empty switches those two fall-backs off.", examples=[["P1", "P2"]])

    @model_validator(mode="after")
    def _parses(self) -> Identify:
        self.rules()
        return self

    def rules(self) -> Rules:
        """The rules, parsed; a bad line raises with its list and number."""
        return Rules.parse(project=self.project_rules, subject=self.subject_rules, session=self.session_rules,
                           auto_archive=self.auto_archive_rules)


class Route(Table):
    """Where a session goes. The first route whose conditions all hold for one of the session's series takes it."""

    name: Name = Field(description="Name of the route, in the ledger and in receipts.", examples=["brain-study"])
    receiver: tuple[AETitle, ...] = Field((), description="Condition: received by one of these receivers.", examples=[["RELAY"]])
    calling_ae: tuple[AETitle, ...] = Field((), description="Condition: sent by one of these AE titles.", examples=[["MR1"]])
    modality: tuple[str, ...] = Field((), description="Condition: Modality (0008,0060).", examples=[["MR", "PT"]])
    scanner_serial: tuple[str, ...] = Field((), description="Condition: Device Serial Number (0018,1000).", examples=[["45678"]])
    project: tuple[str, ...] = Field((), description="Condition: the project that identification found.", examples=[["P1"]])
    tags: dict[Tag, Regex] = Field(default_factory=dict, description="Condition: each tag's value matches the regular expression as a whole.", examples=[{"0008,1030": "BRAIN.*"}])
    destinations: tuple[Name, ...] = Field(min_length=1, description="Names of the destinations; each is delivered to on its own.", examples=[["central"]])
    assign_project: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$", description="Assign this project, whatever identification found.", examples=["P1"])
    auto_archive: bool | None = Field(None, description="Archive at once (true) or leave in the prearchive (false) where the instances do not say so themselves (AA:).", examples=[True])
    review: bool = Field(False, description="Hold each session until a person releases it.")
    scripts: tuple[str, ...] = Field((), description='Anonymisation, in order, after the site-wide one: files of DicomEdit 6 or CTP scripts, or the DICOM profile as "ps3.15" with its options. A shipment whose scripts cannot run is not shipped.', examples=[["/etc/relay-agent/p1.das", "ps3.15 retain-device-identity"]])
    lookup: Path | None = Field(None, description="Lookup table of these scripts.", examples=["/etc/relay-agent/p1.lookup"])
    site_scripts: bool = Field(True, description="Run the site-wide scripts first.")
    headers: dict[Tag, Template] = Field(default_factory=dict, description="Set after the scripts: texts with {project}, {subject}, {session} and {accession} as identification or a reviewer gave them.", examples=[{"0008,0050": "{accession}", "0008,1030": "{project}", "0010,0010": "{subject}", "0010,0020": "{session}"}])
    identifiers: tuple[Tag, ...] = Field((), description="More elements whose original values must not be left anywhere in the result; name, IDs, birth date and accession number always are.", examples=[["0008,0080"]])
    keep: tuple[Tag, ...] = Field((), description="Elements in which original values may stay.", examples=[["0010,0030"]])
    patient_labels_allowed: bool = Field(False, description="Subject and session labels may be Patient's Name and Patient ID as received, where neither rules nor comments give others. Otherwise a de-identified session with such labels waits for a person.")
    pixel_risks_allowed: tuple[Risk, ...] = Field((), description=f"Kinds of objects that go on without a look at their pixels: {', '.join(Risk)}.", examples=[["ultrasound"]])
    kspace: RouteKSpace | None = Field(None)


class Deidentify(Table):
    """De-identification at this box, before anything leaves."""

    scripts: tuple[str, ...] = Field((), description="Site-wide scripts, run before those of the routes.", examples=[["/etc/relay-agent/site.das"]])
    lookup: Path | None = Field(None, description="Lookup table of the site-wide scripts.", examples=["/etc/relay-agent/site.lookup"])
    key: Credential | None = Field(None, description='Credential (one line "name:secret") that keys the mapping of UIDs; boxes with the same one map alike. Absent means a key made once and kept in the ledger.', examples=["uid-key"])
    processes: int = Field(0, ge=0, description="Processes that de-identify; 0 is one for each core.")


class Review(Table):
    """Review of sessions before they leave."""

    identified: tuple[str, ...] = Field((), description="Users who may see patients' data in a review; everybody else sees what will leave.", examples=[["anna"]])


class Purge(Table):
    """What is forgotten when. Nothing is, before it is verified at all its destinations."""

    retention: Duration = Field(7 * 86400.0, description="How long files are kept after that.", examples=["7 d"])


class Alert(Table):
    """E-mail to operators, one message a condition, with reminders."""

    smtp_host: str = Field(description="SMTP server.", examples=["mail.example.org"])
    smtp_port: int = Field(25, ge=1, le=65535, description="Its port.")
    starttls: bool = Field(False, description="Use STARTTLS (verified).")
    credential: Credential | None = Field(None, description='File with one line "user:password"; a bare name is looked up in $CREDENTIALS_DIRECTORY.', examples=["smtp"])
    sender: str = Field(pattern=r"^[^@\s]+@[^@\s]+$", description="From.", examples=["relay@hospital.example.org"])
    recipients: tuple[str, ...] = Field(min_length=1, description="To.", examples=[["imaging@example.org"]])
    reminder: Duration = Field(86400.0, description="A condition that lasts is told again this often.", examples=["1 d"])
    destination_down: Duration = Field(3600.0, description="Tell when a destination has failed for this long.", examples=["1 h"])
    nothing_received: Duration | None = Field(None, description="Tell when nothing was received for this long; absent means never.", examples=["3 d"])
    held: Duration = Field(86400.0, description="Tell when a session is held for longer than this.", examples=["1 d"])


class Config(Table):
    """Everything the agent is told."""

    name: Name = Field("relay", description="Name of this box, in receipts and alerts.", examples=["relay-0001"])
    data: Path = Field(Path("/var/lib/relay-agent"), description="Folder of the ledger, the spool and the landing directory; on one file system.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What goes to the journal. Patient values never do.")
    receive: Receive = Field(default_factory=Receive)
    receiver: tuple[Receiver, ...] = Field(min_length=1, description="At least one [[receiver]] is needed.")
    stage: Stage = Field(default_factory=Stage)
    identify: Identify = Field(default_factory=Identify)
    kspace: KSpace = Field(default_factory=KSpace)
    deidentify: Deidentify = Field(default_factory=Deidentify)
    review: Review = Field(default_factory=Review)
    route: tuple[Route, ...] = Field(())
    destination: tuple[Destination, ...] = Field(())
    purge: Purge = Field(default_factory=Purge)
    alert: Alert | None = Field(None)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for table, names in (("destination", [d.name for d in self.destination]),
                             ("route", [r.name for r in self.route]),
                             ("receiver", [r.name for r in self.receiver]),
                             ("kspace.source", [s.name for s in self.kspace.source])):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{table}: {', '.join(sorted(twice))} is there twice; give each its own name")
        known = {d.name for d in self.destination}
        for route in self.route:
            unknown = sorted(set(route.destinations) - known)
            if unknown:
                raise ValueError(f"route {route.name}: destinations = {unknown} is not defined; "
                                 f"add a [[destination]] of that name or use one of {sorted(known)}")
            strangers = sorted(set(route.receiver) - {r.ae_title for r in self.receiver})
            if strangers:
                raise ValueError(f"route {route.name}: receiver = {strangers} is not defined; "
                                 "add a [[receiver]] of that AE title or correct the name")
            if route.kspace and not any(isinstance(d, XNAT) and d.name in route.destinations for d in self.destination):
                raise ValueError(f"route {route.name}: kspace needs a destination of kind xnat; raw data are no DICOM")
        for source in self.kspace.source:
            strangers = sorted(set(source.receivers) - {r.ae_title for r in self.receiver})
            if strangers:
                raise ValueError(f"kspace.source {source.name}: receivers = {strangers} is not defined; "
                                 "add a [[receiver]] of that AE title or correct the name")
        if self.kspace.source and self.kspace.reserve <= self.receive.reserve:
            raise ValueError("kspace.reserve must be more than receive.reserve, or raw data leave no room for DICOM")
        ports: dict[tuple[str, int], TLS | None] = {}
        for receiver in self.receiver:
            where = (receiver.address, receiver.port)
            if receiver.port and ports.setdefault(where, receiver.tls) != receiver.tls:
                raise ValueError(f"receiver {receiver.ae_title}: port = {receiver.port} is shared with other tls "
                                 "settings; use the same or another port")
        return self

    @property
    def spool(self) -> Path:
        """Where received instances live from receive to purge."""
        return self.data / "spool"

    @property
    def deidentified(self) -> Path:
        """What was made of shipments, a folder each, until they are purged."""
        return self.data / "deidentified"

    @property
    def journal(self) -> Path:
        """The rings of the receiving processes."""
        return self.data / "journal"

    @property
    def landing(self) -> Path:
        """Where people put files; a folder below it named as a receiver stands for that receiver."""
        return self.data / "landing" / "dicom"

    @property
    def kspace_landing(self) -> Path:
        """Where raw k-space data arrive: a folder for each source."""
        return self.data / "kspace" / "landing"

    @property
    def kspace_spool(self) -> Path:
        """Where raw k-space data live from pick-up to purge; on the file system of their landing directory."""
        return self.data / "kspace" / "spool"

    @property
    def kspace_deidentified(self) -> Path:
        """What leaves of raw k-space data, a folder for each shipment, until it is purged."""
        return self.data / "kspace" / "deidentified"

    @property
    def ledger(self) -> Path:
        """The SQLite file that holds all state."""
        return self.data / "ledger.sqlite"

    def destination_named(self, name: str) -> XNAT | DICOMweb | DICOM:
        """The destination of that name; ``KeyError`` when the configuration no longer has it."""
        for destination in self.destination:
            if destination.name == name:
                return destination
        raise KeyError(name)


def load(path: Path) -> Config:
    """Read and check the file; ``ConfigError`` names every finding with key, value and remedy."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there. Write one: relay-agent example-config > {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}. Strings need quotes; see relay-agent example-config") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        # A list with a bad entry counts as short of it: said once is enough.
        found = [item for item in found if item["type"] != "too_short"
                 or not any(other["loc"][:-1][:len(item["loc"])] == item["loc"] for other in found)]
        raise ConfigError("\n".join(f"{path}: {config_text.finding(item, Config, KINDS)}" for item in found)) from None


def example() -> str:
    """A commented configuration with every setting, made from the classes above."""
    return config_text.example(Config)


def credential_path(name: str) -> Path:
    """Where a credential lies: a bare name in ``$CREDENTIALS_DIRECTORY``. ``ConfigError`` when there is none."""
    path = Path(name)
    if path.is_absolute():
        return path
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(f"credential {name}: give an absolute path, or start under systemd with LoadCredential={name}:…")
    return Path(folder) / name


def secret(name: str) -> tuple[str, str]:
    """User and password of a credential file (``user:password`` in its first line).

    A bare name is looked up in ``$CREDENTIALS_DIRECTORY`` (systemd credentials). ``ConfigError`` names the
    file and the remedy, never what stands in it.
    """
    path = credential_path(name)
    try:
        user, colon, password = path.read_text(encoding="utf-8").partition("\n")[0].strip().partition(":")
    except OSError as error:
        raise ConfigError(f"credential {path} cannot be read: {error.strerror}. Create it with mode 0600, owned by the service") from None
    except UnicodeDecodeError:
        user = colon = password = ""
    if not (user and colon and password):
        raise ConfigError(f"credential {path} must hold one line user:password (or alias:secret), in UTF-8")
    return user, password
