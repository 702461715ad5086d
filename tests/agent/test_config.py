"""The configuration: what is wrong is said with key, value and remedy; the example holds everything and works."""

from __future__ import annotations

import re
import tomllib
from datetime import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_agent import config, config_text
from relay_agent.config import Config, ConfigError
from relay_agent.config_destinations import DICOM, XNAT, DICOMweb

RECEIVER = '[[receiver]]\nae_title = "RELAY"\nallow = ["*"]\n'
DESTINATION = '[[destination]]\nname = "central"\nurl = "https://xnat.example.org"\n'
ROUTE = '[[route]]\nname = "all"\ndestinations = ["central"]\n'
WORKING = RECEIVER + DESTINATION + ROUTE


def load(folder: Path, text: str) -> Config:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return config.load(file)


# The text, and what the one line about it has: key, value, what is expected or an example.
FINDINGS = {
    "missing key": ('[[receiver]]\nae_title = "RELAY"\n', ("receiver[1].allow is missing", "Who may call", '"CTSCAN"')),
    "no receiver": (DESTINATION, ("receiver is missing", "[[receiver]]")),
    "receiver without entries": ("receiver = []\n", ("receiver = []", "at least one", "[[receiver]]")),
    "unknown key": (RECEIVER + 'colour = "red"\n', ("receiver[1].colour", "not a setting", "example-config")),
    "unknown table": (RECEIVER + "[colours]\nred = 1\n", ("colours", "not a setting", "example-config")),
    "text for a number": (RECEIVER + 'port = "DICOM"\n', ("receiver[1].port", '"DICOM"', "integer", "TCP port")),
    "list for a number": (RECEIVER + "port = [1]\n", ("receiver[1].port", "[1]", "integer", "TCP port")),
    "text for a list": ('[[receiver]]\nae_title = "R"\nallow = "*"\n', ("receiver[1].allow", '"*"', "list", "Example")),
    "number for a table": ("stage = 3\n" + RECEIVER, ("stage = 3", "table")),
    "text for a flag": (WORKING + 'review = "maybe"\n', ("route[1].review", '"maybe"', "boolean", "Hold each session")),
    "port out of range": (RECEIVER + "port = 70000\n", ("receiver[1].port", "70000", "65535")),
    "long AE title": (RECEIVER.replace("RELAY", "A" * 17), ("receiver[1].ae_title", "A" * 17, "1 to 16", '"RELAY"')),
    "AE title with a backslash": (RECEIVER.replace("RELAY", "A\\\\B"), ("receiver[1].ae_title", "backslash")),
    "empty AE title": (RECEIVER.replace("RELAY", " "), ("receiver[1].ae_title", '" "', "1 to 16")),
    "bad network": (RECEIVER.replace('"*"', '"*", "MR1@10.0.0.0/40"'),
                    ("receiver[1].allow[2]", "MR1@10.0.0.0/40", "network", "Example")),
    "bad address": (RECEIVER.replace("*", "10.0.0.300"), ("receiver[1].allow[1]", "10.0.0.300", "Example")),
    "host name as a caller": (RECEIVER.replace("*", "MR1@scanner"), ("receiver[1].allow[1]", "scanner", "Example")),
    "unknown destination": (RECEIVER + DESTINATION + ROUTE.replace("central", "centrall"),
                            ("route all", "destinations", "centrall", "add a [[destination]]", "central")),
    "unknown receiver": (WORKING + 'receiver = ["RELAI"]\n', ("route all", "receiver", "RELAI", "[[receiver]]")),
    "two destinations of a name": (RECEIVER + 2 * DESTINATION, ("destination", "central", "twice", "its own name")),
    "two routes of a name": (WORKING + ROUTE, ("route", "all", "twice", "its own name")),
    "two receivers of a folder": (RECEIVER.replace("RELAY", "A B") + RECEIVER.replace("RELAY", "A_B"),
                                  ("receiver", "A_B", "twice")),
    "one port with and without TLS": (
        RECEIVER + RECEIVER.replace("RELAY", "B") + '[receiver.tls]\ncertificate = "/c"\nkey = "/k"\n',
        ("receiver B", "11112", "another port")),
    "bad regular expression": (WORKING + 'tags = { "0008,1030" = "BRAIN(" }\n',
                               ("route[1].tags.0008,1030", '"BRAIN("', "regular expression", "subpattern")),
    "bad tag": (WORKING + 'tags = { "0008" = "BRAIN" }\n', ("route[1].tags", '"0008"', '"gggg,eeee"')),
    "bad routing rule": (RECEIVER + '[identify]\nsubject_rules = ["(0010,0010):(.*)", "(0010,0010):(.*"]\n',
                         ("identify", "subject rules, line 2", "close it")),
    "bad duration": (RECEIVER + '[stage]\nquiet = "5 minutes"\n', ("stage.quiet", '"5 minutes"', '"5 min"')),
    "duration without a unit": (RECEIVER + "[stage]\nquiet = 5\n", ("stage.quiet", " 5:", '"5 min"')),
    "bad size": (RECEIVER + '[receive]\nreserve = "5 Gb"\n', ("receive.reserve", '"5 Gb"', '"5 GiB"')),
    "bad rate": (WORKING.replace("[[route]]", 'bandwidth = "24 Mb"\n[[route]]'),
                 ("destination[1].bandwidth", '"24 Mb"', '"24 Mbit/s"')),
    "no bandwidth at all": (RECEIVER + DESTINATION + 'bandwidth = "0 Mbit/s"\n', ("destination[1].bandwidth", "0")),
    "no pause at all": (RECEIVER + DESTINATION + 'retry_first = "0 s"\n', ("destination[1].retry_first", "0")),
    "no time to answer": (RECEIVER + 'idle_timeout = "0 s"\n', ("receiver[1].idle_timeout", "0")),
    "tiny PDU": (RECEIVER + '[receive]\nmax_pdu = "100 B"\n', ("receive.max_pdu", "100", "4096")),
    "commitment without a port": (RECEIVER + 'commitment_to = ["MR1@192.0.2.10"]\n',
                                  ("receiver[1].commitment_to[1]", "MR1@192.0.2.10", '"AE@host:port"')),
    "commitment to a bad AE title": (RECEIVER + 'commitment_to = ["@192.0.2.10:104"]\n',
                                     ("receiver[1].commitment_to[1]", "@192.0.2.10:104", "1 to 16")),
    "unknown kind": (RECEIVER + '[[destination]]\nname = "x"\nkind = "ftp"\n',
                     ("destination[1].kind", '"ftp"', '"xnat", "dicomweb", "dicom"')),
    "longest before quiet": (RECEIVER + '[stage]\nquiet = "2 h"\nlongest = "1 h"\n',
                             ("stage", "longest is shorter than quiet")),
    "proxy without a scheme": (RECEIVER + DESTINATION + 'proxy = "proxy:3128"\n',
                               ("destination[1].proxy", '"proxy:3128"', '"http://proxy.example.org:3128"')),
    "URL without a scheme": (RECEIVER + DESTINATION.replace("https://", ""),
                             ("destination[1].url", '"xnat.example.org"', '"https://xnat.example.org"')),
    "value of another kind": (
        RECEIVER + '[[destination]]\nname = "p"\nkind = "dicom"\nhost = "h"\nport = 1\nae_title = "P"\nverify = "no"\n',
        ("destination[1].verify", '"no"', "'find' or 'status'", "C-FIND")),
    "window that never opens": (
        RECEIVER + DESTINATION + '[[destination.windows]]\nstart = "06:00"\nend = "06:00"\n',
        ("destination[1].windows[1]", "06:00", "always")),
    "hour that does not exist": (
        RECEIVER + DESTINATION + '[[destination.windows]]\nstart = "25:00"\nend = "06:00"\n',
        ("destination[1].windows[1].start", '"25:00"', '"18:00"')),
    "unknown level": ('log_level = "loud"\n' + RECEIVER, ("log_level", '"loud"', "'debug', 'info', 'warning'")),
    "name with a slash": ('name = "a/b"\n' + RECEIVER, ("name", '"a/b"', "letters, digits")),
    "name above the folder": (RECEIVER + DESTINATION.replace("central", ".."),
                              ("destination[1].name", '".."', "letters")),
    "label XNAT would refuse": (WORKING + 'assign_project = "my project"\n',
                                ("route[1].assign_project", '"my project"', '"P1"')),
    "not TOML": ("name = box\n", ("not TOML", "line 1, column 8", "quotes", "example-config")),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_one_line_says_what_is_wrong_and_what_to_do(tmp_path: Path, case: str) -> None:
    text, words = FINDINGS[case]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.toml")) and "\n" not in message
    assert [word for word in words if word not in message] == []


def test_all_findings_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, 'log_level = "loud"\n' + RECEIVER + 'port = 0.5\n[stage]\nquiet = "1 year"\n')
    found = sorted(line.split(": ")[1].split(" ")[0] for line in str(caught.value).splitlines())
    assert found == ["log_level", "receiver[1].port", "stage.quiet"]


