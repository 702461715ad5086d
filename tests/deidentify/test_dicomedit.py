"""DicomEdit 6: the recorded outcomes of engine 6.6.0, what differs from them on purpose, and what they do not show."""

from __future__ import annotations

import json
import pickle
import re
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent.dataset import Broken, Dataset
from relay_agent.deidentify import dicomedit
from relay_agent.deidentify.dicomedit import dates
from relay_agent.deidentify.dicomedit.values import java_float
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File
from tests.deidentify import golden

CASES = golden.cases("dicomedit")
INPUTS = golden.inputs("dicomedit")
DIFFERENCES = json.loads((golden.HERE / "dicomedit" / "differences.json").read_text("utf-8"))
DOCS = Path(__file__).parents[2] / "docs" / "dicomedit.md"
IDENTIFYING = ("00100010", "00100020", "00080050", "00080080", "00104000", "0020000D")


def context(case: dict | None = None, project: str = "P") -> Context:
    variables = case["variables"] if case else {"project": "P", "subject": "S", "session": "E"}
    return Context(UIDs(b"k" * 32, project), variables.get("project"), variables.get("subject"),
                   variables.get("session"), datetime(2024, 1, 1))


def outcome(case: dict) -> tuple[dict, File | None]:
    """What ours does: the keys of a case that say so, and the object."""
    try:
        script = dicomedit.parse(case["script"], "site.das", case["lookup"])
    except ScriptError as error:
        assert re.match(r"line \d+, column \d+: expected ", str(error)), str(error)
        return {"outcome": "error", "stage": "parse"}, None
    file = golden.read("dicomedit", case["input"])
    try:
        script.apply(file, context(case))
    except Failed as error:
        assert re.match(r"site\.das( line \d+)?: ", str(error))
        values = [value for path in IDENTIFYING for value in INPUTS[case["input"]].get(path, {}).get("value", [])]
        assert not [value for value in values if len(value) > 3 and value in str(error)]
        return {"outcome": "error", "stage": "run"}, None
    except Rejected as error:
        assert re.match(r"site\.das line \d+: ", str(error))
        return {"outcome": "reject"}, None
    return {"outcome": "ok"}, file


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_recorded_outcome(case):
    want = {**case, **DIFFERENCES.get(case["id"], {}).get("ours", {})}
    flat_input = INPUTS[case["input"]]
    did, file = outcome(case)
    assert did == {key: want[key] for key in did}
    if file is not None:
        flat = golden.flatten(file)
        if want.get("deterministic", True):
            assert flat == golden.expected(want, flat_input)
        else:
            assert golden.broken_invariants(want, flat_input, flat) == []


def test_every_difference_is_one_and_is_documented():
    cases = {case["id"]: case for case in CASES}
    text = DOCS.read_text("utf-8")
    for name, difference in DIFFERENCES.items():
        ours = difference["ours"]
        assert any(ours.get(key) != cases[name].get(key) for key in ("outcome", "stage", "expected")), name
        assert difference["reason"]
        assert name.removeprefix("de6-") in text


def test_inputs_are_read_as_they_were_recorded():
    assert {name: golden.flatten(golden.read("dicomedit", name)) for name in INPUTS} == INPUTS


# Errors in scripts

