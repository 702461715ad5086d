"""Identification of sessions: golden cases recorded with Java, examples of the translation, properties."""
from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_agent import identify as module
from relay_agent import java_regex
from relay_agent.identify import (
    COMMENT_TAGS,
    Identity,
    Rule,
    Rules,
    auto_archive,
    extract,
    identify,
    label,
    needed_tags,
    parse_rule,
    project_candidates,
)
from relay_agent.java_regex import RuleError, RuleValueError

GOLDEN = Path(__file__).parent / "golden" / "identify" / "cases.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
PATIENT_COMMENTS, STUDY_COMMENTS, HISTORY = COMMENT_TAGS
DESCRIPTION, ACCESSION, NAME, PATIENT_ID = "00081030", "00080050", "00100010", "00100020"


def test_every_golden_case_is_there() -> None:
    assert len(CASES) == len({case["id"] for case in CASES}) == 193
    assert {case["kind"] for case in CASES} == {"assign", "aa", "label", "rule"}


def outcome_of(case: dict[str, Any]) -> tuple[str, Any]:
    """What this implementation makes of a golden case, in the corpus's own terms."""
    if case["kind"] == "assign":
        found = extract(case["identifier"], case["input"])
        return "none" if found is None else "match", found
    if case["kind"] == "aa":
        flag = auto_archive(case["input"])
        return ("none", None) if flag is None else ("match", str(flag).lower())
    if case["kind"] == "label":
        return "match", label(case["input"])
    try:
        rule = parse_rule(case["script"] or "")
    except RuleError:
        return "rule-error", None
    seen: dict[str, Any] = {"tag": rule.tag, "regex": rule.regex, "group": rule.group, "find": rule.find,
                            "replace": rule.replace}
    try:
        value = rule.apply(case["input"])
    except RuleValueError:
        return "value-error", seen
    if value is None and case["outcome"] == "match":  # an optional group that took no part
        return "match", seen | {"value": None}
    return ("none", seen) if value is None else ("match", seen | {"value": value})


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden(case: dict[str, Any]) -> None:
    assert outcome_of(case) == (case["outcome"], case["expected"])


# Expression, text and the groups that java.util.regex (17) finds; None where the whole text does not match.
JAVA_MATCHES: list[tuple[str, str, tuple[str | None, ...] | None]] = [
    (r"(\w++)-\d+", "ab-1", ("ab",)),
    (r"(?>a+)b(c)", "aabc", ("c",)),
    (r"(\p{XDigit}+)\P{Alpha}", "1F-", ("1F",)),
    (r"([\p{Lower}_]+)\p{Upper}", "a_B", ("a_",)),
    (r"\Qa.b\E(.)", "a.bc", ("c",)),
    (r"\Qa.b\E(.)", "axbc", None),
    (r"(\H+)\h(\S+)", "a\xa0b", ("a", "b")),
    (r"(?<p>\w+)_\k<p>", "ab_ab", ("ab",)),
    (r"(\w+)\z", "ab\n", None),
    (r"(\w+)$\s", "ab\n", ("ab",)),
    (r"(\w+)\Z\s", "ab\n", ("ab",)),
    (r"(\w+)$\n", "ab\r\n", None),
    (r"(\w+)$\r\n", "ab\r\n", ("ab",)),
    (r"(.+)", "a\u2028b", None),
    (r"(?s)(.+)", "a\u2028b", ("a\u2028b",)),
    (r"(.+)", "a\x0bb", ("a\x0bb",)),
    (r"(\v)", "\x85", ("\x85",)),
    (r"(\w+)", "é", None),
    (r"(\d+)", "٣", None),
    (r"(\s)", "\xa0", None),
    (r"(?i)(s+)", "sſS", None),
    (r"a(?i)b|C", "c", ()),
    (r"(a(?i)b)C", "aBc", None),
    (r"([]a]+)", "]a", ("]a",)),
    (r"([\d-z]+)", "1-z", ("1-z",)),
    (r"([a-]+)", "a-", ("a-",)),
    (r"([^^]*)\^.*", "DOE^JOHN", ("DOE",)),
    (r"(a)|(b)", "b", (None, "b")),
    (r"(a){2}(b)?", "aa", ("a", None)),
    (r"x(}|])", "x}", ("}",)),
    (r"\B()", "", None),  # an empty value is never looked at
    (r"P(?<=P)(\d)", "P1", ("1",)),
    (r"(a|ab)(c|bcd)(d*)", "abcd", ("a", "bcd", "")),
    (r"(\x41\u0042\t)", "AB\t", ("AB\t",)),
]