def test_a_missing_file_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml is not there\. Write one: relay-agent example-config"):
        config.load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "Ä"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "latin.toml")


def test_a_secret_that_was_written_into_the_configuration_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never write the secret itself") as caught:
        load(tmp_path, RECEIVER + DESTINATION + 'credential = "relay:s3cret"\n')
    assert "destination[1].credential" in str(caught.value) and "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match="without a user") as caught:
        load(tmp_path, RECEIVER + DESTINATION.replace("https://", "https://relay:s3cret@"))
    assert "destination[1].url" in str(caught.value) and "s3cret" not in str(caught.value)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    found = load(tmp_path, WORKING)
    assert (found.name, found.data, found.receiver[0].port) == ("relay", Path("/var/lib/relay-agent"), 11112)
    assert (found.stage.quiet, found.stage.longest, found.purge.retention) == (300, 43200, 604800)
    assert isinstance(found.destination_named("central"), XNAT)
    with pytest.raises(KeyError):
        found.destination_named("elsewhere")


@pytest.mark.parametrize(("kind", "more", "model"), [
    ("", 'url = "https://x"', XNAT), ("xnat", 'url = "https://x"', XNAT), ("dicomweb", 'url = "https://x"', DICOMweb),
    ("dicom", 'host = "h"\nport = 104\nae_title = "PACS"', DICOM)])