@pytest.mark.parametrize(("text", "line", "column", "expected"), [
    ('(0010,0010) := \n', 1, 16, 'expected a value after ":="'),
    ('version "6.6"\n\n(0010,0010) := "x" ]\n', 3, 20, "expected a statement"),
    ('(0019,"SIEMENS MR HEADER"08) := "x"', 1, 7, "(0019,{CREATOR}08)"),
    ("-(0029,1110)", 1, 8, "a private tag is written (0029,{CREATOR}08)"),
    ("-(0018,{X}08)", 1, 8, "odd group"),
    ("-(60XX,0010)", 1, 6, "@ (even) or # (odd)"),
    ("-(0008,00800)", 1, 8, 'four digits of the element and ")"'),
    ('(0008,0060) = "MR" : (0008,0080) := "a"', 1, 20, 'expected "?" and an action'),
    ('(0008,0060) = "MR" ? removeAllPrivateTags', 1, 22, "put it into if (...) { }"),
    ('if ((0008,0060) = "MR") {\n} else if ((0008,0060) = "CT") {\n}', 2, 8, '"elseif" in one word'),
    ('if ((0008,0060) = "MR") {\n-(0008,0080)\n', 3, 1, 'expected "}"'),
    ('(0008,0080) := concatenate["a"\n"b"]', 1, 31, 'expected "," or "]" in the arguments of "concatenate"'),
    ('x := "v"', 1, 1, "open digit"),
    ('(0008,0080) := "a\\"b"', 1, 21, "second quote"),
    ('(0008,0080) := "\\d+"', 1, 16, "backslashes are doubled"),
    ("(0008,0080) := 007", 1, 16, "leading zero"),
    ('!isPresent[(0010,0010)] ? -(0010,0010)', 1, 1, "expected a statement"),  # DicomEdit skips the "!" and goes on
    ("(0008,1140)[x]/(0008,0080) := 1", 1, 13, "item number"),
    ("{" * 200, 1, 52, "nested deeper"),
    ("reject", 1, 7, 'expected ":="'),
])
def test_a_parse_error_says_where_and_what_was_expected(text, line, column, expected):
    with pytest.raises(ScriptError) as error:
        dicomedit.parse(text, "site.das")
    assert (error.value.line, error.value.column) == (line, column), str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(("text", "finding", "grave"), [
    ('(0010,0010) := "x"', "no version line", False),
    ('(0010,0010) := "x"\nversion "6.6"', "should be the first", False),
    ('version "6.7"', 'version "6.7" is not supported', True),
    ('version "6.6"\n(0010,0010) := UPPERCASE["a"]', "there is no function UPPERCASE; uppercase is meant?", True),
    ('version "6.6"\nisMatch["a","a"] ? reject[]', "ismatch is meant?", True),
    ('version "6.6"\nreject[]\n-(0010,0010)', "what follows is unreachable", False),
    ('version "6.6"\nif (isPresent[(0010,0010)]) {\nreject[]\n-(0010,0010)\n}', "what follows is unreachable", False),
    ('version "6.6"\nif ((0008,0060) = "CT") {\nreject[]\n} else {\nreject[]\n}\necho "x"',
     "comes here is rejected: what follows", False),
    ('version "6.6"\nif (true[]) {\n-(0010,0010)\n} else {\n-(0008,0080)\n}', "unreachable", False),
    ('version "6.6"\n"a" = "b" ? -(0008,0080)', "unreachable", False),
    ('version "6.6"\nif ((0008,0060) = "CT") {\n-(0008,0080)\n} elseif ((0008,0060) = "CT") {\n-(0008,0081)\n}',
     "unreachable", False),
    ('version "6.6"\n(0010,0010) := "x"\n-(0010,0010)', "line 3 overwrites it", False),
    ('version "6.6"\n(0008,008X) := "x"', "can mean several attributes", True),
    ('version "6.6"\n(0008,0080) := */(0010,0010)', "cannot be read", True),
    ('version "6.6"\n(0010,0010) := "M\u00fcller"', "not ASCII", False),
    ('version "6.6"\n(0010,0010) := getURL["http://x/y"]', "getURL is refused", True),
    ('version "6.6"\nretainPrivateTags[(0029,{X}10)]', "binary values", False),
    ('version "6.6"\n(0010,0010) := nobody', "the variable nobody is not set", True),
    ('version "6.6"\n(0010,0010) := match[(0010,4000), "(a", 1]', "regular expression", True),
    ('version "6.6"\n(0010,0010) := (0010,4000)', "the attribute stays as it is", False),
    ('version "6.6"\nshiftDateTimeSequenceByIncrement[1, (0008,0020)]', "paths in double quotes", True),
    ('version "6.6"\nhashUIDList["(0008,0018"]', "takes paths", True),
    ('version "6.6"\n-+/*/(0010,0010)', "cannot stand together", True),
    ('version "6.6"\n(0010,0010) := lookup["a", "b"]', "no lookup table", False),
    ('version "6.6"\necho', "echo needs a value", True),
    ('version "6.6"\ndelete["(0008,0080)", "(0008,0081)"]', "does not take 2", True),
])
def test_findings(text, finding, grave):
    found = [each for each in dicomedit.parse(text, "site.das").findings() if finding in each.text]
    assert [each.grave for each in found] == [grave]
    assert 1 <= found[0].line <= text.count("\n") + 1


def test_a_good_script_has_no_findings():
    script = dicomedit.parse('version "6.6"\n(0010,0010) := subject\nfoo := "a"\n(0010,0020) := foo\n', "site.das")
    assert script.findings() == []


def test_touches_what_is_named_to_be_changed():
    script = dicomedit.parse('version "6.6"\n(0010,0010) := (0010,4000)\n-(0008,XXXX)\nhashUIDList["*/(0008,1155)"]\n'
                             'days := {"(0008,0020)"}\nif (isPresent[(0018,0060)]) {\nremoveTags[(0010,0030)]\n'
                             '-(0029,{X}10)\n}', "site.das")
    group = {tag for tag in script.touches() if tag >> 16 == 0x0008}
    assert script.touches() - group == {0x00100010, 0x00100030}
    assert {0x00081155, 0x00080020, 0x00080080} <= group


