from __future__ import annotations

import pytest
import yaml

from tests.repo.variables import PROJECT, ROLES

PLAYBOOKS = sorted([*PROJECT.glob("playbooks/*.yml"), *PROJECT.glob("molecule/*/*.yml")])
PLAYS = [pytest.param(play, id=f"{path.stem}: {play['name']}") for path in PLAYBOOKS if path.name != "molecule.yml"
         for play in yaml.safe_load(path.read_text()) if "hosts" in play]  # what is imported is there by itself


@pytest.mark.parametrize("play", PLAYS)
def test_fails_fast(play):
    """A play that goes on after a failure leaves boxes that are neither old nor new."""
    assert play.get("any_errors_fatal") is True or play.get("max_fail_percentage") == 0


def test_the_fleet_is_updated_a_few_at_a_time():
    """A release that is bad in a way nobody thought of may reach one box, never all of them."""
    plays = yaml.safe_load((PROJECT / "playbooks/update.yml").read_text())
    [update] = [play for play in plays if "serial" in play]
    assert update["hosts"].startswith("relays:&"), "the first one is the inventory's first, not who answers first"
    assert update["serial"] == [1, "25%"]
    assert update["max_fail_percentage"] == 0


def test_site_has_every_role():
    """The order of roles is that of the box: the firewall is up before anything listens."""
    roles = [entry["role"] for play in yaml.safe_load((PROJECT / "playbooks/site.yml").read_text())
             for entry in play["roles"]]
    assert sorted(roles) == [role.name for role in ROLES]
    assert roles.index("firewall") < roles.index("relay_agent")


def test_tags_are_names_of_roles():
    """Anything else has to be remembered."""
    for play in yaml.safe_load((PROJECT / "playbooks/site.yml").read_text()):
        assert all(entry["tags"] == entry["role"] for entry in play["roles"])