def test_kinds_of_destinations(tmp_path: Path, kind: str, more: str, model: type) -> None:
    line = f'kind = "{kind}"\n' if kind else ""
    assert type(load(tmp_path, f'{RECEIVER}[[destination]]\nname = "x"\n{line}{more}\n').destination[0]) is model


def test_quantities_tags_titles_and_times_are_read(tmp_path: Path) -> None:
    found = load(tmp_path, WORKING.replace("[[route]]", """bandwidth = "24 Mbit/s"
        [[destination.windows]]
        start = "18:00"
        end = 06:00:00
        [[route]]""").replace('"RELAY"', '" RELAY "') + 'tags = { "(0008,103e)" = "T1.*", 00181030 = ".*" }\n')
    window = found.destination[0].windows[0]
    assert found.destination[0].bandwidth == 3_000_000
    assert (window.start, window.end) == (time(18), time(6))
    assert found.route[0].tags == {"0008103E": "T1.*", "00181030": ".*"}
    assert found.receiver[0].ae_title == "RELAY"


@pytest.mark.parametrize("caller", ["MR1", "*", "10.0.0.0/8", "10.0.0.7", "fd00::/8", "MR1@10.0.0.0/8", "*@10.0.0.1",
                                    "@10.0.0.1", "MR 1@fd00::1", "ABC", " 10.0.0.0/8 "])
