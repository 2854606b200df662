"""The network of `tests.protocols.network` over real CURVE sockets on loopback (`audit.attacks.wire`): its clock jumps, or is a real one.

`over_sockets` lets an attack of the other files run over sockets unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import msgspec

from audit.attacks import wire
from audit.attacks.wire import LIMITS as LIMITS
from audit.attacks.wire import PATIENCE_SECONDS as PATIENCE_SECONDS
from protocols.agreement import Deadlines, read_agreement, write_agreement
from protocols.study_aggregator import Stage
from tests.protocols import network as memory
from tests.protocols.network import Network

PHASE_SECONDS = 5.0


class JumpingNetwork(wire.WireNetwork, Network):
    """One study over sockets, whose clock jumps to the next deadline when nothing is under way."""


class WireNetwork(JumpingNetwork):
    """One study over sockets, whose deadlines are those of a real clock."""

    def start(self, *arguments: object, **options: object) -> None:
        self.now = time.monotonic()
        super().start(*arguments, **options)  # type: ignore[arg-type]

    def pass_time(self) -> None:
        """It passes by itself."""
        time.sleep(0.001)

    def _carry(self) -> bool:
        if not self.aggregator.ended:
            self.now = time.monotonic()
        self._from_aggregator(self.aggregator.tick(self.now))
        return super()._carry()

    def _over(self) -> bool:
        if all(name in self.faults or node.ended for name, node in self.nodes.items()):
            return self.aggregator.stage in (Stage.FAREWELL, Stage.ENDED)  # who has left says no farewell
        return self.aggregator.ended and time.monotonic() > self.now + 0.5


def make_wire_network(*arguments: int, **settings: object) -> WireNetwork:
    """As `make_network`, with short deadlines, in real time."""
    plain = memory.make_network(*arguments, **settings)  # type: ignore[arg-type]
    deadlines = Deadlines(10.0, PHASE_SECONDS, PHASE_SECONDS)
    agreement = read_agreement(write_agreement(msgspec.structs.replace(plain.agreement, deadlines=deadlines)))
    return WireNetwork(plain.consortium, agreement, plain.vectors, plain.size)


def make_jumping_network(*arguments: int, **settings: object) -> JumpingNetwork:
    """As `make_network`, over sockets."""
    plain = memory.make_network(*arguments, **settings)  # type: ignore[arg-type]
    return JumpingNetwork(plain.consortium, plain.agreement, plain.vectors, plain.size)


@contextmanager
def over_sockets(module: ModuleType) -> Iterator[None]:
    """The attacks of this module run over sockets."""
    with mock.patch.object(module, "make_network", make_jumping_network):
        yield
