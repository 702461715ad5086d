from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("alone")


def test_listens_to_the_box_alone(host):
    """A relay that takes mail from the network sends everybody's mail."""
    assert host.socket("tcp://127.0.0.1:25").is_listening
    assert not host.socket("tcp://0.0.0.0:25").is_listening


def test_password_is_private(host):
    """It is that of an account at somebody's mail server."""
    assert host.file("/etc/postfix/password").mode == 0o600
    assert host.file("/etc/postfix/password").user == "root"


def test_mail_gets_through(host):
    """Every other test of what the box reports is worth nothing when its mail gets nowhere."""
    answer = host.run("mail-test")
    assert answer.succeeded, answer.stderr
    assert "status=sent" in answer.stdout


def test_it_arrived_from_the_known_sender(host, peer, wait_for):
    """Contacts get what is for root, and the server sees the address that it knows, whatever program sent it."""
    subject = f"Test of the mail of {host.check_output('hostname')}"
    central = peer("central")

    def arrived():
        return central.run(f"grep -lr '{subject}' /var/lib/mail/new").stdout.split()
    mail = central.file(wait_for(arrived)[0]).content_string
    assert "X-RcptTo: imaging@example.org" in mail
    assert "X-MailFrom: relay@hospital.example.org" in mail
