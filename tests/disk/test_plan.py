from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_disk import conf, plan
from relay_disk.disks import Part
from relay_disk.run import Refused

from tests.disk.machines import GIB, disk, foreign, nuc, of_relay, relay_supermicro, supermicro

OLD, NEW = "0123abcd", "feedbeef"


def decided(disks, **words):
    return plan.decide(disks, conf.Conf(**words), lambda: NEW)


def refused(disks, **words):
    with pytest.raises(Refused) as caught:
        decided(disks, **words)
    return str(caught.value)


def test_one_ssd_is_a_nuc():
    made = decided(nuc())
    assert (made.profile, made.relay, made.kept) == ("nuc", NEW, False)
    assert made.vdevs == ["/dev/disk/by-id/ata-Model_NVME1-part3"]
    assert [(role, size) for role, size, _ in plan.slices(made, made.system[0])] == [
        ("installing", 512), ("root", 24 * 1024), ("pool", 0)]


def test_two_ssds_and_four_disks_are_a_supermicro():
    """In whatever order the kernel found them."""
    for order in (supermicro(), supermicro()[::-1], supermicro()[3:] + supermicro()[:3]):
        made = decided(order)
        assert made.profile == "supermicro"
        by_id = "/dev/disk/by-id/ata-Model_"
        assert made.vdevs == ["mirror", f"{by_id}HDD1-part1", f"{by_id}HDD2-part1",
                              "mirror", f"{by_id}HDD3-part1", f"{by_id}HDD4-part1",
                              "log", "mirror", f"{by_id}SSD1-part3", f"{by_id}SSD2-part3",
                              "cache", f"{by_id}SSD1-part4", f"{by_id}SSD2-part4"]


def test_mirrors_pair_disks_of_one_size():
    disks = supermicro()[:2] + [disk(f"D{n}", rotating=True, size=size * 1000 * GIB)
                                for n, size in enumerate((8, 4, 8, 4))]
    words = decided(disks).vdevs
    assert [word[-8:-6] for word in words[:6] if word != "mirror"] == ["D1", "D3", "D0", "D2"]


@pytest.mark.parametrize("ssds, hdds", [pair for pair in itertools.product(range(4), range(6))
                                        if pair not in ((1, 0), (2, 4))])
def test_any_other_machine_is_refused(ssds, hdds):
    disks = [disk(f"S{n}") for n in range(ssds)] + [disk(f"H{n}", rotating=True) for n in range(hdds)]
    words = refused(disks)
    assert "two SSDs and four rotating disks (supermicro)" in words
    assert "no disk was changed" in words
    assert all(one.serial in words for one in disks)


@pytest.mark.parametrize("disks, built", [(nuc, "supermicro"), (supermicro, "nuc")])
def test_stick_for_another_profile(disks, built):
    assert f"this stick was built for {built}" in refused(disks(), profile=built)


