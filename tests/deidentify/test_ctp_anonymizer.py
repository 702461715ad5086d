"""CTP's anonymiser scripts beyond the recorded cases."""

from __future__ import annotations

import pickle
from datetime import datetime

import pytest

from relay_agent.dataset import Dataset
from relay_agent.deidentify import ctp
from relay_agent.deidentify.script import Context, Failed, Rejected, ScriptError
from relay_agent.deidentify.uids import UIDs
from relay_agent.instance import File

EXPLICIT = "1.2.840.10008.1.2.1"


def made(**texts: str) -> File:
    """An object; ``x00100020="id"``. The VR of private ones is LO."""
    data = Dataset()
    values = {"x00080005": "ISO_IR 100", "x00080016": "1.2.840.10008.5.1.4.1.1.4", "x00080018": "1.2.3.4",
              "x0020000D": "1.2.3"} | texts
    for tag, text in sorted(values.items()):
        number = int(tag[1:], 16)
        data.put_text(number, text, "LO" if number >> 16 & 1 else None)
    return File(EXPLICIT, data)


def item(data: Dataset, tag: int, **texts: str) -> Dataset:
    inner = data.new_item()
    for name, text in texts.items():
        number = int(name[1:], 16)
        inner.put_text(number, text, "LO" if number >> 16 & 1 else None)
    data.put_items(tag, [*data.items(tag), inner])
    return inner


def context(**more: object) -> Context:
    return Context(UIDs(b"key", "P1"), now=datetime(2024, 1, 2, 3, 4, 5), **more)  # type: ignore[arg-type]


def xml(*lines: str) -> str:
    return "<script>\n" + "\n".join(lines) + "\n</script>"


def e(tag: str, command: str, name: str = "x") -> str:
    return f'<e en="T" t="{tag}" n="{name}">{command}</e>'


PRIVATE = '<r en="T" t="privategroups">r</r>'


def run(script: str, file: File, lookup: str | None = None) -> Dataset:
    ctp.parse(script, "site.script", lookup).apply(file, context())
    return file.dataset


def value(command: str, lookup: str | None = None, **texts: str) -> str | None:
    file = made(**{"x00104000": "old", **texts})
    return run(xml('<p t="P">5</p>', e("00104000", command)), file, lookup).text(0x00104000)


def test_what_a_value_holds_is_never_a_command() -> None:
    assert value("@contents(PatientID)", x00100020="@keep()") == "@keep()"
    assert value("@contents(PatientID)", x00100020="@remove()") == "@remove()"
    assert value("@contents(PatientID)", x00100020="@skip()") == "@skip()"


def test_a_table_may_hold_marks() -> None:
    assert value("@lookup(PatientID,a)", "a/1=@remove()", x00100020="1") is None
    assert value("@lookup(PatientID,a)", "a/1=@keep()", x00100020="1") == "old"
    assert value("@lookup(PatientID,a)", "a/1=@empty()", x00100020="1") == ""


def test_lookup() -> None:
    table = "a/1|2=pair\na/X=x\n"
    assert value("@lookup(PatientID|PatientSex,a)", table, x00100020="1", x00100040="2") == "pair"
    assert value('@lookup(PatientID,a,default,"none")', table, x00100020="9") == "none"
    assert value('@lookup(PatientID,a,ignore,"[0-9]")', table, x00100020="9") == "9"
    assert value("@lookup(PatientID,a,empty)", table, x00100020="9") == ""
    with pytest.raises(Failed, match="not in the lookup table"):
        value('@lookup(PatientID,a,ignore,"[A-Z]")', table, x00100020="9")
    with pytest.raises(Failed, match="no lookup table"):
        value("@lookup(PatientID,a)", None, x00100020="9")
    with pytest.raises(ScriptError, match="lookup table, line 2"):
        value("@lookup(PatientID,a)", "a/1=b\na/2=\\u12", x00100020="9")


@pytest.mark.parametrize(("command", "want"), [
    ("@initials(PatientName,1)", "KE"), ("@truncate(PatientID,-2)", "89"), ("@pathelement(PatientID,-1)", "6789"),
    ("@value(PatientSex)", ""), ("@time()", "030405"), ("@date(-)", "2024-01-02"), ("@param(@P)", "5"),
    ("@select(){root}{item}", "root"), ('@if(PatientID,matches,"A.*9"){yes}{no}', "yes"),
    ('@if(PatientID,matches,"A\\\\d+"){yes}{no}', "no"), ("@if(PatientID,greaterthan,5){a}", "a"),
    ("@if(PatientID,equals,@P){a}{b}", "b"), ('@contents(PatientID,"([A-Z])(\\\\d)","$2$1")', "1A23/6789"),
    ("@append(){more}", "old\\more"), ("a\\@b", "a@b"), ("@if(this,exists){@append(){n}}{}", "old\\n"),
])
def test_functions(command: str, want: str) -> None:
    assert value(command, x00100010="Doe^John", x00100020="A123/6789") == want


