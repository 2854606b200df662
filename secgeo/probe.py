"""What a stranger can do to a listening port, for audits: say some bytes over TCP, and see what comes back.

Bounded in time and size, one connection at a time, and closed at once: harmless to a study in progress. Beside `secgeo.transport` the
only file that opens a socket; it speaks no ZeroMQ, since a stranger need not either.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass, field
from typing import Final

from keys.errors import ConfigError

_ADDRESS = re.compile(r"tcp://(?:\[(?P<six>[0-9A-Fa-f:.%\w-]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")

GREETING_BYTES: Final = 64
"""What every ZMTP 3 peer says first (RFC 37): signature, version, mechanism, role."""
REPLY_LIMIT_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `closed`: the other side hung up before our time was over."""

    connected: bool
    closed: bool
    data: bytes = field(repr=False)
    seconds: float

    @property
    def mechanism(self) -> str:
        """The security mechanism that a ZMTP peer has announced; empty if it announced none."""
        name = self.data[12:32].rstrip(b"\0")
        whole = len(self.data) >= GREETING_BYTES and self.data[0] == 0xFF
        return "".join(chr(byte) if 32 < byte < 127 else "?" for byte in name) if whole else ""


def greeting(mechanism: bytes, *, server: bool = False) -> bytes:
    """The greeting of a ZMTP 3.1 peer."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes([server]) + bytes(31)


def say(address: str, data: bytes, *, seconds: float = 2.0, enough: int = REPLY_LIMIT_BYTES) -> Reply:
    """Connect to `tcp://host:port`, say `data`, and listen for at most `seconds` or until `enough` bytes have come.

    Whatever the network does, there is a reply.

    Raises:
        ConfigError: this is no such address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) <= 65_535:
        raise ConfigError(f"{address!r} is not an address that one can dial: tcp://host:port")
    started, received, closed = time.monotonic(), b"", False
    try:
        with socket.create_connection((match["six"] or match["host"], int(match["port"])), timeout=seconds) as peer:
            try:
                peer.sendall(data)
                while len(received) < enough:
                    peer.settimeout(max(0.01, started + seconds - time.monotonic()))
                    part = peer.recv(REPLY_LIMIT_BYTES - len(received))
                    if not part:
                        closed = True
                        break
                    received += part
            except TimeoutError:
                pass
            except OSError:
                closed = True
    except OSError:
        return Reply(False, False, b"", time.monotonic() - started)
    return Reply(True, closed, received, time.monotonic() - started)