@pytest.mark.parametrize("more", [{"transport": "usb"}, {"removable": True}, {"read_only": True}, {"size": GIB // 2},
                                  {"parts": [Part(2, "/dev/x2", "relay-image", GIB, "squashfs")]}])
def test_sticks_and_the_like_are_no_disks(more):
    """Neither counted nor touched, whatever is on them."""
    made = decided([*nuc(), disk("OTHER", **more)])
    assert [one.serial for one in made.disks] == ["NVME1"]
    assert "no SSD" in refused([disk("OTHER", **more)])


@pytest.mark.parametrize("strange", [
    foreign("D"), foreign("D", "ext4"), foreign("D", ""), disk("D", empty=False), disk("D", empty=False, table="dos"),
    disk("D", empty=False, content="crypto_LUKS"), of_relay("D", OLD, "nuc"), of_relay("D", OLD, "nuc", boot="keeping"),
    disk("D", parts=[*of_relay("D", OLD, "nuc", boot="installing").parts, *foreign("D").parts])])
def test_what_others_put_there_stays(strange):
    """Only its own serial number opens it: no other word does."""
    for words in ({}, {"profile": "nuc"}, {"retired": frozenset([NEW])}):
        assert "no disk was changed" in refused([strange], **words)
    made = decided([strange], wipe=frozenset(["D"]))
    assert made.why == {"D": "wipe names it"}


def test_refusal_says_the_word():
    assert "wipe = D" in refused([foreign("D")])
    words = refused([of_relay("D", OLD, "nuc")])
    assert f"keep = {OLD}" in words and f"retired = {OLD}" in words and "take the stick out" in words


def test_every_fault_is_told_at_once():
    words = refused([foreign("SSD1"), disk("SSD2"), *(disk(f"H{n}", rotating=True, empty=n > 1) for n in range(4))])
    assert all(f"wipe = {serial}" in words for serial in ("SSD1", "H0", "H1"))
    assert "wipe = SSD2" not in words


def test_wipe_of_a_disk_that_is_not_here():
    """A slip of the pen must not go unnoticed."""
    assert "serial number D1, which no disk here has" in refused([disk("D7")], wipe=frozenset(["D1"]))


def test_disks_that_cannot_be_told_apart():
    assert "2 disks have the serial number S" in refused([disk("S"), disk("S")])
    assert "has no serial number" in refused([disk("")])


def test_disk_in_use():
    assert "is in use: /srv" in refused([disk("D", used=("/srv",))], wipe=frozenset(["D"]))


def test_retired():
    old = relay_supermicro(OLD)
    assert decided(old, retired=frozenset([OLD])).relay == NEW
    assert set(decided(old, retired=frozenset([OLD])).why.values()) == {"listed as retired"}
    assert "SSD1" in refused(old, retired=frozenset([NEW]))


def test_retired_box_with_a_foreign_disk():
    disks = [*relay_supermicro(OLD)[:5], foreign("HDD4", rotating=True)]
    words = refused(disks, retired=frozenset([OLD]))
    assert "wipe = HDD4" in words and "wipe = HDD3" not in words


def test_begun_and_not_finished_begins_again():
    """A power cut after any number of disks were written, in the order in which they are."""
    for count in range(1, 7):
        disks = [*relay_supermicro(OLD, ("installing", "installing"))[:count], *supermicro()[count:]]
        made = decided(disks)
        assert made.relay == OLD, "a new id would make the disks that are not written yet somebody else's"
        assert set(made.why.values()) <= {"begun and not finished", "free"}


@pytest.mark.parametrize("boot", [("esp", "installing"), ("installing", "esp"), ("esp", "esp"), ("keeping", "esp"),
                                  ("keeping", "installing")])
def test_finished_on_one_disk_is_finished(boot):
    """That box starts and may have taken data."""
    assert "belongs to relay" in refused(relay_supermicro(OLD, boot))


def test_unfinished_of_one_frees_no_disk_of_another():
    disks = [*relay_supermicro(NEW, ("installing", "installing"))[:2],
             *(of_relay(f"HDD{n}", OLD if n == 3 else NEW, "data") for n in range(1, 5))]
    words = refused(disks)
    assert "HDD3" in words.split("disks of this machine")[0] and "HDD1" not in words.split("disks of this machine")[0]


def test_data_disks_alone_are_not_free():
    """Both SSDs failed and were replaced by new ones: the pool is still there."""
    disks = [*supermicro()[:2], *relay_supermicro(OLD)[2:]]
    assert f"retired = {OLD}" in refused(disks)


@pytest.mark.parametrize("boot", ["esp", "keeping"])
def test_keep(boot):
    made = decided([of_relay("D", OLD, "nuc", boot=boot)], keep=OLD)
    assert (made.kept, made.relay, made.profile) == (True, OLD, "nuc")
    made = decided(relay_supermicro(OLD, (boot, boot)), keep=OLD)
    assert (made.kept, made.relay, made.profile) == (True, OLD, "supermicro")
    assert made.partition(made.system[1], "root") == "/dev/disk/by-id/ata-Model_SSD2-part2"


@pytest.mark.parametrize("disks", [
    nuc(), [foreign("D")], [of_relay("D", NEW, "nuc")], [of_relay("D", OLD, "data")], relay_supermicro(NEW),
    [of_relay("D", OLD, "nuc", boot="installing")],
    [*relay_supermicro(OLD)[:5], disk("HDD4", rotating=True)],
    [*relay_supermicro(OLD)[:5], of_relay("X", NEW, "data")]])
def test_keep_what_is_not_there(disks):
    """Nothing is made anew instead, not even with a word for it."""
    for words in ({}, {"wipe": frozenset(one.serial for one in disks)}, {"retired": frozenset([OLD, NEW])}):
        assert "no disk was changed" in refused(disks, keep=OLD, **words)


@pytest.mark.parametrize("boxes, box, chosen", [
    ({}, "", ""), ({"any": ""}, "", "any"), ({"a": "nuc"}, "", "a"), ({"a": "nuc", "b": "supermicro"}, "", "a"),
    ({"a": "nuc", "b": "nuc"}, "b", "b"), ({"a": "nuc", "b": ""}, "b", "b")])
def test_box(boxes, box, chosen):
    assert plan.choose(boxes, decided(nuc(), box=box)) == chosen


@pytest.mark.parametrize("boxes, box, words", [
    ({"a": "supermicro"}, "", "this stick was built for a"), ({"a": "nuc", "b": "nuc"}, "", "say which: box = a"),
    ({"a": "nuc"}, "c", "the stick has a"), ({"a": "nuc", "b": "supermicro"}, "b", "built for b"), ({}, "c", "none")])
def test_no_box(boxes, box, words):
    """A box never gets the settings, and with them the name and the destinations, of another."""
    with pytest.raises(Refused, match=words):
        plan.choose(boxes, decided(nuc(), box=box))


def test_too_small():
    assert "too small" in refused(nuc(size=20 * GIB))
    assert decided(nuc(size=20 * GIB), root=8 * GIB)


def test_table():
    made = decided(supermicro())
    assert plan.table(made.relay, plan.slices(made, made.system[0])) == (
        "label: gpt\n"
        f'size=512MiB, type={plan.ESP}, name="relay-feedbeef-installing"\n'
        f'size=24576MiB, type={plan.RAID}, name="relay-feedbeef-root"\n'
        f'size=8192MiB, type={plan.ZFS}, name="relay-feedbeef-log"\n'
        f'type={plan.ZFS}, name="relay-feedbeef-cache"\n')
    assert plan.table(made.relay, plan.slices(made, made.data[0])) == (
        f'label: gpt\nsize={3999 * 1024}MiB, type={plan.ZFS}, name="relay-feedbeef-pool"\n')


@given(st.integers(2**30, 2**45))
def test_a_disk_of_the_same_nominal_size_fits(size):
    """Makers differ by some MiB, and the table needs room at both ends."""
    left = size - (plan.rounded(size) << 20)
    assert left >= (GIB if size > 100 * GIB else 16 * 2**20)
    assert left <= max(2 * GIB, 64 * 2**20)


states = st.sampled_from(["blank", "data", "ntfs", "old", "new", "begun", "kept"])
ids = st.sampled_from([OLD, NEW, "0badcafe"])


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.lists(states, min_size=6, max_size=6), st.sets(st.sampled_from(["SSD1", "SSD2", "HDD1", "HDD4"])),
       st.sets(ids), st.sampled_from(["", OLD]))