def test_encrypted_values_can_be_read_again() -> None:
    hidden = value('@encrypt(PatientName,"a key")', x00100010="Müller^Jürgen")
    assert hidden
    assert "M" not in hidden[:1]
    assert value('@decrypt(PatientName,"a key")', x00100010=hidden) == "Müller^Jürgen"
    with pytest.raises(Failed, match="decrypted"):
        value('@decrypt(PatientName,"another")', x00100010=hidden)


def test_integers_come_from_the_table_of_the_box() -> None:
    file = made(x00100020="A")
    script = ctp.parse(xml(e("00100020", "@integer(this,ptid,4)")), "s")
    script.apply(file, context(number=lambda kind, text: {("ptid", "A"): 7}[kind, text]))
    assert file.dataset.text(0x00100020) == "0007"
    with pytest.raises(Failed, match="table of numbers"):
        script.apply(made(x00100020="A"), context())


@pytest.mark.parametrize(("command", "want"), [
    ("@incrementdate(this,-31)", "20240229120000.5"), ("@incrementdate(this,99999999)", ""),
    ("@modifydate(this,*,14,1)", "20250201120000.5"), ("@modifydate(this,2023,2,29)", "20230301120000.5"),
    ("@incrementdate(StudyDate,1)", None), ("@incrementdate(PatientID,1)", ""), ("@modifydate(this,*,1)", ""),
])
def test_dates(command: str, want: str | None) -> None:
    file = made(x0008002A="20240331120000.5", x00100020="2024-03-31")
    assert run(xml(e("0008002A", command)), file).text(0x0008002A) == want


def test_numbers_are_read_as_java_writes_them_and_stored() -> None:
    file = made()
    file.dataset.put_numbers(0x00280010, "US", 512)
    file.dataset.put_numbers(0x00189073, "FD", 1e-5)
    file.dataset.put_numbers(0x00189087, "FD", 12345678.0)
    file.dataset.put_numbers(0x00181271, "FD", -0.1)
    script = xml(e("00104000", "@always()@contents(Rows) @contents(00189073) @contents(00189087) @contents(00181271)"),
                 e("00280010", "256"))
    data = run(script, file)
    assert data.text(0x00104000) == "512 1.0E-5 1.2345678E7 -0.1"
    assert data.numbers(0x00280010) == (256,)
    with pytest.raises(Failed, match=r"site.script line 2 \(0028,0010\): .*too large for its VR US"):
        run(xml(e("00280010", "65536")), file)


def test_commands_read_the_object_as_it_came() -> None:
    script = xml(e("00100020", "new"), e("00104000", "@contents(PatientID)"), e("00081140", "@process()"),
                 e("00081155", "9.9"), e("00321060", "@contents(RefImageSeq::RefSOPInstanceUID)"))
    file = made(x00100020="old", x00104000="c", x00321060="d")
    item(file.dataset, 0x00081140, x00081155="1.2")
    data = run(script, file)
    assert data.items(0x00081140)[0].text(0x00081155) == "9.9"
    assert (data.text(0x00100020), data.text(0x00104000), data.text(0x00321060)) == ("new", "old", "1.2")


def test_private_elements_in_items() -> None:
    file = made(x00290010="V", x00291001="keep")
    inner = item(file.dataset, 0x00081140, x00190010="V", x00191001="a", x00290010="W", x00290011="V", x00291001="w",
                 x00291101="k")
    deep = item(inner, 0x00081140, x00290010="V", x00291001="d")
    data = run(xml(e("0029[V]01", "@keep()"), PRIVATE), file)
    assert data.text(0x00291001) == "keep"
    assert [element.tag for element in inner] == [0x00081140, 0x00291101]
    assert [element.tag for element in deep] == [0x00291001]


def test_commands_for_private_elements_work_in_processed_items_by_their_creator_there() -> None:
    file = made(x00290010="V", x00291001="one")
    inner = item(file.dataset, 0x00081140, x00290010="W", x00290011="V", x00291001="w", x00291101="two")
    run(xml(e("0029[V]01", "@uppercase(this)"), e("00081140", "@process()"), PRIVATE), file)
    assert file.dataset.text(0x00291001) == "ONE"
    assert inner.text(0x00291101) == "TWO"
    assert len(inner) == 1


def test_safe_private_elements() -> None:
    file = made(x00430010="GEMS_PARM_01", x00431027="/1:1", x00431001="x", x00290010="V", x00291001="y")
    data = run(xml('<k en="T" t="safeprivateelements">k</k>', PRIVATE), file)
    assert [element.tag for element in data if element.tag >> 16 & 1] == [0x00290010, 0x00430010, 0x00431027]


