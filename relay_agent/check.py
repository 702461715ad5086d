"""Check: what ``relay-agent check`` looks at before the box goes into service, and when something is wrong.

Runs beside a running service and as its user; changes nothing but a few probe files that it deletes again.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import stat
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy

from relay_agent import selftest
from relay_agent.alert import Mailer, NotSent
from relay_agent.config import TLS, Alert, Config, ConfigError, credential_path, secret
from relay_agent.config_destinations import DICOM, XNAT, DICOMweb
from relay_agent.deidentify.recipe import Unusable, load, recipe_of
from relay_agent.destinations import DeliveryError, Finding
from relay_agent.destinations.web import Web
from relay_agent.kspace import preflight
from relay_agent.receive import tls_context
from relay_agent.spool import PARTIAL
from relay_agent.units import show_duration, show_size

_PATIENCE = 10.0  # seconds for each step on the way to a destination
_SLOW_SYNC = 0.020  # every instance waits for one before its sender is answered
_SYNC_ROUNDS = (0.0, 0.5, 1.0)  # seconds before each round of writing
_CLOCK_OFF = 60.0
_SCRIPT_CHECK = "relay-agent script check FILE tells more"
_EXPIRES_SOON = 30 * 86400.0


def run(config: Config, *, offline: bool = False) -> Iterator[Finding]:
    """Look at everything, cheapest first; ``offline`` leaves out what needs the network."""
    yield from _settings(config)
    yield from preflight.settings(config)
    yield from _scripts(config)
    yield from _folders(config)
    yield _clock()
    yield from _ports(config)
    for tls in {receiver.tls: None for receiver in config.receiver if receiver.tls}:
        yield from _certificate(tls)
    yield from _secrets(config)
    if offline:
        return
    for destination in config.destination:
        yield from _destination(config, destination)
    for source in config.kspace.source:
        if source.pull:
            yield from preflight.imager(source, source.pull)
    if config.alert:
        yield _mail(config.alert)


def _settings(config: Config) -> Iterator[Finding]:
    """What is valid and yet hardly meant."""
    for receiver in config.receiver:
        if any(caller == "*" or caller.endswith("/0") for caller in receiver.allow):
            yield Finding(False, f"receiver {receiver.ae_title} takes instances from anybody",
                          "name the scanners' AE titles or networks in allow")
    if not config.destination:
        yield Finding(False, "there is no destination: everything stays in the box", "add a [[destination]]")
    if not config.route:
        yield Finding(False, "there is no route: every session is held", "add a [[route]]")
    for destination in config.destination:
        if not any(destination.name in route.destinations for route in config.route):
            yield Finding(False, f"no route goes to destination {destination.name}", "name it in a route or remove it")
        if isinstance(destination, DICOM):
            continue
        if destination.url.startswith("http:"):
            yield Finding(False, f"{destination.name}: data and credential go there unencrypted", "use an https url")
        if not destination.credential:
            yield Finding(False, f"{destination.name}: it is asked without a log-in", "set credential")
    if config.alert and config.alert.credential and not config.alert.starttls:
        yield Finding(False, "the mail server's password is sent unencrypted", "set alert.starttls = true")


def _scripts(config: Config) -> Iterator[Finding]:
    """Whether the scripts of each route can be used."""
    for route in config.route:
        try:
            recipe = recipe_of(config, route, project="", subject="", session="")
        except Unusable as error:
            yield Finding(False, f"route {route.name} holds every session: {error}", _SCRIPT_CHECK)
            continue
        grave = [f"{step.name} line {found.line}: {found.text}" for step in (recipe.steps if recipe else ())
                 for found in load(step).findings() if found.grave]
        for what in grave:
            yield Finding(False, f"route {route.name}: {what}", _SCRIPT_CHECK)
        if not grave:
            yield Finding(True, f"route {route.name} de-identifies by {recipe.names}" if recipe else
                          f"route {route.name} ships what was received, without de-identification")


def _folders(config: Config) -> Iterator[Finding]:
    data = config.data
    if not data.is_dir():
        yield Finding(False, f"{data} is not there", f"install -d -m 0750 -o USER {data}, with the user of the service")
        return
    if not _is_ours(config):
        yield Finding(False, f"{data} belongs to another user", "run this check as the user of the service")
        return
    written = [folder for folder in (data, config.spool) if folder.exists()]
    for folder in written:
        yield _sync(folder)
    inside = [folder for folder in (*written, config.landing) if folder.exists()]
    apart = [str(folder) for folder in inside if folder.stat().st_dev != data.stat().st_dev]
    yield Finding(not apart, f"{data}: {' and '.join(apart) or 'nothing'} below it is on another file system",
                  "mount a file system at the data folder only, not below it")
    room = os.statvfs(written[-1])
    free, reserve = room.f_bavail * room.f_frsize, config.receive.reserve
    yield Finding(free >= 2 * reserve, f"{show_size(free)} are free, receivers refuse below {show_size(reserve)}",
                  "give it more disk, or purge.retention a shorter time")


def _is_ours(config: Config) -> bool:
    """Whether what we create in the data folder will belong to the service."""
    return config.data.is_dir() and config.data.stat().st_uid == os.geteuid()


def _sync(folder: Path) -> Finding:
    """Write as receiving does: a new file and a sync for each instance.

    The best of some rounds counts: what others write at the same moment says nothing of the disk.
    """
    typical = math.inf
    try:
        for pause in _SYNC_ROUNDS:
            time.sleep(pause)
            typical = min(typical, _typical_sync(folder))
            if typical <= _SLOW_SYNC:
                break
    except OSError as error:
        return Finding(False, f"{folder} cannot be written ({error.strerror})",
                       "give it to the service's user; see whether the file system is full or mounted read-only")
    return Finding(typical <= _SLOW_SYNC, f"{folder}: writable, a sync takes {typical * 1000:.1f} ms",
                   "every instance waits for one: use a log device or a better SSD")


def _typical_sync(folder: Path) -> float:
    """Seconds; the median of five."""
    times = []
    for _ in range(5):
        # Named like a file that is being written: whoever looks through the spool leaves it alone.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{PARTIAL}{os.getpid()}-") as probe:
            probe.write(bytes(2**16))
            probe.flush()
            start = time.perf_counter()
            os.fsync(probe.fileno())
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _clock() -> Finding:
    now = datetime.fromtimestamp(time.time(), UTC)
    return Finding(2025 <= now.year < 2100, f"the clock says {now:%Y-%m-%d %H:%M:%S} UTC",
                   "set it and keep it set: timedatectl set-ntp true, then timedatectl")


def _ports(config: Config) -> Iterator[Finding]:
    for address, port in dict.fromkeys((r.address, r.port) for r in config.receiver if r.port):
        where = f"port {port} on {address}"
        try:
            socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
            yield Finding(True, f"{where}: free")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                yield from (selftest.echo(r) for r in config.receiver if (r.address, r.port) == (address, port))
            elif error.errno == errno.EACCES:
                yield Finding(False, f"{where}: not allowed", "use a port above 1023 or grant CAP_NET_BIND_SERVICE")
            else:
                yield Finding(False, f"{where}: {error.strerror}", "correct the receiver's address")


def _certificate(tls: TLS) -> Iterator[Finding]:
    try:
        tls_context(tls)
        expires = _expiry(tls)
    except ssl.SSLCertVerificationError as error:
        yield Finding(False, f"{tls.certificate}: callers refuse it ({error.verify_message})", "get a new certificate")
    except ConfigError as error:
        yield Finding(False, str(error), "renew them, or correct the paths")
    else:
        left = expires - time.time()
        yield Finding(left > _EXPIRES_SOON, f"{tls.certificate}: expires in {show_duration(left)}",
                      "get a new certificate in time")
        yield _private(tls.key)


def _expiry(tls: TLS) -> float:
    """When the certificate ends (seconds since 1970).

    Python's ssl decodes only what a peer presented and was verified, so we present it to ourselves, in memory.
    """
    client = ssl.create_default_context(cafile=str(tls.certificate))
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate is its own anchor
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls.certificate, tls.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller, called = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for side in (caller, called, caller):  # hello, answer with the certificate, verification
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ssl.cert_time_to_seconds(str((caller.getpeercert() or {})["notAfter"]))


def _secrets(config: Config) -> Iterator[Finding]:
    for destination in config.destination:
        bundle = destination.tls_ca if isinstance(destination, DICOM) else destination.ca_bundle
        if bundle:
            try:
                ssl.create_default_context(cafile=str(bundle))
            except OSError as error:
                yield Finding(False, f"{destination.name}: {bundle} cannot be used ({error.strerror})",
                              "make it a PEM file of CAs that the service may read")
    names = [d.credential for d in config.destination if not isinstance(d, DICOM)]
    names += [config.alert.credential] if config.alert else []
    for name in dict.fromkeys(name for name in names if name):
        try:
            secret(name)
        except ConfigError as error:
            yield Finding(False, str(error), "write it again")
        else:
            yield _private(credential_path(name))
    for name in dict.fromkeys(source.pull.key for source in config.kspace.source if source.pull):
        try:
            yield _private(credential_path(name))
        except ConfigError as error:
            yield Finding(False, str(error), "write it again")
        except OSError as error:
            yield Finding(False, f"{error.filename}: {error.strerror}", "write the private key for the imager into it, "
                          "with mode 0600, owned by the service")


def _private(path: Path) -> Finding:
    """Whether a secret that can be read is not everybody's to read."""
    exposed = path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)
    return Finding(not exposed, f"{path}: {'everybody may read it' if exposed else 'private'}",
                   f"chmod o= {path}, and take a new secret if others use this machine")


