"""Who may connect: the roster's answer to libzmq's ZAP questions (RFC 27), and a count of handshakes that failed.

A CURVE server without a ZAP handler accepts any key. The ROUTER therefore enforces `ZAP_DOMAIN`, which closes the door
when no handler answers, and this handler knows no answer but the roster's. It hands the node's name (`User-Id`) and key
(`KEY_PROPERTY`) to libzmq, which attaches both to every message of the connection; a peer cannot overwrite them.
This file and `secgeo.transport` are the only ones that import zmq.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.utils import z85

from keys.errors import ConfigError

ZAP_DOMAIN: Final = b"secgeo"
KEY_PROPERTY: Final = "X-Curve-Key"
"""The message property that holds the authenticated CURVE public key, in hex."""

_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_MONITOR_ADDRESS: Final = "inproc://monitor"
_REFUSALS_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class Refusal:
    """One handshake that the roster refused.

    Attributes:
        unix_seconds: when.
        address: the IP address it came from.
        key_hash: the first 16 hex digits of the SHA-256 of its CURVE public key.
    """

    unix_seconds: float
    address: str
    key_hash: str


class Doorkeeper:
    """Answers libzmq's ZAP questions (RFC 27) from the roster, and counts broken handshakes, in a thread of its own.

    A thread, as a handshake must not wait for the caller's loop. It ends when the context does. `allowed` is replaced
    whole and never changed in place.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], allowed: dict[bytes, str]
    ) -> None:
        self.allowed = allowed
        self.refusals: deque[Refusal] = deque(maxlen=_REFUSALS_KEPT)
        self.refused = 0
        self.broken = 0
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(_ZAP_ADDRESS)
        self._monitor = open_monitor(
            context, router, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        self._thread = threading.Thread(target=self._run, name="secgeo-zap", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread; the context must have been ended."""
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._zap in ready:
                    self._zap.send_multipart(self._answer(self._zap.recv_multipart()))
                if self._monitor in ready:
                    self._monitor.recv_multipart()
                    self.broken += 1
        except zmq.ContextTerminated:
            pass
        finally:
            self._zap.close(0)
            self._monitor.close(0)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        # version, request id, domain, address, routing id, mechanism, credentials; libzmq itself writes them
        request_id, domain, address, mechanism, key = question[1], question[2], question[3], question[5], question[-1]
        node = self.allowed.get(key) if (domain, mechanism, len(question)) == (ZAP_DOMAIN, b"CURVE", 7) else None
        if node is None:
            self.refused += 1
            key_hash = hashlib.sha256(key).hexdigest()[:16]
            self.refusals.append(Refusal(time.time(), address.decode("ascii", "replace"), key_hash))
            return [b"1.0", request_id, b"400", b"not in the roster", b"", b""]
        name, value = KEY_PROPERTY.encode(), key.hex().encode()
        metadata = struct.pack("!B", len(name)) + name + struct.pack("!I", len(value)) + value
        return [b"1.0", request_id, b"200", b"OK", node.encode(), metadata]


def open_monitor(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A reader of the socket's events. Its queue is unbounded: libzmq's I/O thread would wait for a slow reader."""
    socket.monitor(_MONITOR_ADDRESS, events)
    reader = context.socket(zmq.PAIR)
    reader.setsockopt(zmq.LINGER, 0)
    reader.setsockopt(zmq.RCVHWM, 0)
    reader.connect(_MONITOR_ADDRESS)
    return reader


def check_key(key: bytes) -> None:
    """Raise `ConfigError` unless the key has 32 raw bytes."""
    if not isinstance(key, bytes) or len(key) != 32:
        raise ConfigError("a CURVE key has 32 raw bytes")


def check_key_pair(secret: bytes, public: bytes) -> None:
    """Raise `ConfigError` unless both have 32 bytes and belong together."""
    check_key(secret)
    check_key(public)
    if zmq.curve_public(z85.encode(secret)) != z85.encode(public):
        raise ConfigError("the CURVE public key does not belong to the CURVE secret key")


def checked_roster(allowed: Mapping[bytes, str]) -> dict[bytes, str]:
    """A copy of the roster; `ConfigError` if a key has not 32 bytes or a name not 1 to 255."""
    for key, node in allowed.items():
        check_key(key)
        if not 0 < len(node.encode()) <= 255:
            raise ConfigError("a node id has 1 to 255 bytes")
    return dict(allowed)
