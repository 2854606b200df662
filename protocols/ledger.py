"""A node's budget ledger: the differential-privacy events of one study, signed and chained (DESIGN section 7).

Events say what happened; epsilon is computed from them by whoever asks and stored only as a claim to be checked. The
event of a round is durable before the first noise of that round is drawn, so a crash can overcount but never
undercount.

Threat assumption: the ledger is stored and sent by somebody who wants to change it. What its own node wrote into it
is taken as it stands: a ledger cannot prove that the noise was really drawn. `audit.records` recomputes epsilon from
the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys.errors import VerificationFailed
from keys.identity import Identity
from keys.labels import Label
from protocols.agreement import Agreement, Name, PrivacyUnit
from protocols.chain import GENESIS, ChainWriter, Entry, Hex32, read_chain
from protocols.hospital_noise import NoiseShare

NEIGHBOURING_RELATION: Literal["add-or-remove-one"] = "add-or-remove-one"
HOSPITAL_RELATION: Literal["one-hospital-zero"] = "one-hospital-zero"
ACCOUNTANT: Literal["opacus-rdp"] = "opacus-rdp"

RNG_KIND = "aes-256-ctr/ndtri/4-sum/v2"
"""The noise generator of `secgeo.noise`, as nodes book it."""

RNG_KINDS = frozenset({RNG_KIND, "aes-256-ctr/ndtri/4-sum/v1"})
"""What a ledger may name. v1 had uniforms of 53 bits, of which one in 2^53 became 1 and its noise infinite."""

Number = Annotated[int, Meta(ge=0, lt=1 << 53)]
NonNegative = Annotated[float, Meta(ge=0.0)]


class LedgerOpened(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The first line: whose budget, for which data and study.

    The fingerprint leaves the site with the ledger. A bare hash of the data would confirm guesses at them; keyed with a
    secret of the site it tells an outsider nothing.
    """

    node_id: Name
    agreement_digest: Hex32
    dataset_fingerprint: Hex32
    privacy_unit: PrivacyUnit
    neighbouring_relation: Literal["add-or-remove-one"]
    delta: NonNegative
    epsilon_budget: NonNegative


