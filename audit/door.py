"""The door of a listening aggregator, tried as a stranger: who has no key of the roster gets a greeting, and nothing else.

Nine connections, one after the other, a few seconds in all, and closed at once: harmless to a study in progress, so that a running
aggregator can be tried. `judge_knocks` is a pure function of what came back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec import Struct

from audit.findings import Status
from keys.errors import TransportError
from secgeo.probe import GREETING_BYTES, Reply, greeting, say
from secgeo.transport import NodeEndpoint, TransportLimits

PROBE_SECONDS = 1.0
STRANGER_SECONDS = 8.0

_SAID = {
    "no encryption (NULL)": greeting(b"NULL") + b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
    "a password (PLAIN)": greeting(b"PLAIN") + b"\x04\x0a\x05HELLO\x01a\x01b",
    "garbage": bytes(range(1, 255)) * 20,
    "another protocol (HTTP)": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a frame of 2^62 bytes": greeting(b"CURVE") + b"\x06" + (1 << 62).to_bytes(8),
    "a broken handshake": greeting(b"CURVE") + b"\x04\xc8\x05HELLO" + bytes(194),
}
STRANGERS_KEY = "a key that no roster has"
KNOCKS = ("a greeting, before", *_SAID, STRANGERS_KEY, "a greeting, after")
"""In their order. If nobody answers the first, it stays the only one."""


class Probe(Struct, frozen=True, forbid_unknown_fields=True):
    """One knock of a stranger. `served`: it got more than a greeting and a refusal."""

    kind: str
    reached: bool
    served: bool
    closed: bool
    received_bytes: int
    answer: str
    seconds: float


def knock(address: str, server_key: bytes) -> tuple[Probe, ...]:
    """Knock at an aggregator as a stranger: nine short connections, one after the other, a few seconds in all.

    Raises:
        ConfigError: the address is none.
    """
    first = _greet(KNOCKS[0], address)
    if not first.reached:
        return (first,)
    probes = [_probe(kind, say(address, data, seconds=PROBE_SECONDS)) for kind, data in _SAID.items()]
    return (first, *probes, stranger(address, server_key), _greet(KNOCKS[-1], address))


def _greet(kind: str, address: str) -> Probe:
    """Say no more than every peer does first: who answers with another mechanism than CURVE would serve strangers."""
    reply = say(address, greeting(b"CURVE"), seconds=STRANGER_SECONDS, enough=GREETING_BYTES)
    return msgspec.structs.replace(_probe(kind, reply), served=reply.mechanism in ("NULL", "PLAIN"))


def _probe(kind: str, reply: Reply) -> Probe:
    """More than a greeting is service: a READY, a WELCOME, or anything else that is not said to everybody."""
    answer = reply.mechanism or ("no whole greeting" if reply.data else "nothing")
    served = len(reply.data) > GREETING_BYTES
    return Probe(kind, reply.connected, served, reply.closed, len(reply.data), answer, round(reply.seconds, 3))


def stranger(address: str, server_key: bytes) -> Probe:
    """A whole CURVE handshake with a fresh key, which no roster has, over the real transport; the key of the server is right."""
    key = X25519PrivateKey.generate()
    limits = TransportLimits(
        handshake_seconds=STRANGER_SECONDS,
        connect_seconds=STRANGER_SECONDS,
        reconnect_min_seconds=60.0,
        reconnect_max_seconds=120.0,
        linger_seconds=0.01,
    )
    started, text = time.monotonic(), "connected"
    with NodeEndpoint(
        address,
        curve_secret=key.private_bytes_raw(),
        curve_public=key.public_key().public_bytes_raw(),
        server_curve_public=server_key,
        limits=limits,
    ) as endpoint:
        while endpoint.state == "connecting" and time.monotonic() < started + STRANGER_SECONDS:
            time.sleep(0.02)
        state = endpoint.state
        try:
            endpoint.wait_connected(0.0)
        except TransportError as error:
            text = str(error)
    served = state == "connected"
    return Probe(
        STRANGERS_KEY,
        state in ("connected", "refused", "slow"),
        served,
        not served,
        0,
        text,
        round(time.monotonic() - started, 3),
    )


def judge_knocks(address: str, probes: Sequence[Probe]) -> tuple[Status, str]:
    """Whether a stranger was kept out, and the aggregator is still there."""
    first, *others = probes
    if not first.reached:
        return "not testable", f"{address} cannot be reached"
    served = [probe.kind for probe in probes if probe.served]
    if served:
        return "broken", f"served: {', '.join(served)}"
    if not others or not others[-1].reached:
        return "broken", "the aggregator cannot be reached any more after the probes"
    if first.answer != "CURVE":
        return (
            "not testable",
            f"what listens at {address} does not greet as an aggregator does: {first.answer}",
        )
    known = [probe for probe in others if probe.kind == STRANGERS_KEY]
    if not any("not in the aggregator's roster" in probe.answer for probe in known):
        return (
            "not testable",
            f"what listens at {address} is not the aggregator of the roster: {known[0].answer if known else ''}",
        )
    kinds = ", ".join(probe.kind for probe in others[:-1])
    return "held", f"turned away: {kinds}; the aggregator holds the roster's CURVE key and answers as before"
