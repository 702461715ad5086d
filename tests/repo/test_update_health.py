"""What an update is judged by: a box that is worse than before, and not one that was disturbed for a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.variables import PROJECT

FINE, OLD, NEW = ([{"ok": ok, "what": what, "advice": ""}] for ok, what in (
    (True, "port 11112 on 0.0.0.0: RELAY answers C-ECHO"), (False, "central: 192.0.2.1 port 443: no answer"),
    (False, "/var/lib/relay-agent/spool: writable, a sync takes 31.0 ms")))
PLAY = [{"hosts": "localhost", "gather_facts": False, "tasks": [
    {"ansible.builtin.include_tasks": str(PROJECT / "playbooks/tasks/health.yml")}],
    "vars": {"update_before": {"stdout": json.dumps(OLD)}, "relay_agent_config": {"destination": []},
             "relay_agent_test_destination": ""}}]


@pytest.mark.slow
@pytest.mark.parametrize(("answers", "well"), [([FINE], True), ([[*OLD, *FINE]], True), ([NEW, NEW, FINE], True),
                                               ([NEW], False)], ids=["fine", "as before", "for a moment", "worse"])
def test_judged(tmp_path, answers, well):
    """The last answer is what the box goes on saying."""
    for number, answer in enumerate(answers):
        (tmp_path / f"{number}.json").write_text(json.dumps(answer))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
            "relay-agent": f"cd {tmp_path}; set -- *.json; answer=$(cat $1); test $# -eq 1 || rm $1\n"
                           "echo \"$answer\"; case $answer in *false*) exit 1;; esac",
            "systemctl": "case $1 in show) echo 0;; esac", "sleep": ""}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "play.yml").write_text(json.dumps(PLAY))
    words = [Path(sys.executable).with_name("ansible-playbook"), "--connection=local", "--inventory=localhost,",
             tmp_path / "play.yml"]
    played = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False,
                            env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"})
    assert (played.returncode == 0) == well, played.stdout[-2000:]
    assert ("a sync takes 31.0 ms" in played.stdout) == (not well), played.stdout[-2000:]
