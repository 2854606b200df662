"""What an audit says: one finding per promise that it put to the test.

Every audit has two halves. `collect` runs attacks and measurements and gives evidence: raw numbers, as a JSON-able struct. `judge` turns
evidence into findings and is a pure function, so that whoever has the evidence can recompute the verdict (`secgeo audit verify`).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Part = Literal["training", "protocol", "leakage", "records"]
Status = Literal["held", "broken", "not testable"]


class Finding(Struct, frozen=True, forbid_unknown_fields=True):
    """One promise and what became of it.

    Attributes:
        part: which audit it is from.
        name: what was tried, in a few words.
        promise: what should hold.
        status: it held, it was broken, or it could not be tested here.
        detail: the numbers, in a sentence.
    """

    part: Part
    name: str
    promise: str
    status: Status
    detail: str
