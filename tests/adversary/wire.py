"""The network of `tests.protocols.network` over real CURVE sockets on loopback (`audit.attacks.wire`).

`over_sockets` lets an attack of the other files run over sockets unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

from audit.attacks import wire
from audit.attacks.wire import LIMITS as LIMITS
from audit.attacks.wire import PATIENCE_SECONDS as PATIENCE_SECONDS
from tests.protocols import network as memory
from tests.protocols.network import Network


class WireNetwork(wire.WireNetwork, Network):
    """One study over sockets, whose clock jumps to the next deadline when nothing is under way."""


def make_wire_network(*arguments: int, **settings: object) -> WireNetwork:
    """As `make_network`, over sockets."""
    plain = memory.make_network(*arguments, **settings)  # type: ignore[arg-type]
    return WireNetwork(plain.consortium, plain.agreement, plain.vectors, plain.size)


@contextmanager
def over_sockets(module: ModuleType) -> Iterator[None]:
    """The attacks of this module run over sockets."""
    with mock.patch.object(module, "make_network", make_wire_network):
        yield
