"""The drop share for raw data, from the scanner's side: with the clients that are there, and with bad intentions."""
from __future__ import annotations

import json
import re
import secrets
import shutil

import pytest

from tests import data
from tests.box.conftest import PROJECT
from tests.kspace import path, synthetic

LANDING = "/var/lib/relay-agent/kspace/landing"
KEY = "/srv/relay/build/lab/key"


@pytest.fixture
def folder(host):
    """On the scanner; each box has one of its own, for boxes are looked at side by side."""
    return f"/tmp/{host.check_output('hostname')}"


@pytest.fixture
def smb(peer, variables, folder):
    """Give commands to smbclient on the scanner."""
    if variables.get("share_protocol", "smb") != "smb":
        pytest.skip("no SMB on this box: it takes raw data by SFTP or not at all (share_protocol)")

    def go(commands, password=variables["share_password"], options="--client-protection=encrypt", before=""):
        return peer("scanner").run(f"cd {folder}; {before} smbclient //{variables['lab_raw']}/kspace {options} "
                                   f"--user=relay-share%{password} -c '{commands}'")
    return go


@pytest.fixture
def sftp(peer, variables, folder):
    """Give commands to sftp on the scanner."""
    if variables.get("share_protocol", "smb") != "sftp":
        pytest.skip("no SFTP on this box: it takes raw data by SMB or not at all (share_protocol)")

    def go(commands, key=KEY):
        return peer("scanner").run(
            f"cd {folder}; printf '{commands}' | sftp -q -b - -i {key} -o StrictHostKeyChecking=no "
            f"-o UserKnownHostsFile=/dev/null -o IdentitiesOnly=yes -o LogLevel=ERROR "
            f"relay-share@{variables['lab_raw']}")
    return go


@pytest.fixture(autouse=True)
def files(host, peer, folder):
    """A raw file of 3 MB on the scanner; the landing folder is left as it was."""
    before = set(host.file(LANDING).listdir())
    peer("scanner").check_output(f"mkdir -p {folder}; head -c 3000000 /dev/urandom > {folder}/meas.dat")
    yield
    for name in set(host.file(LANDING).listdir()) - before:
        host.check_output(f"rm -rf {LANDING}/{name}")


def arrived(host, peer, folder, name="meas.dat"):
    """It is whole, and the worker may take it away."""
    digest = peer("scanner").check_output(f"sha256sum < {folder}/meas.dat")
    assert host.check_output(f"sha256sum < {LANDING}/{name}") == digest
    assert host.file(f"{LANDING}/{name}").mode in (0o640, 0o660)  # SFTP's clients name the mode
    assert host.file(f"{LANDING}/{name}").group == "relay-agent"
    worker = "setpriv --reuid relay-work --regid relay-agent --clear-groups"
    host.check_output(f"{worker} mv {LANDING}/{name} {LANDING}/taken && {worker} rm {LANDING}/taken")


def test_copy(host, peer, smb, folder):
    """A plain copy, as from the explorer of the scanner's Windows."""
    sent = smb("put meas.dat")
    assert sent.succeeded, sent.stdout
    arrived(host, peer, folder)


def test_sidecar(host, peer, smb, folder):
    """Yarra RDS marks what it still writes by a file beside it and takes that away at the end."""
    assert smb("put meas.dat meas.dat.lock; put meas.dat").succeeded
    assert {"meas.dat", "meas.dat.lock"} <= set(host.file(LANDING).listdir())
    assert smb("del meas.dat.lock").succeeded
    assert not host.file(f"{LANDING}/meas.dat.lock").exists
    arrived(host, peer, folder)


def test_folders(host, peer, smb, folder):
    """Who sorts by scanner or day makes folders, and what is in them is the worker's as well."""
    assert smb("mkdir day; cd day; put meas.dat").succeeded
    assert host.file(f"{LANDING}/day").mode & 0o777 == 0o770
    arrived(host, peer, folder, "day/meas.dat")


@pytest.fixture
def drop(variables, peer, request):
    """Bring a file of this project into the folder of a scanner, by whatever protocol the share of this box speaks."""
    by = request.getfixturevalue(variables.get("share_protocol", "smb"))

    def go(file, folder, name):
        path = f"/srv/relay/{file.relative_to(PROJECT)}"
        sent = (by(f"put {path} {folder}/{name}\\n") if variables.get("share_protocol") == "sftp"
                else by(f"cd {folder}; put {path} {name}"))
        assert sent.succeeded, sent.stdout + sent.stderr
    return go


