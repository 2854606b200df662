"""Other parameters than agreed, and inputs that no parameter allows.

A node takes every parameter from the agreement that it has pinned. The weakened node follows the server's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import numpy as np
import pytest
import tomli_w

from audit.attacks.play import Play
from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from protocols import messages as m
from protocols.agreement import Agreement, agreement_digest
from protocols.attempt_node import AttemptNode, Parties
from protocols.encoding import FixedPoint
from protocols.sealing import AttemptId
from secgeo.update import precision_weight
from tests.adversary import weaken
from tests.adversary.attackers import behaving
from tests.adversary.test_results import wrong
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, make_network, names
from tests.protocols.test_attempt import check_sum, expected

# --- 4

VICTIM, COLLUDERS = "hospital-00", ("hospital-02", "hospital-03", "hospital-04")


def changed(agreement: Agreement, section: str, **fields: Any) -> Agreement:
    return msgspec.structs.replace(
        agreement, **{section: msgspec.structs.replace(getattr(agreement, section), **fields)}
    )


def digest_of(agreement: Agreement) -> bytes:
    """The digest of an agreement that need not keep the rules."""
    return agreement_digest(tomli_w.dumps(msgspec.to_builtins(agreement)).encode())


def start() -> Network:
    """Five members, one of whom has small batches, so that its precision weight is not 1."""
    network = make_network(5, size=1500, threshold=5)
    small = msgspec.structs.replace(network.agreement.members[0], expected_batch_size=0.1)
    network.agreement = msgspec.structs.replace(network.agreement, members=(small, *network.agreement.members[1:]))
    network.digest = digest_of(network.agreement)
    network.parties = Parties(network.agreement, network.digest, network.parties.public_keys)
    network.nodes = {name: network.new_node(name) for name in network.nodes}
    return network


def serve(section: str, fields: dict[str, Any], *, follow: bool) -> Play:
    """The aggregator runs the study under another agreement; with `follow` the nodes take it from there."""
    network = start()
    pinned_digest = network.digest
    other = changed(network.agreement, section, **fields)
    other_digest = digest_of(other)
    pinned, theirs = network.parties, Parties(other, other_digest, network.parties.public_keys)
    network.aggregator = network.new_aggregator(theirs)
    if follow:
        network.agreement, network.digest, network.parties = other, other_digest, theirs
        network.nodes = {name: network.new_node(name) for name in network.nodes}
    network.parties, attack = pinned, Play(network, colluders=COLLUDERS)
    assert network.digest == (other_digest if follow else pinned_digest)
    network.run()
    return attack


PARAMETERS = {
    "threshold": ("secure_sum", {"threshold": 3, "minimum_cohort": 3}),
    "ring": ("secure_sum", {"ring_bits": 20, "value_bits": 17}),
    "clip": ("secure_sum", {"value_bits": 17}),
    "precision of values": ("secure_sum", {"fraction_bits": 2}),
    "precision rule": ("precision", {"rule": "equal", "tau_squared": 9.0}),
}


def harmed(attack: Play, what: str) -> bool:
    """What the other parameter is good for."""
    network = attack.network
    if what == "threshold":
        return attack.knowledge.recovers(VICTIM)
    if what == "precision rule":
        agreement = network.nodes[VICTIM]._parties.agreement
        pinned = network.parties.agreement
        return precision_weight(agreement, agreement.members[0]) != precision_weight(pinned, pinned.members[0])
    return wrong(network, VICTIM)


@pytest.mark.parametrize("what", PARAMETERS)
def test_other_parameters_than_agreed(what: str) -> None:
    section, fields = PARAMETERS[what]
    assert harmed(serve(section, fields, follow=True), what)

    attack = serve(section, fields, follow=False)
    assert not harmed(attack, what)
    assert not any(attack.knowledge.attempts[1, 1].chunks.values())
    assert not any(attack.network.sums.values())


@pytest.mark.parametrize("what", PARAMETERS)
def test_an_order_under_another_agreement(what: str) -> None:
    section, fields = PARAMETERS[what]
    network = start()
    digest = digest_of(changed(network.agreement, section, **fields))
    order = m.encode(network.consortium.identities[AGGREGATOR], AttemptId(digest, 1, 0), m.RoundOpen(0))
    with pytest.raises(RemoteProtocolError, match="works under another study agreement") as caught:
        network.nodes[VICTIM].receive(order)
    assert caught.value.peer == m.AGGREGATOR


@pytest.mark.parametrize("what", PARAMETERS)
def test_other_parameters_under_the_pinned_digest(what: str) -> None:
    """It speaks of the pinned agreement and works by another one."""
    section, fields = PARAMETERS[what]
    network = start()
    other = changed(network.agreement, section, **fields)
    network.aggregator = network.new_aggregator(Parties(other, network.digest, network.parties.public_keys))
    attack = Play(network, colluders=COLLUDERS)
    network.run()
    assert not harmed(attack, what)
    for name in network.nodes:
        for summed in network.sums[name]:
            check_sum(network, name, summed.round)


# --- 13

BAD = "hospital-01"


def submit(value: float, guard: AbstractContextManager[None]) -> Network:
    """One node's training comes to nothing good in one value."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    vectors = network.vectors

    def spoilt(name: str, number: int) -> np.ndarray:
        vector = vectors(name, number)
        if name == BAD:
            vector[5] = value
        return vector

    network.vectors = spoilt
    with guard:
        network.run()
    network.vectors = vectors
    return network


def shift(network: Network) -> float:
    """How far the sum at the spoilt place is from the sum of the others' values; infinite if there is no sum any more."""
    if not network.sums["hospital-00"]:
        return float("inf")
    summed = network.sums["hospital-00"][0]
    others = tuple(name for name in summed.contributors if name != BAD)
    return float(abs(summed.total[5] - expected(network, others)[5]))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite(value: float) -> None:
    assert shift(submit(value, weaken.finite_inputs())) > 100

    network = submit(value, nullcontext())
    assert isinstance(network.faults[BAD], LocalProtocolError)
    assert "NaN or infinity" in str(network.faults[BAD])
    left = tuple(name for name in names(5) if name != BAD)
    assert check_sum(network, "hospital-00") == left


@pytest.mark.parametrize("value", [300.0, -300.0])
def test_inputs_out_of_range(value: float) -> None:
    assert shift(submit(value, weaken.agreed_range())) > 299

    network = submit(value, nullcontext())
    limit = FixedPoint.from_agreement(network.agreement).limit
    assert shift(network) == pytest.approx(limit)
    assert not network.faults


def test_a_member_that_encodes_out_of_range_is_bounded_by_the_range_of_the_sum_only() -> None:
    """There is no proof of range: a malicious member's share of the sum is bounded by n times the range, not by one."""

    def own_encoding(genuine: Any, self: AttemptNode, body: m.Credit) -> Any:
        with weaken.agreed_range():
            return genuine(self, body)

    with behaving(lambda attempt: attempt._me == BAD, _on_credit=own_encoding):
        assert shift(submit(300.0, nullcontext())) == pytest.approx(300)
        network = submit(5000.0, nullcontext())
    assert not any(network.sums.values())
    assert all(isinstance(fault, VerificationFailed) for fault in network.faults.values())
    assert "hospital-01" not in str(network.faults["hospital-00"])  # nobody can tell who it was
