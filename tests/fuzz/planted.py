"""Decoders with planted bugs: they show that the runner finds what it is there to find. Chance alone would not."""

from __future__ import annotations

from tests.fuzz.property import Target


def _key_error(data: bytes) -> None:
    # Each step is a branch that coverage rewards; at random the way to the end is one in 2^32.
    if data[:1] == b"b":  # noqa: SIM102 - one branch for each byte is the point
        if data[1:2] == b"u":  # noqa: SIM102
            if data[2:3] == b"g":  # noqa: SIM102
                if data[3:4] == b"!":
                    {}["planted"]


def _hang(data: bytes) -> None:
    while data[:1] == b"h":
        pass


def _memory(data: bytes) -> None:
    if data[:1] == b"m":
        bytes(1 << 33)


PLANTED = {
    "planted-key-error": Target(_key_error, lambda: [b"good"]),
    "planted-hang": Target(_hang, lambda: [b"good"]),
    "planted-memory": Target(_memory, lambda: [b"good"]),
}
