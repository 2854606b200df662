"""Reading a signed message a second time: MessagePack in its one shortest form, and the fields of every body with their bounds."""

from __future__ import annotations

import re
from typing import Any

from tests.vectors.reference import Refused, label, need, packed, sha256, signed


def unpacked(data: bytes) -> Any:
    """The one value that `packed` makes `data` of."""
    value, rest = _next(data)
    need(not rest and packed(value) == data, "not canonical")
    return value


def _next(data: bytes) -> tuple[Any, bytes]:
    need(bool(data), "cut off")
    head, data = data[0], data[1:]
    wide = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD9: 1, 0xDC: 2}.get(head, 0)
    number, rest = int.from_bytes(data[:wide]), data[wide:]
    need(len(data) >= wide, "cut off")
    match head:
        case 0xC0 | 0xC2 | 0xC3:
            return {0xC0: None, 0xC2: False, 0xC3: True}[head], rest
        case _ if head < 0x80:
            return head, rest
        case 0xCC | 0xCD | 0xCE | 0xCF:
            return number, rest
        case 0xC4 | 0xC5 | 0xC6:
            need(len(rest) >= number, "cut off")
            return rest[:number], rest[number:]
        case _ if head >> 5 == 0b101 or head == 0xD9:
            size = number if wide else head & 31
            need(len(rest) >= size and rest[:size].isascii(), "cut off, or not ASCII")
            return rest[:size].decode(), rest[size:]
        case _ if head >> 4 == 0b1001 or head == 0xDC:
            items = []
            for _ in range(number if wide else head & 15):
                item, rest = _next(rest)
                items.append(item)
            return items, rest
    raise Refused("a type that no message has")


def _binary(low: int, high: int) -> Any:
    return lambda value: isinstance(value, bytes) and low <= len(value) <= high


def _list(kind: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) <= 256 and all(map(kind, value))


def _pair(second: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) == 2 and _name(value[0]) and second(value[1])


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,62}", value) is not None


def _number(value: Any) -> bool:
    return type(value) is int and value < 2**32


def _tag(value: Any) -> bool:
    return type(value) is int and value < 2**61 - 1


def _reason(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[ -~]{0,500}", value) is not None


_digest, _signature, _share, _key = _binary(32, 32), _binary(64, 64), _binary(33, 33), _binary(1216, 1216)
_names, _relayed = _list(_name), _list(_binary(0, 8192))

BODIES: dict[str, tuple[Any, ...]] = {
    "Join": (_number, _digest, _binary(0, 1216)),
    "Ready": (),
    "Declined": (_reason,),
    "RoundKeys": (_key, _key, _digest, _digest, _digest),
    "SealedSeeds": (_name, _digest, _binary(0, 2048), _binary(0, 2048), *3 * [lambda v: v is None or _digest(v)]),
    "Complaint": (_name,),
    "UploadChunk": (_number, _digest),
    "UploadDone": (_digest, _digest, _tag),
    "SurvivorVote": (_signature,),
    "Unmasking": (_list(_pair(_share)), _list(_pair(_share))),
    "Receipt": (_signature,),
    "SealedKey": (_name, _digest, _binary(0, 2**15)),
    "Farewell": (),
    "DealKey": (_relayed, lambda value: isinstance(value, bool)),
    "DealtKey": (_binary(0, 2**16),),
    "RoundOpen": (_number,),
    "AttemptOpen": (_names,),
    "KeySet": (_list(_pair(_digest)), _relayed),
    "SeedSet": (_names, _relayed),
    "Credit": (_number,),
    "Survivors": (_list(_pair(_digest)), _relayed),
    "SurvivorProof": (_list(_pair(_signature)),),
    "SumChunk": (_number, _digest),
    "RoundResult": (_binary(0, 2**19), _list(_pair(_signature))),
    "AttemptFailed": (_reason, lambda value: isinstance(value, bool)),
    "StudyEnded": (_reason,),
}
"""The fields of every body behind its name."""


def read_message(data: bytes, peer: str, public: bytes, agreement_digest: bytes) -> dict[str, Any]:
    """Length of the head (4 bytes), head, tail."""
    need(len(data) <= 2**20 + 2**16, "too long")
    end = 4 + int.from_bytes(data[:4])
    need(4 <= end <= len(data), "cut off")
    fields, tail = unpacked(data[4:end]), data[end:]
    need(isinstance(fields, list) and len(fields) == 7)
    version, agreement, number, attempt, sender, body, signature = fields
    need([version, agreement, sender] == [2, agreement_digest, peer] and _number(number) and _number(attempt))
    need(isinstance(body, list) and bool(body) and isinstance(body[0], str) and body[0] in BODIES)
    kinds = BODIES[body[0]]
    need(len(body) == 1 + len(kinds) and all(kind(value) for kind, value in zip(kinds, body[1:], strict=True)))
    need(_is_signed(public, packed(fields[:6]), signature), "signature")
    need(sha256(tail) == body[2] if body[0] in ("UploadChunk", "SumChunk") else not tail, "tail")
    return {"round": number, "attempt": attempt, "body": body, "signature": signature, "tail": tail}


def _is_signed(public: bytes, unsigned: bytes, signature: Any) -> bool:
    """By a signature of its own, or one over the digests of 2 to 16 messages of which it is one."""
    if isinstance(signature, bytes):
        return _signature(signature) and signed(public, "message", unsigned, signature)
    if not isinstance(signature, list) or len(signature) != 2 or not isinstance(signature[1], list):
        return False
    own, digests = signature
    each_once = 2 <= len(digests) <= 16 and all(map(_digest, digests)) and len(set(digests)) == len(digests)
    in_it = each_once and sha256(label("message"), unsigned) in digests
    return in_it and _signature(own) and signed(public, "message-batch", packed(digests), own)
