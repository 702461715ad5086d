from __future__ import annotations

import re

import pytest
import yaml

from tests.repo.variables import PROJECT, ROLES, page, spec

each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def defaults(role):
    file = role / "defaults/main.yml"
    return yaml.safe_load(file.read_text()) if file.exists() else {}


@each_role
def test_specs_name_every_variable(role):
    """A variable that no spec names is never checked, and a typing error in its name never found."""
    text = ""
    for path in role.rglob("*"):
        if path.suffix == ".j2":  # other programs have settings whose names begin as ours
            text += "\n".join(re.findall(r"{[{%](.*?)[%}]}", path.read_text()))
        elif path.is_file() and path.parent.name != "meta":
            text += path.read_text()
    used = set(re.findall(rf"(?<![\w/.-])({role.name}_[a-z_]+)", text))
    assert used | set(defaults(role)) <= set(spec(role)["options"])


@each_role
def test_specs_agree_with_defaults(role):
    """The page of variables says what happens when nothing is said."""
    for name, option in spec(role)["options"].items():
        assert option.get("required", False) != (name in defaults(role)), name
        default = defaults(role).get(name)
        if "default" in option and "{{" not in str(default):
            assert option["default"] == default, name


@each_role
def test_specs_describe_everything(role):
    """Also the keys of what has keys; secrets are marked, so that no failure prints them."""
    def walk(options):
        for name, option in options.items():
            assert option.get("description"), name
            assert option.get("type"), name
            assert bool(option.get("no_log")) == bool(re.search(r"password|credentials", name)), name
            walk(option.get("options", {}))
    walk(spec(role)["options"])


@each_role
def test_nothing_empty(role):
    """What is there is there for something."""
    for path in role.rglob("*"):
        if path.name == "__pycache__":  # Python's, of a module that a test has imported
            continue
        assert any(path.iterdir()) if path.is_dir() else path.stat().st_size, path


def test_page_of_variables_is_up_to_date():
    """It is made from the specs: make docs."""
    assert (PROJECT / "docs/variables.md").read_text() == page() + "\n"
