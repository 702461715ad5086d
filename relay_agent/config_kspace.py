"""The configuration's raw k-space data: where they come from, which a route delivers, what the disk may hold."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from relay_agent.config_values import AETitle, Credential, Duration, Name, Rate, Regex, Size, Table, Window
from relay_agent.kspace.identity import KEEPABLE


class RouteKSpace(Table):
    """Raw k-space data of this route's sessions; without this table none is delivered. It goes to the route's XNATs, always after the session."""

    scrub: bool = Field(True, description="Overwrite in the headers what identifies the patient. Only a project that may have identified raw data switches it off.")
    keep: tuple[str, ...] = Field((), description=f"Kinds of fields that the project needs and that stay: {', '.join(sorted(KEEPABLE))}.", examples=[["age", "weight"]])
    versions: tuple[str, ...] = Field((), description="Software versions beyond the known ones of which somebody has looked at a scrubbed file; all others are held.", examples=[["XA60"]])
    protocols: tuple[Regex, ...] = Field((), description="Only raw data whose protocol's name matches one of these as a whole; none means all.", examples=[["t1_.*", "rfMRI_.*"]])
    adjustments: bool = Field(False, description="Deliver the scanner's adjustment scans (protocols named Adj..., such as AdjCoilSens) as well, whatever protocols and smallest say: as resource KSPACE_ADJ of the session, for they have no series. Adjustments within the file of a scan always go with it.", examples=[True])
    smallest: Size = Field(0, description="Smaller files are not delivered.", examples=["1 MB"])
    unmatched: Literal["keep", "ship"] = Field("keep", description='What becomes, after kspace.deadline, of raw data of the same scanner and patient for which no UID tells the session, when only one session can be meant: "keep" it for a person, or "ship" it to that session as resource KSPACE_UNMATCHED.')
    opaque: tuple[Regex, ...] = Field((), description="Raw data in other formats, delivered as they came, without de-identification: regular expressions for SOURCE/FOLDER/FILE below the landing directory, with groups (?P<session>...) and, if needed, (?P<subject>...) for the session's labels.", examples=[["ge/(?P<session>[^/]+)/P\\d+\\.7"]])

    @model_validator(mode="after")
    def _known(self) -> RouteKSpace:
        if strange := sorted(set(self.keep) - KEEPABLE):
            raise ValueError(f"keep = {strange} is no kind of field; use {', '.join(sorted(KEEPABLE))}")
        for pattern in self.opaque:
            if "session" not in re.compile(pattern).groupindex:
                raise ValueError(f"opaque: {pattern} does not tell the session; add a group (?P<session>...)")
        return self


class Pull(Table):
    """Raw data are fetched from the scanner's back end (imager, MARS) by SSH: in idle hours, and never while something changes there, as it does during a scan."""

    host: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]*$", description="Host name or address of the imager, as this box reaches it.", examples=["192.168.2.2"])
    port: int = Field(22, ge=1, le=65535, description="TCP port of its SSH server.")
    user: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="Account on it; may read the folder, needs nothing else.", examples=["relay"])
    key: Credential = Field(description="File with the private key for it, without a passphrase; a bare name is looked up in $CREDENTIALS_DIRECTORY.", examples=["imager-key"])
    host_key: str = Field(pattern=r"^[a-z0-9@.-]+ [A-Za-z0-9+/=]+$", description="Its host key, type and key, as it was told to you; ssh-keyscan prints it, but a stranger's as well.", examples=["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXAMPLEEXAMPLEEXAMPLE"])
    folder: str = Field(pattern=r"^[^\x00-\x1f]+$", description="Folder on it that holds the raw data.", examples=["/data/raw"])
    method: Literal["sftp", "rsync"] = Field("sftp", description="sftp, or rsync where that is installed on it.")
    ssh_options: tuple[str, ...] = Field((), description="More options of ssh, for old servers.", examples=[["KexAlgorithms=+diffie-hellman-group14-sha1", "HostKeyAlgorithms=+ssh-rsa", "PubkeyAcceptedAlgorithms=+ssh-rsa"]])
    windows: tuple[Window, ...] = Field((), description="Idle hours, the only ones in which files are fetched; none means always. A window's bandwidth limits that.")
    bandwidth: Rate | None = Field(None, description="Limit; absent means none.", examples=["250 Mbit/s"])
    poll: Duration = Field(300.0, gt=0, description="The folder is listed this often. Files are fetched when two lists are the same, and no longer than that.", examples=["5 min"])
    list_command: str | None = Field(None, description="Command to run over there that prints the scanner's own list.", examples=["RaidTool -d -a 192.168.2.2 -p 8010"])
    running: Regex = Field(r"\bwip\b", description="While this is found in the scanner's list, a scan is running and nothing is fetched.")
    everything: bool = Field(False, description="Fetch all raw data, not only what may belong to a received session of a route with raw data.")
    smallest: Size = Field(10**6, description="Smaller files (shims and other small adjustments) are not fetched.", examples=["1 MB"])


class KSpaceSource(Table):
    """Where raw k-space data of a scanner come from: a folder of the landing directory, named as the source."""

    name: Name = Field(description="Name of the source, in the ledger and as its folder kspace/landing/NAME below data.", examples=["prisma"])
    patterns: tuple[str, ...] = Field(("*.dat",), description="Names of files that are raw data; others stay where they are, and status tells how many.")
    opaque: bool = Field(False, description="Other vendors' formats: files are taken in as they are, and only go where a route's kspace.opaque says.")
    receivers: tuple[AETitle, ...] = Field((), description="The scanner's DICOM sessions come to these receivers; none means any.", examples=[["RELAY"]])
    overwritten_after: Duration = Field(2 * 86400.0, gt=0, description="How long the scanner keeps raw data before it overwrites them; status counts down from this.", examples=["2 d"])
    pull: Pull | None = Field(None)


class KSpace(Table):
    """Raw k-space data: what the disk may hold of it, and how long it waits for its session."""

    source: tuple[KSpaceSource, ...] = Field(())
    incomplete_after: Duration = Field(3600.0, description="A file that is not whole is left in the landing directory, as somebody may still write it, until it has not changed for this long; then it is taken in and shown as incomplete.", examples=["1 h"])
    deadline: Duration = Field(7 * 86400.0, description="Raw data that found no session for this long wait for a person.", examples=["7 d"])
    reserve: Size = Field(20 * 2**30, description="Below this much free space raw data are neither fetched nor copied, so that DICOM always has room; more than receive.reserve.", examples=["20 GiB"])
    quota: Size | None = Field(None, description="Most that raw data may take of the disk before no more are fetched or copied; absent means what the file system has.", examples=["2 TB"])
    discard: Duration | None = Field(None, description="Delete raw data that no route wants (state rejected) after this long; absent means that a person does.", examples=["30 d"])