def test_dicomedit_4_is_recognised_and_told_how_to_become_6():
    text = '// old\n-(0019,"SIEMENS MR HEADER"08)\n(0008,0060) = "MR" : (0008,0080) := urlEncode[project]\n'
    assert dicomedit.is_dicomedit4(text)
    assert not dicomedit.is_dicomedit4('// lead\nversion "6.1"\n' + text)
    assert dicomedit.is_dicomedit4('// version "6.1"\n' + text)
    hints = dicomedit.conversion(text)
    assert 'version "6.6"' in hints
    assert "line 2: a private tag is written (0019,{CREATOR}08)" in hints
    assert 'line 3: a condition ends with "?"' in hints
    assert "line 3: there is no urlEncode" in hints
    assert "condition" not in dicomedit.conversion('(0010,4000) := "Project: x"\n')


# What the recorded cases do not show

def run(script: str, name: str = "mr.dcm", project: str = "P", lookup: str | None = None) -> File:
    file = golden.read("dicomedit", name)
    dicomedit.parse('version "6.6"\n' + script, "site.das", lookup).apply(file, context(project=project))
    return file


@pytest.mark.parametrize(("script", "name", "message"), [
    ('(0002,0010) := "1.2.840.10008.1.2.4.70"', "mr.dcm", "Transfer Syntax"),
    ('(0002,0010) := "1.2.840.10008.1.2.1"', "rle.dcm", "Transfer Syntax"),
    ("-(0002,0010)", "rle.dcm", "Transfer Syntax"),
    ('(0008,0060) := "\u00c4"', "mr.dcm", "characters"),
    ('(0010,0010) := "\u5c71"', "latin1.dcm", "characters"),
    ('(0010,0010) := getURL["http://127.0.0.1/"]', "mr.dcm", "getURL is refused"),
    ("-(0008,0020)\nscalePatientAgeAndDobFromStudyDate[]", "mr.dcm", "study date"),
    ('(0028,0010) := "70000"', "mr.dcm", "does not fit"),
    ('(0010,0010) := removeTags["(0008,0080)"]', "mr.dcm", "gives nothing back"),
    ('(0008,0080) := (7FE0,0010)', "mr.dcm", "cannot be read as text"),
    ('(0020,000D) := mapUID[(0020,000D), "a.b"]', "mr.dcm", "prefix"),
    ('version "6.6"\n(0008,1140)[0] := "x"', "mr.dcm", "item"),
    ('(0008,0005) := "ISO 2022 IR 999"\n(0010,0010) := (0010,0010)\n(0008,0080) := (0010,0010)', "latin1.dcm", "text"),
])
def test_what_cannot_be_done_exactly_fails(script, name, message):
    with pytest.raises(Failed, match=message) as error:
        run(script, name)
    assert error.value.rule.startswith("site.das")


def test_uids_are_the_project_s_and_the_same_again():
    script = ('(0020,000D) := mapUID[(0020,000D), "1.9.9"]\n(0020,000E) := newUID[]\n(0020,0052) := newUID[]\n'
              '(0008,0018) := mapUID["1.2.3", "1.9.9"]\nmapReferencedUIDs["1.9.9", "*/(0008,1155)"]')
    once, again, other = run(script), run(script), run(script, project="Q")
    tags = (0x0020000D, 0x0020000E, 0x00200052, 0x00080018)
    assert b"".join(once.encode()) == b"".join(again.encode())
    assert len({file.dataset.text(tag) for file in (once, other) for tag in tags}) == 2 * len(tags)
    assert once.dataset.text(0x0020000D) == UIDs(b"k" * 32, "P").under(
        "1.9.9", golden.read("dicomedit", "mr.dcm").dataset.text(0x0020000D))


def test_the_rule_is_known_whenever_something_changes():
    file = golden.read("dicomedit", "mr.dcm")
    told = context()
    seen = []
    file.dataset.watch = lambda data, tag: seen.append((tag, told.rule))
    dicomedit.parse('version "6.6"\n-(0008,0080)\nif ((0008,0060) = "MR") {\n(0010,0010) := subject\n}\n'
                    '*/(0008,1155) ?= "1"', "site.das").apply(file, told)
    assert seen == [(0x00080080, "site.das line 2"), (0x00100010, "site.das line 4"),
                    (0x00081155, "site.das line 6"), (0x00081155, "site.das line 6")]


def test_nothing_is_called_painted_that_is_not():
    file = run('alterPixels["rectangle", "l=900, t=0, r=950, b=8", "solid", "v=0"]', "us.dcm")
    assert file.dataset.values(0x00280301) == ["YES"]
    assert 0x00120063 not in file.dataset


