"""Structured mutations: a document is decoded, one or a few of its values are changed, and it is encoded again.

Changed bytes hardly ever pass a length prefix, a closing bracket or a checksum; changed values do, and reach the checks behind
the decoder. Every function here is a pure function of its arguments: (input, random generator) -> input.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

Mutator = Callable[[bytes, random.Random], bytes]
Change = Callable[[Any], Any]

INTEGERS = (-1, 0, 1, 2, 3, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"))
STRINGS = (
    "",
    "a",
    "aggregator",
    "hospital-00",
    "hospital-03",
    "stranger",
    "\0",
    "é",
    "\U0001f600",
    "x" * 600,
    "0" * 64,
)
BYTES = (b"", b"\0", bytes(32), bytes(64), b"\xff" * 32, b"\xff" * 2049)


def flip(data: bytes, rng: random.Random) -> bytes:
    """Simple changes of bytes: set, insert, delete or repeat a few of them, or cut the end off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        span = rng.randint(1, 8)
        match rng.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[place % len(changed)] = rng.randrange(256)
            case 2:
                changed[place:place] = rng.randbytes(span)
            case 3:
                del changed[place : place + span]
            case 4:
                changed[place:place] = changed[place : place + span * 4] * rng.randint(1, 4)
            case _ if rng.randrange(4) == 0:
                del changed[place:]
    return bytes(changed)


def msgpack(data: bytes, rng: random.Random) -> bytes:
    """Change values of a MessagePack document."""
    return _document(data, rng, msgspec.msgpack.decode, msgspec.msgpack.encode)


def json(data: bytes, rng: random.Random) -> bytes:
    """Change values of a JSON document, written as the documents of the keys are: indented by 2."""
    return _document(
        data, rng, msgspec.json.decode, lambda tree: msgspec.json.format(msgspec.json.encode(tree)) + b"\n"
    )


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """Change values of one line, or drop, repeat or exchange lines."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return flip(data, rng)
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            del lines[first]
        case 1:
            lines.insert(second, lines[first])
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case 3:
            del lines[first:]
        case _:
            lines[first] = _document(
                lines[first], rng, msgspec.json.decode, lambda tree: msgspec.json.encode(tree) + b"\n"
            )
    return b"".join(lines)


def toml(data: bytes, rng: random.Random) -> bytes:
    """Change values of a TOML document."""
    return _document(data, rng, msgspec.toml.decode, msgspec.toml.encode)


def _document(data: bytes, rng: random.Random, decode: Change, encode: Change) -> bytes:
    try:
        tree = decode(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            tree = _change(tree, rng)
        return bytes(encode(tree))
    except Exception:  # the document cannot be decoded, or what became of it cannot be encoded
        return flip(data, rng)


def _change(tree: Any, rng: random.Random) -> Any:
    """A copy of `tree` in which one value, anywhere in it, is another one."""
    count = _count(tree)
    return _replace(tree, rng.randrange(count), lambda value: _other(value, tree, rng))


def _count(tree: Any) -> int:
    if isinstance(tree, dict):
        return 1 + sum(_count(value) for value in tree.values())
    if isinstance(tree, list):
        return 1 + sum(map(_count, tree))
    return 1


def _replace(tree: Any, index: int, change: Change) -> Any:
    """Change the value of that number, counted from 0 at the root in reading order."""
    if index == 0:
        return change(tree)
    index -= 1
    if isinstance(tree, dict | list):
        changed = tree.copy()
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            size = _count(value)
            if index < size:
                changed[key] = _replace(value, index, change)
                return changed
            index -= size
    return tree


def _other(value: Any, tree: Any, rng: random.Random) -> Any:
    if rng.randrange(12) == 0:
        return rng.choice((None, True, rng.choice(INTEGERS), rng.choice(STRINGS), rng.choice(BYTES), [], {}))
    if rng.randrange(8) == 0:
        return _pick(tree, rng)
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((value + 1, value - 1, value ^ (1 << rng.randrange(33)), rng.choice(INTEGERS)))
        case float():
            return rng.choice((value * 2, -value, rng.choice(FLOATS)))
        case str():
            return rng.choice((flip(value.encode(), rng).decode("utf-8", "replace"), rng.choice(STRINGS)))
        case bytes():
            return flip(value, rng) if rng.randrange(4) else rng.choice((value[:-1], value + b"\0", rng.choice(BYTES)))
        case list():
            return _other_list(value, rng)
        case dict():
            return _other_dict(value, rng)
        case _:
            return rng.choice(INTEGERS)


def _pick(tree: Any, rng: random.Random) -> Any:
    """Some value of the tree."""
    found: list[Any] = []

    def keep(value: Any) -> Any:
        found.append(value)
        return value

    _replace(tree, rng.randrange(_count(tree)), keep)
    return found[0]


def _other_list(value: list[Any], rng: random.Random) -> list[Any]:
    changed = list(value)
    if not changed:
        return [rng.choice(INTEGERS)]
    first, second = rng.randrange(len(changed)), rng.randrange(len(changed))
    match rng.randrange(5):
        case 0:
            del changed[first]
        case 1:
            changed.insert(second, changed[first])
        case 2:
            changed[first], changed[second] = changed[second], changed[first]
        case 3:
            changed = changed * rng.choice((2, 100))
        case _:
            changed.append(rng.choice(INTEGERS))
    return changed


def _other_dict(value: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    changed = dict(value)
    if not changed or rng.randrange(3) == 0:
        changed[rng.choice(STRINGS)] = rng.choice(INTEGERS)
        return changed
    first, second = rng.choice(list(changed)), rng.choice(list(changed))
    if rng.randrange(2):
        del changed[first]
    else:
        changed[first], changed[second] = changed[second], changed[first]
    return changed
