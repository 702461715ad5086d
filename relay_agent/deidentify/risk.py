from enum import StrEnum
from dataclasses import dataclass
class Kind(StrEnum):
    ULTRASOUND="ultrasound"
    SECONDARY_CAPTURE="secondary-capture"
@dataclass
class Risk:
    kind: Kind
def risks(ds,ts): return []
def remaining(r,painted): return r
