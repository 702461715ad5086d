from __future__ import annotations

import pytest
from relay_disk import conf
from relay_disk.run import Refused


def test_as_people_write_it():
    """A byte order mark, line ends of Windows, comments, capitals: whatever editor was at hand."""
    told = conf.read("\ufeff# relay\r\nProfile = nuc\r\nwipe = S1, S2 S3 # the old ones\r\n\r\nroot=5 GiB\r\n"
                     "recovery = age1abc, age1def\r\ntpm = optional\r\ndata_share = 40\r\n")
    assert told == conf.Conf(profile="nuc", wipe=frozenset(["S1", "S2", "S3"]), root=5 * 2**30, tpm=False,
                             recovery=("age1abc", "age1def"), data_share=40)


def test_nothing_said():
    assert conf.read("") == conf.Conf()
    assert conf.Conf().tpm, "a box without a TPM has to be asked for"
    assert not conf.Conf().wipe and not conf.Conf().retired


@pytest.mark.parametrize("line, words", [
    ("wip = S1", "not understood"), ("wipe", "not understood"), ("wipe = 1\nwipe = 2", "line 2: wipe is said twice"),
    ("profile = server", "nuc or supermicro"), ("tpm = no", "required"), ("root = 5", "24 GiB"),
    ("root = 5 GB", "24 GiB"),
    ("keep = relay-0001", "eight hexadecimal digits"), ("data_share = 99", "per cent"), ("data_share = x", "per cent"),
    ("data_share = 60\nkspace_share = 60", "must leave 5 per cent")])
def test_what_cannot_be_understood_is_no_permission(line, words):
    with pytest.raises(Refused, match=words):
        conf.read(line)