@pytest.mark.parametrize(("regex", "text", "groups"), JAVA_MATCHES)
def test_expressions_match_as_in_java(regex: str, text: str, groups: tuple[str | None, ...] | None) -> None:
    whole = parse_rule(f"(0010,4000):{regex}:0")
    assert whole.apply(text) == (None if groups is None else text)
    for number, expected in enumerate(groups or (), 1):
        assert parse_rule(f"(0010,4000):{regex}:{number}").apply(text) == expected


# Find, replacement, text and the result of String.replaceAll in Java 17.
JAVA_REPLACEMENTS = [
    ("a*", "x", "baac", "xbxxcx"),
    ("a*?", "x", "aa", "xaxax"),
    ("", "-", "ab", "-a-b-"),
    (r"(?<d>\d)", "<${d}>", "a1b2", "a<1>b<2>"),
    ("(a)(b)?", "[$2$1]", "aba", "[ba][a]"),
    ("a", r"\$1", "a", "$1"),
    ("a", r"\\", "a", "\\"),
    ("(a)", "$12", "a", "a2"),
    ("(a)(b)(c)(d)(e)(f)(g)(h)(i)(j)(k)", "$11$12", "abcdefghijk", "ka2"),
    ("a", "${x}", "b", "b"),
    ("^a", "x", "aa", "xa"),
    ("(?<=a)b", "x", "abb", "axb"),
    (r"\b", "|", "ab c", "|ab| |c|"),
]


@pytest.mark.parametrize(("find", "replace", "text", "result"), JAVA_REPLACEMENTS)
def test_replacements_work_as_in_java(find: str, replace: str, text: str, result: str) -> None:
    assert parse_rule(f"(0010,4000):(.*) t:{find} r:{replace}").apply(text) == result


@pytest.mark.parametrize("replace", ["${x}", "$", "\\", "$x", "$1", "${", "${1}"])
def test_replacements_that_java_rejects_when_used(replace: str) -> None:
    rule = parse_rule(f"(0010,4000):(.*) t:a r:x{replace}")
    assert rule.apply("b") == "b"
    with pytest.raises(RuleValueError):
        rule.apply("a")


@pytest.mark.parametrize("regex", [
    "([a-z&&[^b]])", r"(\p{IsLatin}+)", r"(\pL+)", "([a[b]])", "(?x)(a)", "(?m)^(a)", r"\G(a)", r"(\X)",
    r"(\q)", "(?P<n>a)", "(?#c)(a)", "(a**)", "+(a)", "(a{,2})", "(a{2,1})", "([z-a])", r"([a-\d])", "((a)",
    "(a))", "([a)", "(a)\\", r"(\N)", r"(\b{g}a)", r"\1(a)", r"(a)\2", r"(a\1)", "(a?)*", "(a*)+",
    "(a|){2}", r"(?<=a+)(b)", r"([\H])", r"([\P{Alpha}])", r"(\uD83D\uDE00)", r"(\p{d})", "(?i",
    "(?<n>a)(?<n>b)", "(a){99999999999}", "((a)|b)*+", r"(\w)++", r"\w(?:(\w)+){2}", "(?!(a)).*",
    "(?>(a|b))c",
])
def test_what_cannot_be_reproduced_is_refused_with_a_sentence(regex: str) -> None:
    with pytest.raises(RuleError, match=r"\AThe (expression|line) .*\.\Z"):
        parse_rule(f"(0010,4000):{regex}:1")


@pytest.mark.parametrize("line", [
    "", "(8000,0010):(.*)", "(0010,4000):(.*):2147483648", "(0010,4000):", "0010,4000:(.*)"])
def test_lines_that_xnat_refuses(line: str) -> None:
    with pytest.raises(RuleError):
        parse_rule(line)


def test_lines_are_trimmed_and_group_zeros_do_not_matter() -> None:
    assert parse_rule(" \t(0010,002a):(.*):01\r\n") == parse_rule("(0010,002A):(.*):1")


def test_cut_counts_utf16_units_as_java_does() -> None:
    assert parse_rule("(0010,4000):(.*)").apply("😀" * 40) == "😀" * 32


def test_rules_name_list_and_line() -> None:
    rules = Rules.parse(["(0008,1030):(.*)", "", "(0010,4000):P(.*)"], auto_archive=["(0010,4000):(t)"])
    assert list(map(len, (rules.project, rules.subject, rules.session, rules.auto_archive))) == [2, 0, 0, 1]
    with pytest.raises(RuleError, match=r"\Asubject rules, line 3: The expression opens"):
        Rules.parse(subject=["(0008,1030):(.*)", "", "(0008,1030):(.*"])
    assert Rules.parse(session="(0008,1030):(.*)\n(0008,0050):(.*)").session[1].tag == "00080050"


