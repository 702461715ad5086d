"""The recorded cases of the real CTP: ours agrees with each, but for those listed here with their reason."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from relay_agent.deidentify import ctp
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.deidentify.uids import UIDs
from tests.deidentify import golden

CASES = {case["id"].removeprefix("ctp-"): case for case in golden.cases("ctp")}
INPUTS = golden.inputs("ctp")

LOST_BACKSLASH = "CTP's parser takes the backslash of \\d, so the expression finds nothing and the value stays"
WRONG_ARGUMENTS = "CTP writes the argument list, or the whole value, where an argument is missing or no number"
UNKNOWN_ELEMENT = "an element name that CTP does not know reads as an empty element"
UNKNOWN_FUNCTION = "CTP writes the text of a function that it does not know"
NO_WELL_FORMED = "CTP does nothing at all with a script that it cannot read, and reports success"
IGNORED_LINE = "CTP ignores this line of the script"
CANNOT_STORE = "the VR cannot hold the value: CTP leaves the original value and reports success"
SKIPPED = "@skip lets the object go on unchanged"
PRIVATE_IN_ITEMS = "CTP leaves private elements in the items of sequences"
CURVES = "remove.curves alone removes no curve"
KANJI = "CTP turns characters of ISO 2022 IR 87 into question marks"
FILTER_SYNTAX = "CTP takes a filter that it cannot read for false, or forgives it; what it tests is not what is written"

REFUSED = {  # ScriptError when the script is read
    "remove-006": "CTP never changes pixel data, even where its removal is asked for",
    "param-004": "CTP writes the word null for an unknown parameter",
    "if-027": "a condition without a value to compare with is never true",
    "filter-007": "in CTP !! is a single negation",
    "mixed-006": "CTP writes @keep() behind another text as text",
    **dict.fromkeys(("remove-015", "unknown-function-001", "unknown-function-008", "unknown-function-012"),
                    UNKNOWN_FUNCTION),
    **dict.fromkeys(("contents-021", "contents-024", "properties-019"), LOST_BACKSLASH),
    **dict.fromkeys(("truncate-005", "round-006", "round-007", "hash-010", "hashptid-008", "hashname-005",
                     "modifydate-008", "pathelement-006", "encrypt-004", "decrypt-002"), WRONG_ARGUMENTS),
    **dict.fromkeys(("contents-007", "contents-017", "value-005", "lettercase-006", "if-036", "require-010",
                     "keyword-003", "keyword-008", "keyword-014", "keyword-016", "keyword-018", "keyword-019",
                     "keyword-filter-003", "keyword-filter-005", "keyword-filter-006", "filter-049", "filter-081"),
                    UNKNOWN_ELEMENT),
    **dict.fromkeys(("layout-005", "layout-006"), NO_WELL_FORMED),
    **dict.fromkeys(("layout-009", "layout-010", "layout-012", "properties-014"), IGNORED_LINE),
    **dict.fromkeys(("filter-020", "filter-058", "filter-059", "filter-061", "filter-062", "filter-065", "filter-066",
                     "filter-083"), FILTER_SYNTAX),
}
FAILS = {  # Failed when the object comes: it is quarantined
    **dict.fromkeys(("literal-018", "literal-020", "literal-026", "dateinterval-005"), CANNOT_STORE),
    **dict.fromkeys(("skip-002", "if-039"), SKIPPED),
}
OTHER: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # what ours removes and sets beyond the recorded output
    "contents-025": (KANJI, [], {"00100020": {
        "vr": "LO", "value": ["Yamada^Tarou=山田^太郎=やまだ^たろう"],
        "raw": "1b284259616d6164615e5461726f753d1b24423b3345441b28425e1b244242404f3a1b28423d1b24422464245e24401b2842"
               "5e1b2442243f246d24261b2842"}}),
    "privategroups-004": (PRIVATE_IN_ITEMS, [
        "00081140[0]/00290010", "00081140[0]/00291010", "00081140[0]/00291011", "00081140[1]/00190010",
        "00081140[1]/00191008", "00081140[1]/00290010", "00081140[1]/00291010", "00081140[1]/00291011"], {}),
    "safeprivate-005": (PRIVATE_IN_ITEMS, [
        "00081140[0]/00291010", "00081140[0]/00291011", "00081140[1]/00191008", "00081140[1]/00291010",
        "00081140[1]/00291011"], {}),
    "keepgroup-002": (PRIVATE_IN_ITEMS, ["00081140[1]/00190010", "00081140[1]/00191008"], {}),
    "curves-001": (CURVES, ["50000010"], {}),
    "curves-003": (CURVES, ["50000010"], {}),
}
DIFFERENT = REFUSED | FAILS | {name: reason for name, (reason, _, _) in OTHER.items()}


def context(case: dict[str, Any]) -> Context:
    numbers: dict[tuple[str, str], int] = {}

    def number(kind: str, value: str) -> int:
        return numbers.setdefault((kind, value), 1 + sum(known == kind for known, _ in numbers))
    return Context(UIDs(b"key", "P1"), now=datetime(2024, 1, 2, 3, 4, 5),
                   number=number if case.get("integer_table") else None)


def outcome(case: dict[str, Any]) -> dict[str, Any] | bool:
    file = golden.read("ctp", case["input"])
    if case["kind"] == "filter":
        return ctp.parse_filter(case["script"], "site.script").matches(file.dataset, file.meta)
    ctp.parse(case["script"], "site.script", case["lookup"]).apply(file, context(case))
    return golden.flatten(file)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERENT])
def test_ours_is_what_ctp_did(name: str) -> None:
    case = CASES[name]
    if case["outcome"] == "quarantine":
        with pytest.raises((ScriptError, Failed, Rejected)):
            outcome(case)
    elif case["kind"] == "filter":
        assert outcome(case) is case["expected"]
    elif not case.get("deterministic", True):
        flat = outcome(case)
        assert isinstance(flat, dict)
        assert golden.broken_invariants(case, INPUTS[case["input"]], flat) == []
    else:
        assert outcome(case) == golden.expected(case, INPUTS[case["input"]])


@pytest.mark.parametrize("name", REFUSED)
def test_a_script_with_which_ctp_fails_open_is_refused(name: str) -> None:
    with pytest.raises(ScriptError):
        outcome(CASES[name])


@pytest.mark.parametrize("name", FAILS)
def test_an_object_with_which_ctp_fails_open_is_quarantined(name: str) -> None:
    with pytest.raises(Failed):
        outcome(CASES[name])


@pytest.mark.parametrize("name", OTHER)
def test_ours_does_the_safe_thing(name: str) -> None:
    case = CASES[name]
    _, removed, put = OTHER[name]
    recorded = golden.expected(case, INPUTS[case["input"]])
    wanted = {path: entry for path, entry in recorded.items() if path not in removed} | put
    assert outcome(case) == wanted != recorded


def test_every_recorded_case_is_here_and_every_difference_is_one_of_them() -> None:
    assert len(CASES) == 435
    assert set(DIFFERENT) <= set(CASES)
    assert len(DIFFERENT) == len(REFUSED) + len(FAILS) + len(OTHER) == 65


def test_the_inputs_are_read_as_recorded() -> None:
    for name, flat in INPUTS.items():
        assert golden.flatten(golden.read("ctp", name)) == flat