def test_signatures_and_padding_behind_the_pixels_go() -> None:
    file = made()
    file.dataset.put(0x7FE00010, "OW", b"\0\0")
    item(file.dataset, 0xFFFAFFFA, x00100010="Signer")
    file.dataset.put(0xFFFCFFFC, "OB", b"\0\0")
    assert [element.tag for element in run(xml(), file)][-1] == 0x7FE00010


def test_group_lengths_go_since_they_would_be_wrong() -> None:
    file = made(x00100010="A")
    file.dataset.put_numbers(0x00100000, "UL", 10)
    assert 0x00100000 not in run(xml(e("00100010", "@empty()")), file)


def test_every_change_is_named_by_its_rule() -> None:
    file = made(x00100010="A", x00104000="c", x00290010="V")
    rules: dict[int, str] = {}
    now = context()
    file.dataset.watch = lambda _, tag: rules.update({tag: now.rule})
    ctp.parse(xml(e("00100010", "@empty()"), PRIVATE, e("00102180", "@always()x")), "site.script").apply(file, now)
    assert rules == {0x00100010: "site.script line 2 (0010,0010)", 0x00290010: "site.script line 3 privategroups",
                     0x00102180: "site.script line 4 (0010,2180)"}


def test_no_message_holds_a_value() -> None:
    for command in ("@contents(PatientID)", '@contents(PatientID,"S(.*)","$1")', "@lookup(PatientID,a)",
                    "@hashdate(PatientID,PatientID)x"):
        file = made(x00100020="Secret99", x00080020="20240101")
        with pytest.raises(Failed) as error:
            run(xml(e("00080020", command)), file)
        assert "ecret" not in str(error.value)
        assert error.value.rule == "site.script line 2 (0008,0020)"


@pytest.mark.parametrize(("tag", "text", "charset"), [("00100010", "山田", "ISO_IR 100"), ("00080080", "山", "")])
def test_a_text_that_the_character_set_lacks_fails(tag: str, text: str, charset: str) -> None:
    file = made(**{f"x{tag}": "a", "x00080005": charset})
    with pytest.raises(Failed, match="character set"):
        run(xml(e(tag, text)), file)


def test_a_value_that_is_no_text_in_its_character_set_fails() -> None:
    file = made(x00080005="ISO_IR 192", x00104000="c")
    file.dataset.put(0x00100010, "PN", b"\xff\xfe")
    with pytest.raises(Failed, match=r"\(0010,0010\) is no text"):
        run(xml(e("00104000", "@hash(PatientName)")), file)


def test_binary_values_are_not_read_as_text() -> None:
    file = made(x00104000="c")
    file.dataset.put(0x00420011, "OB", b"secret")
    with pytest.raises(Failed, match=r"\(0042,0011\) has binary content"):
        run(xml(e("00104000", "@contents(00420011)")), file)


def test_a_missing_character_set_is_latin_1() -> None:
    file = made(x00100010="a")
    file.dataset.remove(0x00080005)
    file.dataset.put(0x00100010, "PN", b"M\xfcller")
    data = run(xml(e("00104000", "@always()@contents(PatientName)")), file)
    assert (data.text(0x00080005), data.text(0x00104000)) == ("ISO_IR 100", "Müller")


def test_the_character_set_stays_where_a_text_needs_it() -> None:
    keep = xml(e("00100010", "@keep()"), e("00102180", "@always()@contents(PatientName)"),
               '<r en="T" t="unspecifiedelements"/>')
    data = run(keep, made(x00080005="ISO_IR 192", x00100010="山田"))
    assert (data.text(0x00100010), data.text(0x00102180)) == ("山田", "山田")
    data = run(keep, made(x00080005="\\ISO 2022 IR 87", x00100010="山田"))
    assert (data.text(0x00100010), data.text(0x00102180)) == ("山田", "山田")
    assert 0x00080005 not in run(keep, made(x00080005="ISO_IR 192", x00100010="Yamada"))


def test_quarantine_is_a_rejection() -> None:
    with pytest.raises(Rejected, match=r"site.script line 2 \(0010,0020\)"):
        run(xml(e("00100020", "@quarantine()")), made(x00100020="a"))


