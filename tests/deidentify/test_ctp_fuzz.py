"""Whatever a script or an object is, CTP's engines end in one of their own ways, and the same way each time."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay_agent.dataset import Broken, encoding_of
from relay_agent.deidentify import ctp
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from tests.deidentify import golden

pytestmark = pytest.mark.slow  # hundreds of rounds each
CASES = golden.cases("ctp")
SCRIPTS = [case for case in CASES if case["kind"] != "filter"]
FILTERS = [case["script"] for case in CASES if case["kind"] == "filter"]
FILES = {name: (golden.HERE / "ctp" / "inputs" / name).read_bytes() for name in golden.inputs("ctp")}
COMMANDS = sorted({part.partition(">")[2].partition("</e>")[0] for case in SCRIPTS
                   for part in case["script"].split("<e ")[1:]})
PIECES = ["@", "(", ")", "{", "}", "\\", '"', ",", "this", "::", "root:", "@keep()", "@remove()", "@param(@SITEID)",
          "<", "&lt;", "]]>", "\0", "\ud800", "ü山", "-1", "99999999999999999999", "00100010", "[", "]", "0029[V]10",
          "*", "!"]
TAGS = ["00100010", "00100020", "00080020", "00080018", "00081140", "00280010", "7FE00010", "00120064", "00191008",
        "00080005", "0029[INVENTED VENDOR 7]10"]
MANY = settings(max_examples=200, suppress_health_check=list(HealthCheck))


def context() -> Context:
    return Context(UIDs(b"key", "P1"), now=datetime(2024, 1, 2, 3, 4, 5), number=lambda kind, value: len(value))


def mutated(text: str, source: random.Random) -> str:
    for _ in range(source.randint(1, 4)):
        start, end = sorted(source.randint(0, len(text)) for _ in range(2))
        end = min(end, start + source.randint(0, 12))
        text = text[:start] + source.choice([*PIECES, "", text[start:end] * 2]) + text[end:]
    return text


def end(script: str, lookup: str | None, file: bytes) -> tuple[str, object]:
    """How it ends, to be compared: the bytes, or the error."""
    try:
        parsed = ctp.parse(script, "s", lookup)
        json.dumps([[finding.text for finding in parsed.findings()], sorted(parsed.touches())])
        instance = File.parse(file)
    except (ScriptError, Broken) as error:
        return type(error).__name__, str(error)
    try:
        parsed.apply(instance, context())
        return "done", b"".join(instance.dataset.encode(encoding_of(instance.transfer_syntax)))
    except (Failed, Rejected) as error:
        return type(error).__name__, str(error)


@MANY
@given(st.sampled_from(SCRIPTS), st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False))
def test_mutated_scripts(case: dict, name: str, source: random.Random) -> None:
    script = mutated(case["script"], source)
    assert end(script, case["lookup"], FILES[name]) == end(script, case["lookup"], FILES[name])


@MANY
@given(st.lists(st.tuples(st.sampled_from(TAGS), st.lists(st.sampled_from(COMMANDS + PIECES), max_size=3)), max_size=5),
       st.sampled_from(sorted(FILES)), st.sets(st.sampled_from(["privategroups", "unspecifiedelements", "overlays"])))
def test_any_commands_on_any_elements(elements: list, name: str, removed: set[str]) -> None:
    lines = "".join(f'<e en="T" t="{tag}" n="{number}">{"".join(parts)}</e>'
                    for number, (tag, parts) in enumerate(elements))
    lines += "".join(f'<r en="T" t="{what}"/>' for what in sorted(removed))
    lines += '<p t="SITEID">1</p><p t="UIDROOT">1.2.3</p><p t="DATEINC">-5</p><p t="KEY">k</p><p t="SITENAME">n</p>'
    script = f"<script>{lines}</script>"
    assert end(script, "ptid/x=1", FILES[name]) == end(script, "ptid/x=1", FILES[name])


@MANY
@given(st.sampled_from([case for case in SCRIPTS if case["feature"].startswith(("whole", "process"))]),
       st.sampled_from(sorted(FILES)), st.data())
def test_damaged_objects(case: dict, name: str, data: st.DataObject) -> None:
    file = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(132, len(file) - 1))] = data.draw(st.integers(0, 255))
    assert end(case["script"], case["lookup"], bytes(file)) == end(case["script"], case["lookup"], bytes(file))


@MANY
@given(st.sampled_from(FILTERS), st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False))
def test_mutated_filters(text: str, name: str, source: random.Random) -> None:
    text = mutated(text, source)
    file = File.parse(FILES[name])
    for script in (text, f"{{ {text} }} (0,0,1,1)"):
        try:
            parsed = ctp.parse_filter(script, "f") if script is text else ctp.parse_pixels(script, "p")
            assert isinstance(parsed.findings(), list)
            if script is text:
                first = ctp.parse_filter(text, "f").matches(file.dataset, file.meta)
                assert first is ctp.parse_filter(text, "f").matches(file.dataset, file.meta)
        except (ScriptError, Failed):
            pass


@MANY
@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    for parse in (ctp.parse, ctp.parse_filter, ctp.parse_pixels):
        with suppress(ScriptError):
            parse(text, "s")