def test_hopeless_expressions_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_regex, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(RuleValueError) as caught:
        parse_rule("(0010,4000):(a+)+b").apply("a" * 64)
    assert time.monotonic() - started < 60
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "aaaa" not in str(caught.value)
    with pytest.raises(RuleValueError):
        parse_rule(r"(0010,4000):(.*) t:.*.*.*.*x r:").apply("a" * 5000)


def test_doubtful_but_harmless_expressions_work_in_the_child_process() -> None:
    assert parse_rule(r"(0010,4000):(?:[A-Z]+_)+(\d+)").apply("AB_CD_12") == "12"
    assert parse_rule("(0010,4000):(.*) t:(a+b?)+ r:<$1>").apply("xaabé") == "x<aab>é"


def test_long_comments_do_not_take_long() -> None:
    started = time.monotonic()
    for text in ("project:" + " " * 10000 + "\n\nx", " project:\ta" * 900 + "\n!\n", "project " * 1280):
        extract("Project", text)
    assert time.monotonic() - started < 60


RULES = Rules.parse(project=["(0018,1030):(P\\w+)_.*"], subject=["(0010,0020):S(.*)"],
                    session=["(0008,0050):(E.*)"], auto_archive=["(0010,4000):auto (\\w+)"])


def test_order_rule_then_comment_then_fall_back() -> None:
    values = {"00181030": "PX_t1", PATIENT_ID: "S.1", ACCESSION: "E 9", NAME: "Doe^Jane^^",
              DESCRIPTION: "Brain", PATIENT_COMMENTS: "Project:C1 Subject:C2 Session:C3 AA:true",
              HISTORY: "Project:H1"}
    assert identify(values, RULES) == Identity("PX", "_1", "E_9", True, {
        "project": "rule (0018,1030)", "subject": "rule (0010,0020)", "session": "rule (0008,0050)",
        "auto_archive": "(0010,4000)"})
    assert identify(values) == Identity("C1", "C2", "C3", True, dict.fromkeys(
        ("project", "subject", "session", "auto_archive"), "(0010,4000)"))
    del values[PATIENT_COMMENTS]
    assert identify(values) == Identity("H1", "Doe_Jane", "S_1", None, {
        "project": "(0010,21B0)", "subject": "fallback (0010,0010)", "session": "fallback (0010,0020)"})
    assert identify({}) == Identity(None, None, None, None, {})


def test_candidates_stand_in_xnats_order() -> None:
    values = {"00181030": "PX_t1", PATIENT_COMMENTS: "Project:A", STUDY_COMMENTS: "Project:",
              HISTORY: "Project:B", DESCRIPTION: " Brain ", ACCESSION: "42\\43"}
    assert project_candidates(values, RULES) == [
        ("PX", "rule (0018,1030)"), ("A", "(0010,4000)"), ("B", "(0010,21B0)"),
        ("Brain", "fallback (0008,1030)"), ("42", "fallback (0008,0050)")]


def test_whole_values_become_projects_only_when_the_server_knows_them() -> None:
    values = {DESCRIPTION: "Brain", ACCESSION: "alias 7"}
    assert identify(values).project is None
    known = {"alias 7": "P7"}.get
    found = identify(values, known_project=known)
    assert (found.project, found.sources["project"]) == ("P7", "fallback (0008,0050)")
    # an unknown project of a comment is passed over, as XNAT passes on to the next step
    assert identify(values | {PATIENT_COMMENTS: "Project:X"}, known_project=known).project == "P7"


def test_without_a_list_a_rule_gives_only_possible_ids() -> None:
    rules = Rules.parse(project=["(0008,1030):(.*)"])
    assert identify({DESCRIPTION: "My study", STUDY_COMMENTS: "Project:P2"}, rules).project == "P2"
    assert identify({DESCRIPTION: "My study"}, rules, {"My study": "P3"}.get).project == "P3"


def test_a_rule_after_the_hit_is_not_run_and_one_before_it_stops_the_study() -> None:
    broken, good = "(0010,4000):Project.*", "(0008,1030):(.*)"
    values = {PATIENT_COMMENTS: "Project:P1", DESCRIPTION: "P2"}
    assert identify(values, Rules.parse(project=[good, broken])).project == "P2"
    with pytest.raises(RuleValueError, match="group 1"):
        identify(values, Rules.parse(project=[broken, good]))


