"""What a fleet goes through: releases that are good or bad, a dead box, power cuts, and scanners that go on sending."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.box.conftest import PROJECT
from tests.lab.conftest import ADDRESS, BOX, OTHER, ansible, command, cut, environment, start, variables
from tests.lab.studies import Study, archived, delivered

UPPER = PROJECT / f"build/lab/{BOX}/upper"  # what the box writes, seen from outside while it runs
REMEMBERED = UPPER / "etc/relay-agent/credentials/.update/before"
# The agent's part is what these tests are about; all roles are played elsewhere.
FEW = {"update_roles": ["relay_agent", "update"]}


def update(release: Path, *options: str, **values: Any) -> subprocess.CompletedProcess[str]:
    return ansible("playbooks/update.yml", *options, variables(relay_agent_release=str(release), **values))


def version(host: Any) -> str:
    return host.check_output("/opt/relay-agent/current/bin/relay-agent --version").split()[-1]


def well(host: Any, wait_for: Callable[..., Any]) -> None:
    """Runs, finds nothing wrong with itself, accounts for everything, and no update is half way.

    A service that has just been started may not answer yet.
    """
    for service in ("relay-receive", "relay-work"):
        assert wait_for(lambda name=service: host.service(f"{name}.service").is_running)

    def wrong() -> list[Any]:
        return [entry for entry in json.loads(host.run("relay-agent check --json < /dev/null").stdout)
                if not entry["ok"]]
    assert wait_for(lambda: not wrong()), wrong()
    assert json.loads(host.check_output("relay-agent status --json < /dev/null"))["balance"]["difference"] == 0
    assert host.run("test -e /etc/relay-agent/credentials/.update/before").failed


@contextmanager
def sending(scanner: Any) -> Iterator[list[Study]]:
    """A scanner that goes on sending, as scanners do; the studies of which it was told that all is safe."""
    stop = threading.Event()
    safe: list[Study] = []

    def scan() -> None:
        while not stop.is_set():
            study = Study("meanwhile")
            while not study.send(scanner, ADDRESS) and not stop.wait(1):
                pass  # a scanner sends again what it was refused
            if not stop.is_set():
                safe.append(study)
            stop.wait(5)

    thread = threading.Thread(target=scan)
    thread.start()
    try:
        yield safe
    finally:
        stop.set()
        thread.join()


def all_arrive(studies: list[Study], host: Any, central: Any, wait_for: Callable[..., Any]) -> None:
    """Each study is delivered, and its images are in the archive, each once."""
    assert studies
    assert wait_for(lambda: delivered(studies, host), 300), host.check_output("relay-agent list < /dev/null")
    assert archived(studies, central)
    for study in studies:
        study.forget()


def test_a_good_release_reaches_all_boxes_that_answer(host, other, peer, wait_for, good, dead):
    """What waits in the old release is delivered by the new one, senders go on, and a dead box is named at the end."""
    queued = Study("queued")
    host.check_output("systemctl stop relay-work.service")
    assert queued.send(peer("scanner"), ADDRESS)
    with sending(peer("scanner")) as safe:
        played = update(good, dead, **FEW)
    assert played.returncode != 0
    assert "did not answer: relay-lab-9" in played.stdout, played.stdout[-3000:]
    for box in (host, other):
        assert version(box).startswith("9."), played.stdout[-3000:]
        well(box, wait_for)
        assert box.file("/etc/relay-agent/credentials/.update/version").content_string.strip() == (
            PROJECT / "build/VERSION").read_text().strip()
    updates = played.stdout.partition("PLAY [Update]")[2]
    assert updates.index(f"changed: [{BOX}]") < updates.index(f"changed: [{OTHER}]")
    all_arrive([queued, *safe], host, peer("central"), wait_for)


def test_a_bad_release_is_taken_back_and_goes_no_further(host, other, peer, wait_for, deaf):
    """The first box is on its old release again and says why; the next one was not touched."""
    was = host.file("/opt/relay-agent/current").linked_to
    with sending(peer("scanner")) as safe:
        played = update(deaf, **FEW)
    assert played.returncode != 0
    assert "this release is deaf" in played.stdout, played.stdout[-3000:]
    assert f"{BOX} is on its old release again" in played.stdout, played.stdout
    assert host.file("/opt/relay-agent/current").linked_to == was
    assert f"[{OTHER}]" not in played.stdout.partition("PLAY [Update]")[2].partition("PLAY RECAP")[0]
    well(host, wait_for)
    all_arrive(safe, host, peer("central"), wait_for)


def test_a_ledger_that_a_bad_release_has_migrated(host, peer, wait_for, idle):
    """The old release cannot read it, so the snapshot comes back; what was received since is found from the files."""
    queued = Study("queued")
    host.check_output("systemctl stop relay-work.service")
    assert queued.send(peer("scanner"), ADDRESS)
    with sending(peer("scanner")) as safe:
        played = update(idle, f"--limit={BOX},localhost", **FEW)
    assert played.returncode != 0
    assert "this release is idle" in played.stdout, played.stdout[-3000:]
    well(host, wait_for)
    assert "ledger-schema" in host.check_output("ls /var/lib/relay-agent")  # what it was is kept for people
    all_arrive([queued, *safe], host, peer("central"), wait_for)


def current() -> str:
    return os.readlink(UPPER / "opt/relay-agent/current")


@pytest.mark.parametrize("moment", ["remembered", "turned", "restarted", "kept"])
def test_power_cut(host, peer, wait_for, later, moment):
    """The box comes back on the old release or on the new one, whole, and goes on with what it had."""
    was, queued = current(), Study("queued")
    assert wait_for(lambda: queued.send(peer("scanner"), ADDRESS))
    words = command("playbooks/update.yml", f"--limit={BOX},localhost",
                    variables(relay_agent_release=str(later), **FEW))
    played = subprocess.Popen(words, cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    reached = {
        "remembered": REMEMBERED.exists,
        "turned": lambda: current() != was,
        "restarted": lambda: current() != was and not host.run("systemctl is-active relay-work.service").failed,
        "kept": lambda: current() != was and not REMEMBERED.exists(),
    }[moment]
    end = time.monotonic() + 300
    while not reached() and played.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert reached(), played.communicate()[0][-3000:]
    cut()
    start()
    played.communicate()
    assert played.returncode != 0 or moment == "kept"
    assert (current() == was) == (moment != "kept")
    well(host, wait_for)
    all_arrive([queued], host, peer("central"), wait_for)
