"""De-identification Method Code Sequence (0012,0064), which CTP fills from codes with a slash between them."""

from __future__ import annotations

from relay_agent.dataset import Dataset
from relay_agent.deidentify.ctp.command import KEEP, REMOVE, Mark, run
from relay_agent.deidentify.ctp.compiler import Rule
from relay_agent.deidentify.ctp.state import State
from relay_agent.deidentify.script import Failed

TAG = 0x00120064
MEANINGS = {  # PS3.16 CID 7050, with CTP's words
    "113100": "Basic Application Confidentiality Profile",
    "113101": "Clean Pixel Data Option",
    "113102": "Clean Recognizable Visual Features Option",
    "113103": "Clean Graphics Option",
    "113104": "Clean Structured Content Option",
    "113105": "Clean Descriptors Option",
    "113106": "Retain Longitudinal Temporal Information Full Dates Option",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
    "113109": "Retain Device Identity Option",
    "113110": "Retain UIDs",
    "113111": "Retain Safe Private Option",
    "113112": "Retain Institution Identity Option",
}


def update(data: Dataset, rule: Rule, state: State) -> None:
    """Add items for the codes that the command gives; ``reset`` among them drops those before it."""
    pieces = run(rule.program, state)
    if REMOVE in pieces:
        data.remove(TAG)
    elif pieces and KEEP not in pieces:
        if any(isinstance(piece, Mark) for piece in pieces):
            raise Failed("codes are expected, with a slash between them")
        items = list(data.items(TAG))
        text = "".join(map(str, pieces)).strip()
        for code in (part.strip() for part in text.rstrip("/").split("/")):
            if code.lower() == "reset":
                items = []
                continue
            if not code or len(code) > 16 or not code.isascii():
                raise Failed("codes are expected, with a slash between them")
            item = data.new_item()
            item.put_text(0x00080100, code, "SH")
            item.put_text(0x00080102, "DCM" if code in MEANINGS else "UNKNOWN", "SH")
            item.put_text(0x00080104, MEANINGS.get(code, "UNKNOWN"), "LO")
            items.append(item)
        data.put_items(TAG, items)
