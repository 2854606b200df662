"""Ways in which bytes are broken, for every decoder."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from protocols import messages as m

BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "random bytes": lambda data: os.urandom(len(data)),
    "a length beyond the end": lambda data: b"\xff\xff\xff\xff" + data[4:],
    "half a message": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:1],
    "one byte too many": lambda data: data + b"\0",
    "deep nesting": lambda _data: (1 << 16).to_bytes(4) + b"\x91" * (1 << 16),
    "other types": lambda _data: (4).to_bytes(4) + msgspec.msgpack.encode([1, 2, 3]),
    "more than the limit": lambda _data: bytes(m.MESSAGE_LIMIT_BYTES + 1),
    "a changed bit": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
}