def test_raw_data_follow_their_session(host, peer, address, drop, wait_for):
    """DICOM from the scanner, its raw data from the back end: one session over there, de-identified, both proved.

    It crosses all that a fault of rights, sandbox or matching would stop on a box and nowhere else.
    """
    session = f"{host.check_output('hostname')}_{secrets.randbelow(10**9):09}"
    frame = synthetic.FRAME.replace("20240229101112131", f"{10**16 + secrets.randbelow(10**16)}")
    images = path.exam(f"{path.STUDY}.{secrets.randbelow(2**31)}", frame, session=session)
    for image in images:
        image.StudyDescription = "KSPACE"
    made = synthetic.File(scans=(synthetic.Scan(uid=secrets.randbelow(2**31)),))
    content = synthetic.build(made).replace(synthetic.FRAME.encode(), frame.encode())
    folder = PROJECT / "build/lab/studies" / session
    data.write(images, folder / "dicom")
    (folder / "meas.dat").write_bytes(content)

    def shipments():
        rows = json.loads(host.check_output("relay-agent list --limit 1000 --json < /dev/null"))
        return [row for row in rows if row["session"] == session and row["state"] == "delivered"]
    drop(folder / "meas.dat", "prisma", f"meas_MID{session[-5:]}.dat")  # raw data may come first
    assert peer("scanner").run(f"storescu -aet SCANNER -aec RELAY {address} 11112 "
                               f"+sd /srv/relay/{folder.relative_to(PROJECT)}/dicom").succeeded
    assert wait_for(lambda: len(shipments()) == 2, 120), host.check_output("relay-agent list < /dev/null")
    assert {row["kind"] for row in shipments()} == {"session", "raw"}
    for row in shipments():
        assert json.loads(host.check_output(f"relay-agent receipt {row['shipment']} --json < /dev/null"))
    assert host.file(f"{LANDING}/prisma").listdir() == []
    central = peer("central")
    there = central.check_output(f"find /var/lib/xnat -path '*{session}*' -type f").split()
    assert sum(name.endswith(".dcm") for name in there) == len(images)
    assert sum("/KSPACE/" in name and name.endswith((".dat", ".json")) for name in there) == 2
    for value in (synthetic.PERSON.id, synthetic.PERSON.name, synthetic.PERSON.institution, frame):
        assert central.run(f"grep -rlF '{value}' /var/lib/xnat").stdout == ""
    shutil.rmtree(folder)


def test_half_written(host, peer, smb, wait_for, folder):
    """A scanner that goes off in the middle leaves a part, which is seen as such; sending again makes it whole."""
    scanner = peer("scanner")
    scanner.check_output(f"truncate -s 8G {folder}/long.dat")
    part = host.file(f"{LANDING}/meas.dat")
    smb("put long.dat meas.dat", options="--client-protection=encrypt > /dev/null 2>&1 < /dev/null",
        before="setsid --fork")
    assert wait_for(lambda: part.exists and part.size > 0, 30)
    scanner.check_output(f"pkill --signal KILL --full '[p]ut long.dat' && rm {folder}/long.dat")
    assert 0 < part.size < 8 << 30
    assert wait_for(lambda: smb("put meas.dat").succeeded, 20)
    arrived(host, peer, folder)


@pytest.mark.parametrize(("password", "options"), [
    ("wrong-wrong-wrong", "--client-protection=encrypt"),
    ("lab-lab-lab-lab", "--max-protocol=SMB2"),
    ("lab-lab-lab-lab", "--max-protocol=NT1 --option=clientminprotocol=NT1"),
])
def test_refused(smb, password, options):
    """A wrong password; protocols that know no encryption."""
    assert smb("ls").succeeded
    refused = smb("ls", password, options)
    assert refused.failed, refused.stdout


def test_no_guests(peer, smb, variables):
    """Whoever does not say who he is sees neither files nor the list of shares."""
    assert smb("ls").succeeded
    assert peer("scanner").run(f"smbclient //{variables['lab_raw']}/kspace --no-pass --user=% -c ls").failed
    assert "kspace" not in peer("scanner").run(f"smbclient --no-pass --list={variables['lab_raw']}").stdout