def test_callers_that_are_understood(tmp_path: Path, caller: str) -> None:
    assert load(tmp_path, RECEIVER.replace("*", caller)).receiver[0].allow == (caller.strip(),)


# The example


def lines_of_settings(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"(# )?([a-z_]+ = |\[)", line)]


def models(model: type[Any] = Config) -> dict[str, set[str]]:
    """Each table class with the settings that are not tables themselves, found without the code under test."""
    found: dict[str, set[str]] = {model.__name__: set()}
    for name, field in model.model_fields.items():
        inner = {cls for cls in _classes(field.annotation) if hasattr(cls, "model_fields")}
        if not inner:
            found[model.__name__].add(name)
        for cls in inner:
            found |= models(cls)
    return found


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        return [annotation]
    return [cls for part in getattr(annotation, "__args__", ()) for cls in _classes(part)]


def test_every_setting_of_every_table_is_in_the_example() -> None:
    tables: list[set[str]] = [set()]
    for line in lines_of_settings(config.example()):
        bare = line.removeprefix("# ")
        if bare.startswith("["):
            tables.append(set())
        else:
            tables[-1].add(bare.partition(" = ")[0])
    # Not by name: a destination's windows are there once for each kind.
    assert {frozenset(keys) for keys in tables} == {frozenset(keys) for keys in models().values()}


def test_every_setting_in_the_example_is_explained() -> None:
    lines = config.example().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"(# )?[a-z_]+ = ", line):
            assert re.fullmatch(r"# .*\.", lines[number - 1]), line


def test_the_example_works_as_it_is(tmp_path: Path) -> None:
    found = load(tmp_path, config.example())
    assert (found.receiver[0].ae_title, found.route[0].destinations) == ("RELAY", ("central",))
    assert [type(d) for d in found.destination] == [XNAT] and found.alert is None and found.receiver[0].tls is None


def everything() -> str:
    return "\n".join(line.removeprefix("# ") for line in lines_of_settings(config.example()))


def test_the_example_works_with_everything_switched_on(tmp_path: Path) -> None:
    found = load(tmp_path, everything())
    assert [type(d) for d in found.destination] == [XNAT, DICOMweb, DICOM]
    assert found.alert is not None and found.receiver[0].tls is not None and found.destination[2].windows
    assert found.identify.rules().project[0].tag == "00081030"


def test_commented_lines_without_an_example_show_the_default(tmp_path: Path) -> None:
    on, off = load(tmp_path, everything()), load(tmp_path, config.example())
    for table in ("receive", "stage", "purge"):
        assert getattr(on, table) == getattr(off, table)


@pytest.mark.slow
@given(st.recursive(st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab01,", min_size=1), inner)))
def test_values_are_written_as_toml_reads_them(value: Any) -> None:
    assert tomllib.loads(f"x = {config_text.toml(value)}") == {"x": value}


# Secrets


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("text", "found"), [
    ("relay:s3cret", ("relay", "s3cret")), ("relay:s3cret\n", ("relay", "s3cret")),
    ("relay:with:colons\nmore", ("relay", "with:colons")), (" relay:s \r\n", ("relay", "s"))])
def test_secrets_by_path_and_by_name(credentials: Path, text: str, found: tuple[str, str]) -> None:
    (credentials / "central").write_text(text, encoding="utf-8")
    assert config.secret(str(credentials / "central")) == config.secret("central") == found


@pytest.mark.parametrize("content", [b"", b"s3cret", b":s3cret", b"s3cret:", b"\ns3cret:x", b"s3cret\xff:x"])
def test_a_malformed_secret_is_described_and_not_shown(credentials: Path, content: bytes) -> None:
    (credentials / "central").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.secret("central")
    assert "user:password" in str(caught.value) and str(credentials / "central") in str(caught.value)
    assert "s3cret" not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_secret_that_is_not_there(credentials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"credential /.*/central cannot be read: .*0600"):
        config.secret("central")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="LoadCredential=central"):
        config.secret("central")
