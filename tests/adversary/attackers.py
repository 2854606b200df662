"""Attackers beside those of `audit.attacks`: members that lie with their real keys, and several at once.

They sit on a network's tap (in memory, or over sockets: `tests.adversary.wire`), so that every honest party stays the real
machine. What a malicious aggregator is and can compute, `audit.attacks` owns: `play`, `knowledge` and `forged`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from audit.attacks.forged import announce, changed_total
from audit.attacks.knowledge import peek
from audit.attacks.network import Network
from audit.attacks.play import Hearing, Play
from protocols import messages as m
from protocols import sealing
from protocols.attempt_node import AttemptNode
from protocols.encoding import Uint32Vector


def wrong_sum(network: Network, change: Callable[[Uint32Vector], Uint32Vector], **options: object) -> Play:
    """The aggregator announces a sum with other values than it opened, as `announce` does."""
    attack = Play(network)
    announce(attack, lambda total: changed_total(network, total, change), **options)  # type: ignore[arg-type]
    return attack


def revealed(attack: Play) -> set[str]:
    """The honest nodes that have revealed shares."""
    return {name for name in attack.network.names if attack.has_sent(name, m.Unmasking)}


class MaliciousNode:
    """Holds one member's real key and changes what that member sends; the member's machine runs on underneath."""

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.name = network, name
        self.identity = network.identities[name]
        self._changes: dict[str, Hearing] = {}
        self._inner, network.tap = network.tap, self._tap

    def on(self, *kinds: str) -> Callable[[Hearing], Hearing]:
        """Decorate what is sent instead of a kind of message."""
        return lambda change: [self._changes.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def sign(self, message: m.Message, body: m.AnyBody, tail: bytes = b"") -> bytes:
        """A body of our own, for the round and attempt of `message`."""
        return m.encode(
            self.identity, sealing.AttemptId(self.network.digest, message.round, message.attempt), body, tail
        )

    def _tap(self, sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data) if sender == self.name else None
        kind = type(head.body).__name__ if head is not None else ""
        if head is None or kind not in self._changes:
            return self._inner(sender, recipient, data)
        message = m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1])
        return self._changes[kind](message, data)


@contextmanager
def behaving(names: Callable[[AttemptNode], bool], **methods: Callable[..., object]) -> Iterator[None]:
    """Let the attempts of some members have other methods; each gets the genuine method as its first argument."""
    genuine = {name: getattr(AttemptNode, name) for name in methods}

    def replaced(name: str) -> Callable[..., object]:
        def method(self: AttemptNode, *args: object) -> object:
            if names(self):
                return methods[name](genuine[name], self, *args)
            return genuine[name](self, *args)

        return method

    for name in methods:
        setattr(AttemptNode, name, replaced(name))
    try:
        yield
    finally:
        for name, method in genuine.items():
            setattr(AttemptNode, name, method)
