"""What box-health makes of what drives say (laid out as smartctl 7.4 does); the lab has none."""
from __future__ import annotations

import importlib.util
import json
import sys
from datetime import UTC, datetime, timedelta
from importlib.machinery import SourceFileLoader

import pytest
import yaml

from tests.repo.variables import PROJECT

LOADER = SourceFileLoader("box_health", str(PROJECT / "roles/health/files/box-health"))
health = importlib.util.module_from_spec(importlib.util.spec_from_loader("box_health", LOADER))
YEAR = 8766


@pytest.fixture(autouse=True, scope="module")
def no_cache():
    """What is compiled there would be taken for a part of the role."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        LOADER.exec_module(health)


@pytest.fixture
def limits():
    defaults = yaml.safe_load((PROJECT / "roles/health/defaults/main.yml").read_text())
    return {name.removeprefix("health_"): value for name, value in defaults.items()}


def nvme(percent):
    return {"nvme_smart_health_information_log": {"percentage_used": percent}}


def statistics(percent):
    return {"ata_device_statistics": {"pages": [{"number": 7, "table": [
        {"offset": 8, "name": "Percentage Used Endurance Indicator", "value": percent}]}]}}


def attribute(number, name, value):
    return {"ata_smart_attributes": {"table": [{"id": number, "name": name, "value": value}]}}


@pytest.mark.parametrize(("report", "percent"), [
    (nvme(7), 7), (nvme(0), 0), (statistics(12), 12),
    (attribute(231, "SSD_Life_Left", 88), 12),
    (attribute(177, "Wear_Leveling_Count", 95), 5),
    (attribute(202, "Percent_Lifetime_Remain", 40), 60),
    (attribute(233, "Media_Wearout_Indicator", 100), 0),
    (attribute(233, "NAND_GB_Written_TLC", 100), None),  # the same number, another meaning
    ({}, None),
])
def test_wear_as_drives_tell_it(report, percent):
    """Each kind of drive has its own way, and some have none: then nothing is claimed."""
    assert health.worn(report) == percent


def drive(percent, years, **more):
    hours = round(years * YEAR)
    return {"device": "/dev/nvme0", "model": "M", "serial": "S", "healthy": True, "worn_percent": percent,
            "wears_out": health.wears_out(percent, hours), "hours": hours, "celsius": 40} | more


@pytest.mark.parametrize(("percent", "years", "told"), [
    (15, 1, False),  # lasts six years and a half
    (60, 3.5, False),  # on the way to five years and ten months: not yet
    (80, 4.5, True),
    (75, 2.5, True),  # worn out in ten months: the rate is told of before the level is reached
    (1, 0.1, False),  # too early to tell
    (0, 3, False),
    (120, 6, True),
])
def test_worn_drive_is_told_in_time(limits, percent, years, told):
    """A NUC has one SSD that is expected to last five to seven years: another has to be there before."""
    assert bool(list(health.judge_drives([drive(percent, years)], limits))) is told


def test_day_of_the_end():
    """At the rate until now: a quarter in one year leaves three."""
    expected = datetime.now(UTC) + timedelta(days=3 * 365.25)
    assert abs(datetime.fromisoformat(health.wears_out(25, YEAR)).replace(tzinfo=UTC) - expected) < timedelta(days=2)


def test_failing_and_hot(limits):
    """What the drive says of itself."""
    told = dict(health.judge_drives([drive(1, 1, healthy=False, celsius=70)], limits))
    assert any("replace it now" in text for text in told.values())
    assert any("70 degrees" in text for text in told.values())


def test_limits_are_those_of_the_role(limits):
    """The file that the role writes has every limit that is asked for."""
    template = (PROJECT / "roles/health/templates/box-health.json.j2").read_text()
    assert {line.split('"')[1] for line in template.splitlines() if '"' in line} == {*limits, "services"}
    assert json.dumps(limits)
