"""The aggregator's part in dealing the study key: who lacks it, and who is asked to make it or to seal it to whom.

The study key is the secret that members encrypt their uploads under. The aggregator never holds it: it knows its id, and carries
seals that it cannot open. Whoever it asks may be dishonest or die, so all are asked one after the other: to make a key once, to
seal it once a round.
"""

from __future__ import annotations

from collections.abc import Set

from protocols import messages as m


class KeyDealing:
    """Keeps account of the study key for one study. Members are named by their node id.

    Attributes:
        key: the id of the study key; empty while nobody has shown one.
    """

    def __init__(self) -> None:
        self.key = b""
        self._said: dict[str, bytes] = {}
        self._wanting: dict[str, str] = {}
        """Who lacks the key, and who was asked to deal it."""
        self._makers: list[str] = []
        self._dealt: set[tuple[str, bytes]] = set()
        """Who has sealed a key in answer to which Join, in this round: it is not asked again, whatever that was."""
        self._dealer = ""

    @property
    def wanting(self) -> Set[str]:
        """Who lacks the key."""
        return self._wanting.keys()

    @property
    def makers(self) -> Set[str]:
        """Who has been asked to make one."""
        return set(self._makers)

    def joined(self, peer: str, body: m.Join, data: bytes) -> bool:
        """Take a member's Join: whether it holds the study's key. The first that is shown is it, or the one of whom we asked to make it."""
        self._said[peer] = data
        if not self.key and body.study_key != m.NO_KEY and peer in (self._makers[-1:] or [peer]):
            self.key = body.study_key
        if body.study_key != self.key:
            return False
        self._wanting.pop(peer, None)
        return True

    def lacks(self, peer: str) -> None:
        """This member is here and has not the key."""
        self._wanting[peer] = ""

    def left(self, peer: str) -> None:
        """This member is away, and deals nothing."""
        self._wanting.pop(peer, None)
        self._wanting = {name: "" if asked == peer else asked for name, asked in self._wanting.items()}

    def next_round(self) -> None:
        """Whoever was asked to deal has not; it may be asked again."""
        self._dealt.clear()
        self._wanting = dict.fromkeys(self._wanting, "")

    def make(self) -> tuple[str, m.DealKey]:
        """The next of those who want a key is to make a new one, and to seal it to all others of them."""
        self.key = b""
        maker = min(self._wanting.keys() - set(self._makers))
        self._makers.append(maker)
        others = [name for name in sorted(self._wanting) if name != maker]
        self._wanting |= dict.fromkeys(others, maker)
        return maker, m.DealKey(tuple(self._said[name] for name in others), make=True)

    def deal(self, holders: Set[str]) -> tuple[str, m.DealKey] | None:
        """The next of the holders is to seal the key to those for whom nobody was asked. None if there is nobody to ask, or for."""
        waiting = sorted(name for name, dealer in self._wanting.items() if not dealer)
        for dealer in sorted(holders, key=lambda name: (name <= self._dealer, name)):
            unserved = [name for name in waiting if (dealer, self._said[name]) not in self._dealt]
            if unserved:
                self._dealer = dealer
                self._wanting |= dict.fromkeys(unserved, dealer)
                return dealer, m.DealKey(tuple(self._said[name] for name in unserved), make=False)
        return None  # All have sealed something to them that was no key to them; the next who joins is asked.

    def carries(self, dealer: str, body: m.SealedKey) -> bool:
        """Whether what this holder has sealed is passed on: it was asked for it, and it is the first answer to this Join."""
        if self._wanting.get(body.recipient) != dealer or body.key_id != self.key:
            return False
        answer = dealer, self._said[body.recipient]
        if answer in self._dealt:
            return False
        self._dealt.add(answer)
        return True