class DpSgdEvent(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """`steps` DP-SGD steps of one round: Poisson sampling, per-unit clipping, Gaussian noise.

    `transcript_link` is the digest of the last round record that the node has countersigned (zeros before the first). `noise_share` is
    what was added to the update of that round, if hospitals share out noise.
    """

    round: Number
    sample_rate: NonNegative
    noise_multiplier: NonNegative
    max_grad_norm: NonNegative
    steps: Number
    privacy_unit: PrivacyUnit
    dataset_fingerprint: Hex32
    rng_kind: Annotated[str, Meta(max_length=100)]
    transcript_link: Hex32
    noise_share: NoiseShare | None = None


class HospitalClaim(Struct, frozen=True, forbid_unknown_fields=True):
    """What the sums of this study tell of the hospital as a whole, by the noise inside them."""

    delta: NonNegative
    epsilon: NonNegative
    accountant: Literal["opacus-rdp"]
    neighbouring_relation: Literal["one-hospital-zero"]


class EpsilonClaim(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """What the node believes it has spent after `steps_total` steps; null epsilon means infinite (no noise)."""

    steps_total: Number
    delta: NonNegative
    epsilon: NonNegative | None
    accountant: Literal["opacus-rdp"]
    neighbouring_relation: Literal["add-or-remove-one"]
    hospital: HospitalClaim | None = None


class LedgerReopened(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The node was started again, after it had closed the ledger or after a crash.

    A round that was booked but whose update was lost with the crash is trained, and booked, again.
    """

    rounds: Number
    steps_total: Number


class LedgerClosed(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The last line; without it the ledger was cut off. Its link tells when the transcript hides the last rounds."""

    rounds: Number
    steps_total: Number
    transcript_link: Hex32


Body = LedgerOpened | DpSgdEvent | EpsilonClaim | LedgerReopened | LedgerClosed
_LedgerEntry = Entry[Body]


class LedgerWriter(ChainWriter[Body]):
    """Makes ledger lines, signed by the node."""

    def __init__(self, node: Identity, written: Sequence[bytes] = ()) -> None:
        super().__init__(node, Label.LEDGER, _LedgerEntry, written)


def read_ledger(lines: bytes, node_key: Ed25519PublicKey) -> tuple[Body, ...]:
    """Verify the chain and signatures of a ledger.

    Raises:
        VerificationFailed: names the first line that is wrong.
    """
    return tuple(entry.body for entry, _ in read_chain(lines, _LedgerEntry, node_key, Label.LEDGER))


def verify_ledger(
    ledger: Sequence[Body], node_id: str, agreement: Agreement, agreement_digest: bytes
) -> tuple[tuple[DpSgdEvent, ...], tuple[tuple[int, EpsilonClaim], ...], LedgerClosed]:
    """Check what a ledger says, after `read_ledger` has checked its chain; gives its events, its claims and its closing line.

    With each claim goes the number of events before it; the last claim counts them all.

    Raises:
        VerificationFailed: another node or agreement, parameters that are not the agreed ones, noise of an unknown
            generator, rounds told twice, claims that do not count every step or that are too many, or no proper end.
    """
    if not ledger or not isinstance(ledger[0], LedgerOpened):
        raise VerificationFailed("the ledger does not begin with its opening line")
    opened, closed = ledger[0], ledger[-1]
    if opened.node_id != node_id or opened.agreement_digest != agreement_digest.hex():
        raise VerificationFailed("the ledger belongs to another node or study")
    agreed = (agreement.privacy.delta, agreement.privacy.epsilon_budget, agreement.privacy.unit)
    if (opened.delta, opened.epsilon_budget, opened.privacy_unit) != agreed:
        raise VerificationFailed("the ledger was opened with another delta, budget or privacy unit than agreed")
    if not isinstance(closed, LedgerClosed):
        raise VerificationFailed(
            "the ledger has no closing line: the node still runs, its machine died, or lines were cut off; what was spent after the "
            "last line is not known. A node that is started again closes its ledger"
        )
    events: list[DpSgdEvent] = []
    claims: list[tuple[int, EpsilonClaim]] = []
    restarted, lives, total = False, 1, 0
    for body, following in pairwise(ledger[1:]):
        match body:
            case DpSgdEvent():
                if events and body.round + restarted <= events[-1].round:
                    raise VerificationFailed(f"round {body.round} is booked after round {events[-1].round}")
                _verify_event(body, opened, agreement)
                events.append(body)
                restarted, total = False, total + body.steps
            case LedgerReopened():
                if (body.rounds, body.steps_total) != (len(events), total):
                    raise VerificationFailed("the ledger was reopened with another count than its events give")
                restarted, lives = True, lives + 1
            case LedgerClosed() if isinstance(following, LedgerReopened):
                pass
            case EpsilonClaim():
                if body.steps_total != total or body.delta != opened.delta:
                    after = f"after the event of round {events[-1].round}" if events else "before any event"
                    raise VerificationFailed(
                        f"the claim {after} counts {body.steps_total} steps at delta {body.delta:g}, but {total} at {opened.delta:g} are "
                        "booked before it: an event is missing, or one was added"
                    )
                if len(claims) == agreement.study.rounds + lives:
                    raise VerificationFailed(
                        f"there are more claims than a node makes: one for each of {agreement.study.rounds} rounds, and one "
                        "whenever it stops"
                    )
                hospital = agreement.hospital_privacy
                if (None if body.hospital is None else body.hospital.delta) != (hospital and hospital.delta):
                    raise VerificationFailed(
                        "a claim for the whole hospital is missing, or at another delta than agreed"
                    )
                claims.append((len(events), body))
            case _:
                raise VerificationFailed(f"{type(body).__name__} stands in the middle of the ledger")
    if (closed.rounds, closed.steps_total) != (len(events), total) or not claims or claims[-1][1].steps_total != total:
        raise VerificationFailed("the closing line and the last claim do not count every event: one is missing")
    return tuple(events), tuple(claims), closed


def _verify_event(event: DpSgdEvent, opened: LedgerOpened, agreement: Agreement) -> None:
    privacy = agreement.privacy
    agreed = {
        "sample_rate": privacy.sample_rate,
        "noise_multiplier": privacy.noise_multiplier,
        "max_grad_norm": privacy.max_grad_norm,
        "privacy_unit": privacy.unit,
        "dataset_fingerprint": opened.dataset_fingerprint,
        "noise_share": agreement.noise_share if event.steps else None,
    }
    other = [name for name, value in agreed.items() if getattr(event, name) != value]
    if other:
        raise VerificationFailed(f"the event of round {event.round} has another {', '.join(other)} than agreed")
    if event.rng_kind not in RNG_KINDS:
        raise VerificationFailed(
            f"the event of round {event.round} names an unknown noise generator, {event.rng_kind!r}"
        )
    if not 1 <= event.round <= agreement.study.rounds or event.steps not in (0, agreement.training.steps_per_round):
        raise VerificationFailed(f"the event of round {event.round} is outside the agreed rounds or steps")
    if event.round == 1 and event.transcript_link != GENESIS:
        raise VerificationFailed("the first event is linked to a record that cannot exist yet")