def test_a_new_block_adopts_no_orphans():
    file = run('(0033,{NEW}01) := "x"', "privseq.dcm")
    assert file.dataset.values(0x00330011) == ["NEW"]
    assert 0x00331101 in file.dataset and file.dataset.values(0x00331001) == ["orphan"]


@pytest.mark.parametrize(("script", "left"), [
    ("-+/(0040,A730)", [0x0040A730]),  # "+" does not go into what it looks for, in DicomEdit neither
    ("-.", [0x0040A730]), ("-(0040,A730)/*", []), ("-(0040,A730)[0]/*", [0x0040A730]),
])
def test_wildcards_at_the_ends(script, left):
    data = run(script, "sr.dcm").dataset
    assert [tag for tag in (0x0040A730,) if tag in data] == left


def test_a_path_of_levels_deletes_items_contents_only():
    data = run("-(0040,A730)[0]/*", "sr.dcm").dataset
    assert [len(item) > 0 for item in data.items(0x0040A730)][:2] == [False, True]


def test_scripts_go_to_other_processes():
    script = dicomedit.parse('version "6.3"\n(0010,0010) := lookup["a", "b"]', "site.das", "a/b = c")
    again = pickle.loads(pickle.dumps(script))
    file = golden.read("dicomedit", "mr.dcm")
    again.apply(file, context())
    assert (again.name, again.language, file.dataset.text(0x00100010)) == ("site.das", "DicomEdit 6.3", "c")


def test_numbers_as_java_writes_them():
    wanted = {1.0: "1.0", 1.25: "1.25", -0.5: "-0.5", 0.001: "0.001", 1e-4: "1.0E-4", 1234567.0: "1234567.0",
              1e7: "1.0E7", 1.5e10: "1.5E10", 0.0: "0.0", float("inf"): "Infinity", 100.0: "100.0"}
    assert {number: java_float(number, "FD") for number in wanted} == wanted
    assert java_float(0.10000000149011612, "FL") == "0.1"


@given(st.dates(date(1, 1, 1), date(9000, 1, 1)), st.integers(-300000, 300000))
def test_days_are_the_calendar_s(day, amount):
    text = f"{day.year:04d}{day.month:02d}{day.day:02d}"
    try:
        moved = day + timedelta(days=amount)
    except OverflowError:
        return
    assert dates.shift(text, amount, "days") == f"{moved.year:04d}{moved.month:02d}{moved.day:02d}"
    assert dates.shift(dates.shift(text, amount, "Days"), -amount, "days") == text


# Anything else is a clear error

PIECES = sorted({piece for case in CASES for piece in re.findall(r'"[^"\n]*"|\w+|[^\w\s]|\s', case["script"])})


@st.composite
def broken_scripts(draw) -> str:
    pieces = re.findall(r'"[^"\n]*"|\w+|[^\w\s]|\s', draw(st.sampled_from(CASES))["script"])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(pieces)))
        pieces[at:at + draw(st.integers(0, 2))] = draw(st.lists(st.sampled_from(PIECES), max_size=2))
    return "".join(pieces)


@pytest.mark.slow
@settings(max_examples=400)
@given(broken_scripts(), st.sampled_from(sorted(INPUTS)))
def test_a_fuzzed_script_runs_or_says_why_not(text, name):
    outputs = []
    for _ in range(2):
        try:
            script = dicomedit.parse(text, "site.das", "a/b = c")
            script.findings()
            script.touches()
            file = golden.read("dicomedit", name)
            script.apply(file, context())
        except (ScriptError, Failed, Rejected) as error:
            outputs.append(str(error))
        else:
            outputs.append(b"".join(file.encode()))
            File.parse(outputs[-1]).dataset.changed  # noqa: B018 - it can be read
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@settings(max_examples=300)
@given(st.sampled_from(CASES), st.sampled_from(sorted(INPUTS)), st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_fuzzed_object_is_done_or_fails(case, name, changes):
    content = bytearray((golden.HERE / "dicomedit" / "inputs" / name).read_bytes())
    for at, byte in changes:
        content[300 + at % (len(content) - 300)] = byte
    try:
        file = File.parse(bytes(content))
        dicomedit.parse(case["script"], "site.das", case["lookup"]).apply(file, context(case))
        file.encode()
    except (Broken, ScriptError, Failed, Rejected):
        pass


@given(st.text(max_size=60))
def test_any_text_is_a_script_or_an_error_with_its_place(text):
    try:
        dicomedit.parse(text, "site.das").findings()
    except ScriptError as error:
        assert error.line >= 1 and error.column >= 1


def test_data_sets_that_are_empty_or_odd():
    for case in CASES[::7]:
        try:
            dicomedit.parse(case["script"], "site.das", case["lookup"]).apply(
                File("1.2.840.10008.1.2.1", Dataset()), context(case))
        except (ScriptError, Failed, Rejected):
            continue
