"""What a target is: a property of one decoder, and where fuzzing begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz import mutate


class PropertyBroken(Exception):
    """A decoder accepted what it must refuse, or does not give back what it read."""


@dataclass(frozen=True)
class Target:
    """A property that holds for every input, valid inputs, and how inputs of this form are changed.

    `run` returns if the property holds, and raises anything else but what the decoder documents. `seeds` come in a fixed order.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    mutate: mutate.Mutator = mutate.flip


def require(holds: bool, promise: str) -> None:
    """Raise `PropertyBroken` unless the promise holds."""
    if not holds:
        raise PropertyBroken(promise)
