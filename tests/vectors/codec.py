"""How values stand in the JSON files: bytes as lowercase hexadecimal digits, all else as JSON has it.

A string of an even number of hexadecimal digits is bytes, any other string is text. Long inputs are written short:
`{"first": a, "step": b, "modulus": m, "count": n}` is the n integers (a + b i) mod m; `{"bytes": hex, "zeros": n}` is
these bytes and n zero bytes. Integers are below 2^53; larger numbers are bytes, big-endian.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FILES = ("encoding", "prg", "key_schedule", "shamir", "tags", "graph", "messages", "encrypted", "round")

_SHORT = 118
_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z")


def to_json(value: Any) -> Any:
    match value:
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case str() if _HEX.match(value):
            raise ValueError(f"the text {value!r} would be read as bytes")
        case Mapping():
            return {key: to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    match value:
        case str():
            return bytes.fromhex(value) if _HEX.match(value) else value
        case {"first": first, "step": step, "modulus": modulus, "count": count}:
            return [(first + step * place) % modulus for place in range(count)]
        case {"bytes": start, "zeros": count}:
            return bytes.fromhex(start) + bytes(count)
        case dict():
            return {key: from_json(item) for key, item in value.items()}
        case list():
            return [from_json(item) for item in value]
    return value


def text_of(document: Any) -> str:
    """JSON, indented, with every list and object that fits on a line on one line."""
    return _text(document, "") + "\n"


def _text(value: Any, indent: str) -> str:
    flat = json.dumps(value, allow_nan=False, ensure_ascii=True)
    if len(indent) + len(flat) <= _SHORT or not isinstance(value, dict | list):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
    else:
        items = [_text(item, inner) for item in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n" + ",\n".join(inner + item for item in items) + f"\n{indent}{right}"


def read(name: str) -> Any:
    """The document of that name as it lies in this folder; None if there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text("ascii")) if path.exists() else None


def coins(purpose: str) -> Callable[[int], bytes]:
    """A source of bytes that is the same every time."""
    counter = itertools.count()
    return lambda count: hashlib.shake_256(f"secgeo vectors {purpose} {next(counter)}".encode()).digest(count)
