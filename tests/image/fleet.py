"""A fleet of one box; its site is this machine: scanner, central XNAT, mail server and time server."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
import yaml
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import AuthResult, LoginPassword

from tests.central import Central
from tests.image.vm import GATEWAY, HOST, MAC, NAMES, free_port, run

PROJECT = Path(__file__).resolve().parents[2]
BOX, SITE = "relay-vm", "site_vm"
PASSWORD = "of-the-vm"


@dataclass(frozen=True)
class Fleet:
    """Its inventory, its administrator's key, and where the box looks for the central XNAT and the mail server."""

    inventory: Path
    key: Path
    port: int
    mail_port: int

    @classmethod
    def make(cls, folder: Path) -> Fleet:
        """With keys and certificates of its own."""
        fleet = cls(folder / "inventory", folder / "key", free_port(), free_port())
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "anna", "-f", fleet.key)
        ca = trustme.CA()
        pair = ca.issue_cert(HOST, common_name=HOST)
        pair.cert_chain_pems[0].write_to_path(folder / "central.pem")
        pair.private_key_pem.write_to_path(folder / "central.key")
        groups = fleet.inventory / "group_vars"
        (groups / SITE).mkdir(parents=True)
        for name in ("all", "relays", "nuc"):
            shutil.copy(PROJECT / f"inventory/group_vars/{name}.yml", groups)
        settings = fleet.settings(ca.cert_pem.bytes().decode())
        for path, content in (
                (fleet.inventory / "fleet.yml", fleet.boxes(BOX, 22)), (groups / SITE / "site.yml", settings),
                (groups / SITE / "vault.yml", {"vault_central": f"relay:{PASSWORD}", "vault_mail": PASSWORD})):
            path.write_text(yaml.safe_dump(content))
        return fleet

    @staticmethod
    def boxes(host: str, port: int) -> dict:
        """The inventory's groups, and where to reach the box."""
        box = {BOX: {"ansible_host": host, "ansible_port": port}}
        return {"all": {"children": {"relays": {"children": {"nuc": {"hosts": box}}}, SITE: {"hosts": {BOX: {}}}}}}

    def reached_at(self, port: int, folder: Path, known_hosts: Path) -> Path:
        """The same fleet for whoever reaches the box at a port of this machine; its inventory file."""
        shutil.copytree(self.inventory, folder)
        boxes = self.boxes("127.0.0.1", port)
        boxes["all"]["vars"] = {
            "ansible_user": "anna", "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={known_hosts} -o StrictHostKeyChecking=accept-new"}
        (folder / "fleet.yml").write_text(yaml.safe_dump(boxes))
        return folder / "fleet.yml"

    def central(self, folder: Path) -> Central:
        """The central XNAT."""
        return Central(folder, projects=["P1"], users={"relay": PASSWORD}, port=self.port,
                       tls=(self.key.with_name("central.pem"), self.key.with_name("central.key")))

    @contextmanager
    def mail(self, folder: Path) -> Iterator[None]:
        """The mail server: keeps what those bring who log in over TLS."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.key.with_name("central.pem"), self.key.with_name("central.key"))
        expected = LoginPassword(b"relay", PASSWORD.encode())
        server = Controller(Mailbox(folder), hostname="127.0.0.1", port=self.mail_port, tls_context=context,
                            require_starttls=True, auth_required=True,
                            authenticator=lambda *told: AuthResult(success=told[-1] == expected))
        server.start()
        try:
            yield
        finally:
            server.stop()

    @contextmanager
    def time(self) -> Iterator[None]:
        """The time server: the lab's, or this machine's own where it is one, which the lab's then leaves alone."""
        server = subprocess.Popen([sys.executable, PROJECT / "molecule/lab/clock.py"], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            server.kill()
            server.wait()

    def settings(self, ca: str) -> dict:
        """What a site says, with the addresses of QEMU's own network."""
        return {
            "site_administrator_networks": [HOST], "site_dicom_networks": [HOST], "site_mail_networks": [HOST],
            "site_destination_networks": [HOST], "site_raw_networks": [],
            "firewall_outbound": [
                {"name": "central XNAT", "ports": [self.port], "networks": [HOST]},
                {"name": "mail", "ports": [self.mail_port], "networks": [HOST]},
                {"name": "names", "protocol": "udp", "ports": [53], "networks": [NAMES]},
                {"name": "time", "protocol": "udp", "ports": [123], "networks": [HOST]}],
            "network_interfaces": [{"role": "uplink", "mac": MAC, "address": "dhcp", "gateway": GATEWAY}],
            "network_name_servers": [NAMES],
            "base_mirror": "http://debian.example.org/debian",
            "base_security_mirror": "http://debian.example.org/debian-security",
            "base_administrators": [{"name": "anna", "full_name": "Anna Example",
                                     "keys": [self.key.with_suffix(".pub").read_text().strip()]}],
            "base_certificates": {"vm": ca}, "base_time_servers": [HOST],
            "smtp_host": HOST, "smtp_port": self.mail_port, "smtp_user": "relay", "smtp_password": "{{ vault_mail }}",
            "smtp_sender": "relay@example.org", "smtp_contacts": ["imaging@example.org"],
            "relay_agent_config": {
                "receive": {"reserve": "64 MiB"},
                "receiver": [{"ae_title": "RELAY", "allow": [f"SCANNER@{HOST}"]}],
                "stage": {"quiet": "5 s", "landing_stable": "2 s", "rescan": "5 s"},
                "route": [{"name": "study", "destinations": ["central"]}],
                "destination": [{"name": "central", "url": f"https://{HOST}:{self.port}", "credential": "central",
                                 "ca_bundle": "/etc/ssl/certs/ca-certificates.crt", "retry_first": "2 s",
                                 "retry_longest": "10 s", "timeout": "2 min"}],
                "alert": {"smtp_host": "localhost", "sender": "relay@example.org",
                          "recipients": ["imaging@example.org"]}},
            "relay_agent_credentials": {"central": "{{ vault_central }}"},
            "relay_agent_test_destination": "central", "relay_agent_test_project": "P1",
        }