def test_never_destroys_what_we_did_not_put_there(found, wipe, retired, keep):
    """The rule itself, for every mixture of disks and words."""
    def one(serial, state):
        kind = "supermicro" if serial.startswith("SSD") else "data"
        rotating = kind == "data"
        if state in ("blank", "data"):
            return disk(serial, rotating=rotating, empty=state == "blank")
        if state == "ntfs":
            return foreign(serial, rotating=rotating)
        relay = {"old": OLD, "new": NEW, "begun": OLD, "kept": OLD}[state]
        boot = {"begun": "installing", "kept": "keeping"}.get(state, "esp")
        return of_relay(serial, relay, kind, boot=boot)

    disks = [one(serial, state) for serial, state in zip(["SSD1", "SSD2", "HDD1", "HDD2", "HDD3", "HDD4"], found,
                                                          strict=True)]
    try:
        made = decided(disks, wipe=frozenset(wipe), retired=frozenset(retired), keep=keep)
    except Refused:
        return
    if made.kept:
        assert {d.relay for d in disks} == {OLD}
        assert all(d.relay == OLD for d in made.disks)
        return
    ours = {state for d, state in zip(disks, found, strict=True) if d.relay == OLD and d.part("pool") is None}
    for d, state in zip(disks, found, strict=True):
        free = state == "blank" or d.serial in wipe or (d.relay and d.relay in retired)
        begun = d.relay == OLD and ours == {"begun"}
        assert free or begun, (d.serial, state)
