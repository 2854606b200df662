"""Who shares masks with whom: a complete graph, or a Harary graph over a hashed order (Bell et al. 2020, section 3).

The nodes stand in a circle, ordered by a hash over the digest of all round keys; each is linked to the `reach` next ones on
both sides. Nothing that privacy needs depends on that order, so there is no use in grinding keys to change it:

- shares of a node's secrets go to its 2 * reach neighbours, so fewer than `share_threshold` colluders never recover one;
- the honest survivors stay connected through masks that the colluders do not know, unless two stretches of `reach`
  consecutive places hold no honest survivor. `tolerates` says when no choice of so many colluders can do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from keys.labels import Label

DEALERS = 3
"""So many nodes deal a tag seed to everyone (`protocols.tags`), so that one of them may be lost."""


@dataclass(frozen=True, slots=True)
class MaskGraph:
    """The nodes in circular order, and how far each one's links reach."""

    order: tuple[str, ...]
    reach: int

    @classmethod
    def build(cls, names: Iterable[str], neighbours: int, cohort_digest: bytes) -> MaskGraph:
        """The graph over `names` with so many neighbours each; 0, or as many as there are others, is the complete graph."""

        def place(name: str) -> bytes:
            return hashlib.sha256(Label.GRAPH + cohort_digest + name.encode()).digest()

        order = tuple(sorted(names, key=place))
        return cls(order, neighbours // 2 if 0 < neighbours < len(order) - 1 else len(order))

    @property
    def complete(self) -> bool:
        """Whether every pair is linked."""
        return 2 * self.reach >= len(self.order) - 1

    @property
    def dealers(self) -> tuple[str, ...]:
        """Who deals tag seeds, in order of precedence."""
        return self.order[:DEALERS]

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The nodes that `name` shares masks with and seals shares to, sorted."""
        if self.complete:
            return tuple(sorted(set(self.order) - {name}))
        place, size = self.order.index(name), len(self.order)
        return tuple(sorted(self.order[(place + step) % size] for step in range(-self.reach, self.reach + 1) if step))

    def recipients(self, name: str) -> tuple[str, ...]:
        """To whom `name` seals something: its neighbours, or everyone if it is a dealer."""
        return tuple(sorted(set(self.order) - {name})) if name in self.dealers else self.neighbours(name)

    def sources(self, name: str) -> tuple[str, ...]:
        """Who seals something to `name`: its neighbours and the dealers. It needs the round keys of these at least."""
        return tuple(sorted({*self.neighbours(name), *self.dealers} - {name}))

    def tolerates(self, survivors: Collection[str], colluders: int) -> bool:
        """Whether the honest survivors stay connected whichever `colluders` of the nodes are not honest."""
        if self.complete:
            return True
        alive = [name in survivors for name in self.order]
        window = sum(alive[: self.reach])
        weakest = window
        for place in range(len(alive)):
            window += alive[(place + self.reach) % len(alive)] - alive[place]
            weakest = min(weakest, window)
        return 2 * weakest > colluders
