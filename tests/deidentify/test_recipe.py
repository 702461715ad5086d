"""The recipe: which engine a script goes to, and what makes one recipe another."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from relay_agent.deidentify.recipe import Recipe, Step, parse
from relay_agent.deidentify.script import ScriptError
from tests.deidentify import golden

# A test for each of these scripts would cost several times what it does.

def test_every_recorded_dicomedit_script_goes_to_dicomedit():
    cases = [case for case in golden.cases("dicomedit")
             if case.get("stage") != "parse" and 'version "' in case["script"]]
    taken = 0
    for case in cases:
        try:
            assert parse(Step("s", case["script"], case["lookup"])).language.startswith("DicomEdit"), case["id"]
            taken += 1
        except ScriptError as error:
            assert "CTP" not in str(error), case["id"]
    assert taken > 0.9 * len(cases)


def test_every_recorded_ctp_script_goes_to_ctp():
    cases, taken = golden.cases("ctp"), 0
    for case in cases:
        with suppress(ScriptError):
            language = parse(Step("s", case["script"], case["lookup"])).language
            assert language == ("CTP DicomFilter" if case["kind"] == "filter" else "CTP DicomAnonymizer"), case["id"]
            taken += 1
    assert taken > 0.8 * len(cases)  # the others are meant to be wrong


def test_a_dicomedit_4_script_is_refused_with_how_to_convert_it():
    with pytest.raises(ScriptError, match=r'version "6\.6"'):
        parse(Step("s", '(0010,0010) := "x"\n'))


@pytest.mark.parametrize("other", [{"project": "P2"}, {"subject": None}, {"steps": (Step("s", "b"),)}, {"keep": (1,)},
                                   {"steps": (Step("s", "a", "l"),)}, {"headers": ((1, "x"),)}, {"search": (1,)}])
def test_whatever_decides_on_the_result_makes_another_recipe(other):
    recipe = Recipe((Step("s", "a"),), (), "P1", "S1", "E1", (), ())
    assert recipe.hash == Recipe((Step("s", "a"),), (), "P1", "S1", "E1", (), ()).hash
    assert replace(recipe, **other).hash != recipe.hash