def test_an_auto_archive_value_that_means_nothing_ends_the_search() -> None:
    assert identify({PATIENT_COMMENTS: "AA:maybe", STUDY_COMMENTS: "AA:true"}).auto_archive is None
    assert identify({PATIENT_COMMENTS: "AA:", STUDY_COMMENTS: "AA:F"}).auto_archive is False


def test_comments_are_not_split_and_short_strings_are() -> None:
    assert identify({PATIENT_COMMENTS: "x\\ Subject:S1"}).subject == "S1"
    assert identify({PATIENT_COMMENTS: "Subject:S1\0 ", NAME: "n"}).subject == "S1"
    assert identify({NAME: " Doe^Jane^ \\Roe^Jim", PATIENT_ID: "\\2"}) == Identity(
        None, "Doe_Jane", None, None, {"subject": "fallback (0010,0010)"})


def test_needed_tags() -> None:
    fixed = {*COMMENT_TAGS, DESCRIPTION, ACCESSION, NAME, PATIENT_ID}
    assert needed_tags(Rules()) == fixed
    assert needed_tags(RULES) == fixed | {"00181030"}


@pytest.mark.parametrize(("source", "imports"), [(module, {"re"}), (java_regex, {"json", "re", "subprocess", "sys"})])
def test_modules_neither_log_nor_print(source: Any, imports: set[str]) -> None:
    tree = ast.parse(Path(source.__file__).read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == imports
    assert "print" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


PIECES = st.sampled_from([*"ab1_.^$|()[]{}*+?\\-,&<>=!:", "(?i)", "(?:", "(?<n>", "(?=", "{2}", "{1,2}",
                          r"\d", r"\Q", r"\E", r"\p{Alpha}", r"\k<n>", r"\1", "[^", "&&", "\n", "é", "\\"])
EXPRESSIONS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=20)
COMMENT_PIECES = st.sampled_from(["Project", "subject", "AA", ":", " ", "\n", "\r", ",", ";", "P1", "-", "é"])
COMMENTS = st.text() | st.lists(COMMENT_PIECES, max_size=14).map("".join)
IDENTIFIERS = st.sampled_from(["Project", "Subject", "Session", "AA"])


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.text() | EXPRESSIONS.map("(0010,4000):{}".format))
def test_any_line_is_a_rule_or_a_rule_error(line: str) -> None:
    try:
        rule = parse_rule(line)
    except RuleError as error:
        assert str(error).endswith(".")
    else:
        assert isinstance(rule, Rule) and len(rule.tag) == 8


@pytest.mark.slow
@settings(max_examples=500)
@given(EXPRESSIONS, EXPRESSIONS, st.text(max_size=8), st.text(max_size=12))
def test_applying_raises_nothing_but_value_errors(regex: str, find: str, replace: str, text: str) -> None:
    try:
        result = parse_rule(f"(0010,4000):{regex}:0 t:{find} r:{replace}").apply(text)
    except (RuleError, RuleValueError):
        return
    assert result is None or isinstance(result, str)
    assert text or result is None


@given(IDENTIFIERS, COMMENTS)
def test_extract_gives_label_characters_or_nothing(identifier: Any, text: str) -> None:
    found = extract(identifier, text)
    assert found is None or label(found) == found


@given(st.text())
def test_label_is_idempotent_and_keeps_the_length(text: str) -> None:
    made = label(text)
    assert label(made) == made and len(made) == len(text)
    assert set(made) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


WORDS = st.text("ABCxyz019_-", min_size=1, max_size=8)


@given(st.none() | WORDS, st.sampled_from(COMMENT_TAGS), st.none() | WORDS, st.none() | WORDS)
def test_rule_beats_comment_beats_fall_back(
        ruled: str | None, tag: str, comment: str | None, whole: str | None) -> None:
    values = {"00181030": ruled or "", tag: f"Project:{comment or ''}", DESCRIPTION: whole or ""}
    found = identify(values, Rules.parse(project=["(0018,1030):(.*)"]), lambda candidate: candidate)
    expected = ruled or comment or whole
    assert found.project == expected
    assert ("project" in found.sources) == (expected is not None)


@given(st.text() | st.none())
def test_an_empty_value_never_matches(text: str | None) -> None:
    rule = parse_rule("(0010,4000):(?s)(.*)")
    assert (rule.apply(text) is None) == (not text)


@given(st.dictionaries(st.sampled_from(sorted(needed_tags(RULES))), COMMENTS))
def test_sources_hold_tags_only(values: dict[str, str]) -> None:
    for source in identify(values, RULES, lambda candidate: candidate).sources.values():
        assert source.removeprefix("rule ").removeprefix("fallback ") in {
            f"({tag[:4]},{tag[4:]})" for tag in needed_tags(RULES)}
