"""Settings of raw data: what is wrong is said with key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay_agent.config import ConfigError, load
from tests.kspace.path import settings

WRONG = {
    "a kind of field": (settings(raw='keep = ["name"]'), ("keep", "name", "age")),
    "where other formats go": (settings(raw='opaque = ["ge/.*"]'), ("opaque", "(?P<session>")),
    "a protocol": (settings(raw='protocols = ["t1("]'), ("protocols", "t1(", "regular expression")),
    "what to do without a match": (settings(raw='unmatched = "drop"'), ("unmatched", "drop", "keep")),
    "less room than DICOM": (settings().replace('reserve = "2 MB"', 'reserve = "1 MB"'), ("kspace.reserve", "receive")),
    "a receiver": (settings(source='receivers = ["PET"]'), ("receivers", "PET", "[[receiver]]")),
    "two of a name": (settings() + '[[kspace.source]]\nname = "prisma"\n', ("kspace.source", "prisma", "twice")),
    "windows": (settings().replace('.org"', '.org"\nwindows = [{ start = "18:00", end = "06:00" }]\n'
                                   '[destination.kspace]\nwindows = [{ start = "06:00", end = "18:00" }]'),
                ("destination", "windows and kspace.windows", "overlap")),
    "no XNAT": (settings().replace('url = "https://xnat.example.org"', 'kind = "dicom"\nhost = "h"\nport = 104\n'
                                   'ae_title = "A"'), ("route all", "kspace", "xnat")),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name: str, tmp_path: Path) -> None:
    text, words = WRONG[name]
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert [word for word in words if word not in str(caught.value)] == []
