"""DICOM TLS after BCP 195 (PS3.15 sections B.9 and B.12), with DCMTK and OpenSSL as the callers."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from pydicom.uid import generate_uid

from tests import data
from tests.harness import Agent, running, wait_for
from tests.receive import proof, scu


@dataclass
class Secure:
    """A box with a receiver that asks for no client certificate, one that does, and a plain one."""

    agent: Agent
    folder: Path
    ca: trustme.CA
    scanners: trustme.CA

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    def client(self, ca: trustme.CA) -> tuple[Path, Path]:
        """A client's key and certificate."""
        issued = ca.issue_cert("scanner.test")
        key, certificate = (self.folder / f"{generate_uid()}.{kind}" for kind in ("key", "crt"))
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(certificate)
        return key, certificate

    def context(self) -> ssl.SSLContext:
        """A caller's side that verifies the box."""
        return ssl.create_default_context(cafile=str(self.ca_file))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """The box and its certificate authorities."""
    folder = tmp_path_factory.mktemp("tls")
    ca, scanners = trustme.CA(), trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "box.key")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(folder / "box.crt", append=True)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    scanners.cert_pem.write_to_path(folder / "scanners.pem")
    tables = []
    for title, more in (("ANYCERT", ""), ("MUTUAL", f'client_ca = "{folder / "scanners.pem"}"'), ("PLAIN", None)):
        tables.append(f'[[receiver]]\nae_title = "{title}"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]')
        if more is not None:
            tables.append(f'[receiver.tls]\ncertificate = "{folder / "box.crt"}"\nkey = "{folder / "box.key"}"\n{more}')
    with running(Agent(folder / "box", receivers="\n".join(tables)), "receive") as agent:
        yield Secure(agent, folder, ca, scanners)


