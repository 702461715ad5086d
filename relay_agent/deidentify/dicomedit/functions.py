"""The functions of DicomEdit 6.6, by name: each takes the run and the values of its arguments."""

from __future__ import annotations

import re
from typing import Any

from relay_agent.deidentify.dicomedit import dates
from relay_agent.deidentify.dicomedit.arguments import collect, count, flat, full_match, need, tag_paths, value, whole
from relay_agent.deidentify.dicomedit.changes import CHANGES, Function
from relay_agent.deidentify.dicomedit.errors import Cannot
from relay_agent.deidentify.dicomedit.paths import Path
from relay_agent.deidentify.dicomedit.run import VOID, Run, as_bool, as_text
from relay_agent.deidentify.dicomedit.uid import hash_uid, map_uid
from relay_agent.deidentify.script import Rejected


def _concatenate(run: Run, args: list[Any]) -> str:
    return "".join(need(value(run, arg)) for arg in args)


def _substring(run: Run, args: list[Any]) -> str:
    count(args, 3)
    text, start, end = need(value(run, args[0])), whole(args[1]), whole(args[2])
    if not 0 <= start <= end <= len(text):
        raise Cannot("substring goes beyond the text")
    return text[start:end]


def _replace(run: Run, args: list[Any]) -> str:
    count(args, 3)
    return need(value(run, args[0])).replace(need(as_text(args[1])), need(as_text(args[2])))


def _lowercase(run: Run, args: list[Any]) -> str:
    count(args, 1)
    return need(value(run, args[0])).lower()


def _uppercase(run: Run, args: list[Any]) -> str:
    count(args, 1)
    return need(value(run, args[0])).upper()


def _normalize(run: Run, args: list[Any]) -> str | None:
    count(args, 1, 2)
    text, instead = value(run, args[0]), need(as_text(args[1])) if len(args) > 1 else "_"
    return None if text is None else re.sub(r"[^\x00-\x7f]", lambda _: instead, text)


def _match(run: Run, args: list[Any]) -> str | None:
    count(args, 3)
    text, group = need(value(run, args[0])), whole(args[2])
    found = full_match(text, need(as_text(args[1])))
    if found is None:
        return None
    if not 0 <= group < len(found):
        raise Cannot("the regular expression of match has no such group")
    return found[group]


def _ismatch(run: Run, args: list[Any]) -> bool:
    count(args, 2)
    return full_match(need(value(run, args[0])), need(as_text(args[1]))) is not None


def _format(run: Run, args: list[Any]) -> str:
    """Java's MessageFormat, with {0} as its only kind of element."""
    if not args:
        raise Cannot("format needs a text")
    pattern, given = need(value(run, args[0])), ["null" if (text := value(run, arg)) is None else text
                                                   for arg in args[1:]]
    out, position, quoted = "", 0, False
    while position < len(pattern):
        char = pattern[position]
        if char == "'":
            if pattern[position + 1:position + 2] == "'":
                out, position = out + "'", position + 1
            else:
                quoted = not quoted
        elif char == "{" and not quoted:
            found = re.compile(r"\{ *([0-9]{1,4}) *\}", re.ASCII).match(pattern, position)
            if found is None:
                raise Cannot("format knows elements such as {0} only")
            number = int(found[1])
            out += given[number] if number < len(given) else f"{{{number}}}"
            position = found.end() - 1
        else:
            out += char
        position += 1
    return out


def _lookup(run: Run, args: list[Any]) -> str | None:
    count(args, 2)
    return run.lookup.get(f"{as_text(args[0])}/{value(run, args[1])}")


def _and(run: Run, args: list[Any]) -> bool:
    return all([as_bool(arg) for arg in args])


def _or(run: Run, args: list[Any]) -> bool:
    return any([as_bool(arg) for arg in args])


def _equals(run: Run, args: list[Any]) -> bool:
    return len(args) > 1 and all(type(arg) is type(args[0]) and arg == args[0] for arg in args)


def _is_present(run: Run, args: list[Any]) -> bool:
    for arg in flat(args):
        if not isinstance(arg, Path):
            raise Cannot("isPresent takes tags, not texts")
        if not run.present(arg):
            return False
    return True


def _reject(run: Run, args: list[Any]) -> object:
    count(args, 0, 1)
    if not args or as_bool(args[0]):
        raise Rejected(run.context.rule)
    return VOID


def _value_at(run: Run, args: list[Any]) -> str | None:
    paths = tag_paths(args)
    count(paths, 1)
    return run.read(paths[0])


def _hash_uid(run: Run, args: list[Any]) -> str | None:
    if not args:
        raise Cannot("hashUID needs a text or a tag")
    text = value(run, args[0])
    return None if text is None else hash_uid(text)


def _new_uid(run: Run, args: list[Any]) -> str:
    run.context.fresh += 1
    return run.context.uids.fresh(run.seed, run.context.fresh)


def _map_uid(run: Run, args: list[Any]) -> str:
    count(args, 2)
    return map_uid(run, args[1], need(value(run, args[0])))


def _shift(units: str, *vrs: str) -> Function:
    def shift(run: Run, args: list[Any]) -> str:
        count(args, 2, 3)
        if isinstance(args[0], Path) and run.unresolved_vr(args[0]) not in vrs:
            raise Cannot(f"the attribute to be shifted has not the VR {' or '.join(vrs)}")
        return dates.shift(need(value(run, args[0])), whole(args[1]),
                           need(as_text(args[2])) if len(args) > 2 else units)
    return shift


def _get_url(run: Run, args: list[Any]) -> str:
    raise Cannot("getURL is refused: it would send values of the object to another place before it is de-identified")


FUNCTIONS: dict[str, Function] = {
    **CHANGES, "concatenate": _concatenate, "substring": _substring, "replace": _replace, "lowercase": _lowercase,
    "uppercase": _uppercase, "normalizeString": _normalize, "match": _match, "ismatch": _ismatch, "format": _format,
    "lookup": _lookup, "and": _and, "or": _or, "equals": _equals, "true": lambda run, args: True,
    "false": lambda run, args: False, "isPresent": _is_present, "reject": _reject, "valueAt": _value_at,
    "collectValues": collect, "hashUID": _hash_uid, "newUID": _new_uid, "mapUID": _map_uid,
    "shiftDateByIncrement": _shift("days", "DA"), "shiftDateTimeByIncrement": _shift("seconds", "DA", "DT"),
    "getURL": _get_url,
}
