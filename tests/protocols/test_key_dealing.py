"""Who is asked to make the study key, and to seal it to whom: each in turn, so that nobody who fails can hold up the others."""

from protocols import messages as m
from protocols.key_dealing import KeyDealing

KEY, OTHER = b"k" * 32, b"o" * 32


def dealing(*wanting: str, holders: tuple[str, ...] = ()) -> KeyDealing:
    made = KeyDealing()
    for name in holders:
        assert made.joined(name, m.Join(1, KEY), join(name))
    for name in wanting:
        assert not made.joined(name, m.Join(1), join(name))
        made.lacks(name)
    return made


def join(name: str) -> bytes:
    return f"join of {name}".encode()


def sealed(recipient: str, key: bytes = KEY) -> m.SealedKey:
    return m.SealedKey(recipient, key, b"sealed")


def test_one_answer_to_a_join_is_carried_and_no_other() -> None:
    keys = dealing("c", holders=("a", "b"))
    assert keys.deal({"a", "b"}) == ("a", m.DealKey((join("c"),), make=False))
    assert not keys.carries("b", sealed("c")), "nobody asked it"
    assert not keys.carries("a", sealed("c", OTHER)), "another key"
    assert not keys.carries("a", sealed("d")), "nobody wants it"
    assert keys.carries("a", sealed("c"))
    assert not keys.carries("a", sealed("c")), "it has answered"


def test_whoever_sealed_no_key_is_passed_over_until_the_next_round() -> None:
    keys = dealing("c", holders=("a", "b"))
    for dealer in ("a", "b"):
        asked = keys.deal({"a", "b"})
        assert asked is not None
        assert asked[0] == dealer
        assert keys.carries(dealer, sealed("c"))
        keys.left("c")  # what it was sealed was no key to it: it joins again, without one
        keys.lacks("c")
    assert keys.deal({"a", "b"}) is None
    keys.next_round()
    assert keys.deal({"a", "b"}) is not None


def test_those_whose_dealer_left_are_dealt_to_by_another() -> None:
    keys = dealing("c", "d", holders=("a", "b"))
    assert keys.deal({"a", "b"}) == ("a", m.DealKey((join("c"), join("d")), make=False))
    assert keys.deal({"a", "b"}) is None, "they wait for it"
    keys.left("a")
    assert keys.deal({"b"}) == ("b", m.DealKey((join("c"), join("d")), make=False))


def test_every_member_is_asked_once_to_make_the_key_and_only_its_own_is_taken_then() -> None:
    keys = dealing("a", "b", "c")
    assert keys.make() == ("a", m.DealKey((join("b"), join("c")), make=True))
    assert not keys.joined("b", m.Join(1, OTHER), join("b")), "nobody asked it"
    assert keys.make()[0] == "b"
    assert keys.makers == {"a", "b"}
    assert not keys.joined("a", m.Join(1, KEY), join("a")), "it had its turn"
    assert keys.joined("b", m.Join(1, OTHER), join("b"))
    assert keys.key == OTHER
    assert keys.wanting == {"a", "c"}


def test_a_key_that_too_few_hold_gives_way_to_a_new_one() -> None:
    keys = dealing("b", "c", holders=("a",))
    keys.lacks("a")
    assert keys.make()[0] == "a"
    assert keys.joined("a", m.Join(1, OTHER), join("a"))
    assert not keys.joined("b", m.Join(1, KEY), join("b"))