def test_dcmtk_without_a_certificate(secure: Secure, tmp_path: Path) -> None:
    """DCMTK verifies our certificate against the CA and sends; the other way round it refuses us."""
    where = ("-aec", "ANYCERT", "127.0.0.1", str(secure.agent.ports["ANYCERT"]))
    proof.run("echoscu", "--anonymous-tls", "--add-cert-file", secure.ca_file, *where)
    images = list(data.study(1, 10))
    files = data.write(images, tmp_path)
    proof.run("storescu", "--anonymous-tls", "--add-cert-file", secure.ca_file, *where, *files)
    rows = proof.all_rows(secure.agent, [str(image.SOPInstanceUID) for image in images])
    assert len(rows) == 10
    other = secure.folder / "scanners.pem"
    done = proof.run("echoscu", "--anonymous-tls", "--add-cert-file", other, *where, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("profile", ["--profile-bcp195-nd", "--profile-bcp195", "--profile-bcp195-ex"])
def test_dcmtk_with_a_certificate(secure: Secure, profile: str, tmp_path: Path) -> None:
    """Both sides verify each other, in each BCP 195 profile that DCMTK knows."""
    key, certificate = secure.client(secure.scanners)
    (file,) = data.write([image := data.instance()], tmp_path)
    proof.run("storescu", "--enable-tls", key, certificate, "--null-passwd", "--add-cert-file", secure.ca_file, profile,
              "-aec", "MUTUAL", "127.0.0.1", str(secure.agent.ports["MUTUAL"]), file)
    proof.row(secure.agent, str(image.SOPInstanceUID))


@pytest.mark.parametrize("who", ["nobody", "a stranger", "the box's own CA"])
def test_who_has_no_certificate_of_ours_gets_no_association(secure: Secure, who: str, tmp_path: Path) -> None:
    """A client certificate is required: absent or of another CA, nothing is stored."""
    identity: tuple[str | Path, ...] = ("--anonymous-tls",)
    if who != "nobody":
        identity = ("--enable-tls", *secure.client(trustme.CA() if who == "a stranger" else secure.ca), "--null-passwd")
    (file,) = data.write([image := data.instance()], tmp_path)
    done = proof.run("storescu", *identity, "--add-cert-file", secure.ca_file, "-aec", "MUTUAL", "127.0.0.1",
                     str(secure.agent.ports["MUTUAL"]), file, check=False)
    assert done.returncode != 0
    test_large_objects_over_tls(secure)  # what comes after it would be in the ledger by now
    assert proof.rows(secure.agent, str(image.SOPInstanceUID)) == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions_that_are_spoken(secure: Secure, version: ssl.TLSVersion) -> None:
    """1.2 with forward secrecy, and 1.3."""
    context = secure.context()
    context.minimum_version = context.maximum_version = version
    with scu.SCU(secure.agent.ports["ANYCERT"], tls=context) as peer:
        assert isinstance(peer.socket, ssl.SSLSocket)
        cipher = peer.socket.cipher()
        assert cipher is not None and (version == ssl.TLSVersion.TLSv1_3 or cipher[0].startswith("ECDHE-"))
        peer.associate(scu.ECHO, called="ANYCERT")
        assert peer.echo() == 0
        peer.release()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(secure: Secure, version: ssl.TLSVersion) -> None:
    """BCP 195 forbids TLS 1.0 and 1.1; the refusal is the box's, not this machine's policy."""
    context = secure.context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with pytest.raises(ssl.SSLError) as caught:
        scu.SCU(secure.agent.ports["ANYCERT"], tls=context)
    assert "alert" in str(caught.value).lower(), f"not refused by the box: {caught.value}"


@pytest.mark.parametrize("ciphers", ["AES128-GCM-SHA256", "AES256-SHA256",
                                     "ECDHE-RSA-AES128-SHA256:ECDHE-ECDSA-AES128-SHA"])
def test_weak_ciphers_are_refused(secure: Secure, ciphers: str) -> None:
    """No forward secrecy, or no authenticated encryption: no handshake."""
    context = secure.context()
    context.set_ciphers(ciphers)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        scu.SCU(secure.agent.ports["ANYCERT"], tls=context)


def test_large_objects_over_tls(secure: Secure) -> None:
    """TLS records and PDUs do not end at the same places: 5 MB arrive byte for byte."""
    image = data.instance(size=(1600, 1600))
    content = scu.encode(image)
    with scu.SCU(secure.agent.ports["ANYCERT"], tls=secure.context()) as peer:
        peer.associate(called="ANYCERT")
        assert peer.store(image.SOPInstanceUID, content, fragment=peer.longest - 6) == 0
        peer.release()
    assert proof.part10(proof.stored(secure.agent, image.SOPInstanceUID))[1] == content


def test_plain_dicom_at_the_tls_port_does_no_harm(secure: Secure) -> None:
    """And neither does TLS at the plain port, nor a handshake that stops half way, nor garbage."""
    port = secure.agent.ports["ANYCERT"]
    children = proof.children(secure.agent.processes["receive"].pid)
    for raw in (scu.associate_rq(called="ANYCERT"), b"", b"\x16\x03\x01\x02\x00\x01\x00", bytes(range(256)) * 40):
        with scu.SCU(port) as peer, contextlib.suppress(ConnectionError):
            peer.send(raw)
            with contextlib.suppress(OSError):  # ENOTCONN: it has reset the connection already
                peer.socket.shutdown(socket.SHUT_WR)
            peer.socket.settimeout(60)
            while peer.socket.recv(4096):
                pass
    with pytest.raises((ssl.SSLError, ConnectionError)):
        scu.SCU(secure.agent.ports["PLAIN"], tls=secure.context())
    with scu.SCU(secure.agent.ports["PLAIN"]) as peer:
        assert peer.associate(scu.ECHO, called="PLAIN").echo() == 0
        peer.release()
    test_large_objects_over_tls(secure)
    assert proof.children(secure.agent.processes["receive"].pid) == children
    assert proof.failures(secure.agent.log) == []


def test_titles_do_not_cross_ports(secure: Secure) -> None:
    """The title of the receiver that demands a certificate cannot be called over the ports that demand none."""
    for port, tls in ((secure.agent.ports["ANYCERT"], secure.context()), (secure.agent.ports["PLAIN"], None)):
        with scu.SCU(port, tls=tls) as peer:
            peer.send(scu.associate_rq(called="MUTUAL"))
            assert peer.read() == (scu.RJ, bytes((0, 1, 1, 7)))


def test_a_key_that_is_not_there_is_named_at_start(secure: Secure, tmp_path: Path) -> None:
    """Not at the first caller: the service says which file, and ends."""
    receiver = ('[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]\n[receiver.tls]\n'
                f'certificate = "{secure.folder / "box.crt"}"\nkey = "{tmp_path / "nokey.pem"}"')
    done = Agent(tmp_path / "box", receivers=receiver).cli("receive")
    assert done.returncode != 0 and "nokey.pem" in done.stderr and "Traceback" not in done.stderr


def test_stopping_aborts_associations_over_tls(tmp_path: Path, secure: Secure) -> None:
    """SIGTERM: an open association over TLS ends too, and is in the ledger as ended."""
    receiver = ('[[receiver]]\nae_title = "RELAY"\naddress = "127.0.0.1"\nport = 0\nallow = ["*"]\n[receiver.tls]\n'
                f'certificate = "{secure.folder / "box.crt"}"\nkey = "{secure.folder / "box.key"}"')
    agent = Agent(tmp_path, receivers=receiver)
    with running(agent, "receive"), scu.SCU(agent.port, tls=secure.context()) as peer:
        peer.associate(scu.ECHO)
        assert peer.echo() == 0
        wait_for(lambda: agent.ledger.value("SELECT count(*) FROM association"))
        agent.stop("receive")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert peer.read() in (None, (scu.ABORT, bytes(4)), (scu.ABORT, bytes((0, 0, 2, 0))))
        assert agent.ledger.value("SELECT count(*) FROM association WHERE closed IS NULL") == 0