@pytest.mark.parametrize("way", ["..", "../..", "../../ledger.sqlite", "../../../../../etc/passwd", "link/passwd"])
def test_confined(host, peer, smb, way, folder):
    """The folder is all there is: not by names that go up, not by links, whoever made them."""
    host.check_output(f"ln -sfn /etc {LANDING}/link")
    asked = smb(f'get "{way}" stolen; cd "{way}"; put meas.dat; ls')
    assert "root:" not in peer("scanner").run(f"cat {folder}/stolen").stdout
    assert not re.search("^ +(passwd|ledger)", asked.stdout, re.MULTILINE)  # as a list shows a file
    peer("scanner").run(f"rm -f {folder}/stolen")


def test_its_process_sees_no_other_data(host, smb):
    """Whatever is wrong in Samba, there is nothing to steal: no ledger, no spool, no secret."""
    pid = host.check_output("systemctl show --value --property=MainPID relay-share.service")
    assert host.check_output(f"nsenter --target {pid} --mount ls /var/lib/relay-agent") == "kspace"
    assert host.check_output(f"nsenter --target {pid} --mount ls /var/lib/relay-agent/kspace") == "landing"
    assert host.check_output(f"stat -c %U /proc/{pid}") == "relay-share"
    inside = f"nsenter --target {pid} --mount setpriv --reuid relay-share --regid relay-agent --clear-groups"
    assert host.run(f"{inside} cat /etc/relay-agent/credentials/share/password").failed
    assert host.run(f"{inside} cat /etc/relay-agent/config.toml").failed


def test_full(host, peer, smb, folder):
    """Raw data have a quota of their own: the sender is told, nothing else is touched, and later it goes on."""
    try:
        host.check_output(f"mount -t tmpfs -o size=2M,mode=2770,uid=relay-work,gid=relay-agent quota {LANDING} && "
                          "systemctl restart relay-share")
        refused = smb("put meas.dat")
        assert "NT_STATUS_DISK_FULL" in refused.stdout + refused.stderr
    finally:
        host.check_output(f"umount {LANDING} && systemctl restart relay-share")
    assert smb("put meas.dat").succeeded
    arrived(host, peer, folder)


def test_comes_back(host, smb):
    """After a power cut nobody is there to start it; Debian's own server stays away."""
    assert smb("ls").succeeded
    assert host.service("relay-share.service").is_enabled
    assert host.check_output("systemctl show --property=LoadState smbd nmbd").split() == ["LoadState=masked"] * 2


def test_sftp_copy(host, peer, sftp, folder):
    """For scanners that do not speak SMB 3."""
    sent = sftp("put meas.dat\\n")
    assert sent.succeeded, sent.stderr
    arrived(host, peer, folder)


@pytest.mark.parametrize("commands", ["get /etc/passwd stolen", "get ../ledger.sqlite stolen", "put meas.dat /meas.dat",
                                      "get link/passwd stolen"])
def test_sftp_confined(host, peer, sftp, commands, folder):
    """The folder is all there is."""
    host.check_output(f"ln -sfn /etc {LANDING}/link")
    assert sftp(f"{commands}\\n").failed
    assert peer("scanner").run(f"rm {folder}/stolen").failed


def test_sftp_is_no_way_in(peer, sftp, variables):
    """No shell, no forwarding, and no other way to say who one is than the key."""
    assert sftp("ls\\n").succeeded
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"

    def ssh(words):  # testinfra takes ssh's own status of 255 for the way to the scanner
        return peer("scanner").run(f"ssh {options} {words} || exit 1")
    there = f"relay-share@{variables['lab_raw']}"
    assert "uid=" not in ssh(f"-i {KEY} {there} id").stdout
    assert ssh(f"-i {KEY} -o ExitOnForwardFailure=yes -W localhost:25 {there}").failed
    offered = ssh(f"-v -o PubkeyAuthentication=no {there} true")
    assert "Authentications that can continue: publickey\r\n" in offered.stderr


def test_reboots_wait_for_raw_data(host):
    """A reboot would cut a file that is on its way; the sender may not try again."""
    host.check_output(f"touch {LANDING}/meas.dat")
    assert host.run("/usr/local/lib/relay-agent/share-idle").failed
    host.check_output(f"touch -d '-5 minutes' {LANDING}/meas.dat")
    assert host.run("/usr/local/lib/relay-agent/share-idle").succeeded