@pytest.mark.parametrize(("script", "message"), [
    ("<script>\n  <e en='T' t='00100010'>a<b/></e></script>", "line 2, column 27: no element is expected inside <e>"),
    ("<script>\n<x/></script>", "line 2, column 1: one of <p>, <e>, <k>, <r>"),
    ("<scripts/>", "line 1, column 1: the outermost"), ("<script>text</script>", "text is expected only inside"),
    ("<script><e en='true' t='00100010'/></script>", 'needs en="T"'),
    ("<script><e en='T' t='00100010' m='x'/></script>", "no attribute m"), ("<script><p>a</p></script>", "attribute t"),
    ("<script><k en='T' t='patient'/></script>", "a group to keep"),
    ("<script><r en='T' t='private'/></script>", "CTP can remove"),
    ("<!DOCTYPE script [<!ENTITY a 'b'>]><script>&a;</script>", "document type or entities"),
    ("<script>\n<e en='T' t='00100010'></script>", "line 2, column 26: the script is no well-formed XML"),
    (xml(e("00100010", "a", "One"), e("00100010", "b", "Two")), "line 3: .0010,0010. has a command in line 2"),
    (xml(e("7FE00010", "@remove()")), "never changes pixel data"), (xml(e("00000001", "x")), "no tag of a data set"),
    (xml(e("00100010", "@if(this,exists)yes")), "followed by"), (xml(e("00100010", "@if(this,exists){a} b")), "drops"),
    (xml(e("00100010", "@if(this,is){a}")), "@if knows"), (xml(e("00100010", "@hashuid(@NO,this)")), "no parameter NO"),
    (xml(e("00100010", "@hashuid(x,this)")), "root of a UID"), (xml(e("00100010", "@call(plugin)")), "plug-in"),
    (xml(e("00100010", '@contents(this,"[")')), "argument 2 of @contents"),
    (xml(e("00100010", "@contents(PatientsName)")), "did you mean PatientName"),
    (xml(e("00100010", '@if(this,contains,"a\\b"){x}')), "loses the backslash"),
    ("set.[0010,0010]Patient Name=@remove()", "line 1: key=value"), ("set.[0010,0010]=a\nfoo=1", "line 2: param.NAME"),
    ("set.[NoSuch]x=@remove()", "line 1: CTP does not know"), ("param.=x", "needs a name"),
])
def test_errors_say_where_and_what(script: str, message: str) -> None:
    with pytest.raises(ScriptError) as error:
        ctp.parse(script, "s")
    assert message.replace(".0010,0010.", "(0010,0010)") in str(error.value)


def test_a_byte_order_mark_is_no_reason_to_do_nothing() -> None:
    assert 0x00100010 not in run("\ufeff" + xml(e("00100010", "@remove()")), made(x00100010="a"))


def test_the_last_of_two_lines_is_obeyed_and_shown() -> None:
    script = ctp.parse(xml(e("00100010", "@keep()"), e("00100010", "@remove()")), "s")
    file = made(x00100010="a")
    script.apply(file, context())
    assert 0x00100010 not in file.dataset
    assert any("line 2 already" in finding.text for finding in script.findings())


@pytest.mark.parametrize(("lines", "text"), [
    ([e("00100010", "@skip()")], "@skip"), ([PRIVATE], "items of sequences"), ([], "changes nothing"),
    (['<r en="T" t="curves"/>'], "curves only together"), ([e("00100010", "a@b")], "drops the rest"),
    ([e("00100010", "x@always()")], "only at the beginning"), ([e("00100010", "keep()")], "without @"),
    ([e("00080020", "none")], "leaves the original value"), ([e("00100010", "@lookup(this,a)")], "none is given"),
    ([e("60000010", "@keep()"), '<r en="T" t="overlays"/>'], "has no effect"),
    (['<e en="F" t="00100010">@remove()</e>'], "1 elements of the script are disabled"),
    ([e("00100010", "@encrypt(this,k)")], "Blowfish"), (['<k en="T" t="safe"/>'], "does nothing unless"),
    ([e("00020016", "@always()x")], "File Meta"), ([e("00080020", "@incrementdate(this,x)")], "blanked"),
    ([e("00081140", "@hash(this)")], "holds no text"), ([e("00080005", "@remove()")], "nobody can read"),
    ([e("00100010", "@remove()")], "no command has @process()"),
    ([e("0020000D", f"@hashuid({'1.2.' * 14}3,this)")], "different UIDs"),
])
def test_findings(lines: list[str], text: str) -> None:
    assert any(text in finding.text for finding in ctp.parse(xml(*lines), "s").findings())


def test_touches_are_the_public_tags_of_enabled_elements() -> None:
    script = ctp.parse(xml(e("00100010", "@remove()"), e("00190010", "@keep()"), '<e en="F" t="00100020">x</e>'), "s")
    assert script.touches() == {0x00100010, 0xFFFAFFFA, 0xFFFCFFFC}  # what follows pixel data goes always


def test_scripts_can_be_pickled_and_used_again() -> None:
    script = pickle.loads(pickle.dumps(ctp.parse(xml(e("00100020", "@lookup(this,a)")), "s", "a/1=x\na/2=y")))
    for old, new in (("1", "x"), ("2", "y")):
        file = made(x00100020=old)
        script.apply(file, context())
        assert file.dataset.text(0x00100020) == new