def _destination(config: Config, destination: XNAT | DICOMweb | DICOM) -> Iterator[Finding]:
    """The way there, step by step, and what the destination says itself; behind a step that fails nothing is tried."""
    for step in _way(destination):
        yield step
        if not step.ok:
            return
    if not isinstance(destination, DICOM):
        yield _server_clock(destination)
    if not _is_ours(config):
        return  # a token that is stored now would be lost to the service
    from relay_agent.destinations.factory import open_destination  # noqa: PLC0415 - all kinds, for this step alone
    try:
        yield from open_destination(config, destination.name).check()
    except (DeliveryError, ConfigError) as error:
        yield Finding(False, str(error), "mend that and check again")


def _way(destination: XNAT | DICOMweb | DICOM) -> Iterator[Finding]:
    if isinstance(destination, DICOM):
        yield _connection(destination.name, destination.host, destination.port)
        return
    proxy = destination.proxy or select_proxy(destination.url, get_environ_proxies(destination.url, no_proxy=None))
    hop = urlsplit(destination.url if not proxy else proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = hop.port or (443 if hop.scheme == "https" else 80)
    except ValueError:
        yield Finding(False, f"{destination.name}: the port of {hop.hostname} is no number", "correct url or proxy")
        return
    yield _connection(destination.name, hop.hostname or "", port, "proxy " if proxy else "")
    yield _server(destination)


def _connection(name: str, host: str, port: int, what: str = "") -> Finding:
    where = f"{name}: {what}{host} port {port}"
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except socket.gaierror:
        return Finding(False, f"{where}: the name cannot be resolved", f"correct it, or DNS: resolvectl query {host}")
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror
        return Finding(False, f"{where}: {reason}", "is it up, and does the firewall let this box through?")
    return Finding(True, f"{where}: connected")


def _ask(destination: XNAT | DICOMweb) -> requests.Response:
    """A request on the way that deliveries take: their proxy, their trust, their words when it fails."""
    return Web(destination.model_copy(update={"timeout": _PATIENCE}), None).ask("GET", "/", stream=True)


def _server(destination: XNAT | DICOMweb) -> Finding:
    """Whether a verified answer comes, and who vouches for the server (an inspecting proxy does so by its own name)."""
    try:
        with _ask(destination) as answer:
            # A server that closes after each answer has taken its certificate along.
            wire = getattr(getattr(answer.raw, "connection", None), "sock", None)
            certificate: Any = wire.getpeercert() if isinstance(wire, ssl.SSLSocket) else None
    except DeliveryError as error:
        return Finding(False, str(error), "mend that and check again; never switch verification off")
    except OSError:
        return Finding(False, f"{destination.name}: ca_bundle cannot be used", "make it a PEM file of CAs")
    issuer = dict(pair for part in (certificate or {}).get("issuer", ()) for pair in part)
    by = issuer.get("organizationName") or issuer.get("commonName")
    return Finding(True, f"{destination.name}: answers" + (f", certificate issued by {by}" if by else ""))


def _server_clock(destination: XNAT | DICOMweb) -> Finding:
    try:
        with _ask(destination) as answer:
            told = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
    except DeliveryError as error:
        return Finding(False, str(error), "mend that and check again")
    except ValueError:
        return Finding(True, f"{destination.name}: does not say what time it is")
    off = abs(time.time() - told)
    return Finding(off <= _CLOCK_OFF, f"{destination.name}: its clock and ours are {show_duration(off)} apart",
                   "set ours and keep it set: timedatectl set-ntp true, then timedatectl; or tell the other side")


def _mail(alert: Alert) -> Finding:
    try:
        Mailer(alert).probe()
    except NotSent as error:
        return Finding(False, str(error), "alerts reach nobody until this is mended")
    return Finding(True, f"mail server {alert.smtp_host} port {alert.smtp_port}: ready")
