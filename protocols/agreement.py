"""The study agreement: every parameter of a study, in one TOML document signed by the authority.

No parameter comes from the server. A node pins the agreement by its digest, checks the authority's signature, and compares
it with its own local policy (`protocols.policy`) before it trains. Everything here is a pure function of bytes.

The no-overflow rule (DESIGN section 6) is checked when the agreement is made and again when it is read:
`n_max * (2^value_bits - 1) < 2^ring_bits`, with n_max the number of members. Where sums are of ciphertexts, so is the headroom of
their coefficients and of their noise (`protocols.packing`).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct

from keys.errors import ConfigError
from keys.labels import Label
from protocols.hospital_noise import HEADROOM_STDS, LEAST_STD_STEPS, NoiseShare, noise_share
from protocols.packing import choose

MINIMUM_CONTRIBUTORS = 3
"""A sum of fewer contributors is never opened: with two, each would learn the other's vector."""

MAXIMUM_MEMBERS = 256
"""With every pair of nodes sharing a seed (complete graph), the key and seed messages of one round stay below 1 MiB."""

VALUE_BITS = 26
"""Of an encoded value, unless the agreement says otherwise."""

CHUNK_BLOCKS = 32
"""Ciphertexts of one chunk at most: below 1 MiB."""

COMPLETE_GRAPH_LIMIT = 16
"""Up to so many members every pair shares a seed; above, a sparse graph may be agreed."""

NOISE_RANGE = (0.3, 1e4)
MAXIMUM_STEPS = 10_000_000
"""Noise multipliers of DP-SGD (or 0), and steps of a study: outside, accountants have no answer, and no claim could be verified."""

Name = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9-]{0,62}\Z")]
Sha256Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Protocol = Literal["masked", "layered", "homomorphic"]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Study(Struct, frozen=True, forbid_unknown_fields=True):
    """What the study is called and how long it runs."""

    id: Name
    rounds: Annotated[int, Meta(ge=1, le=10_000)]
    classes: Annotated[int, Meta(ge=2, le=10_000)]
    title: Annotated[str, Meta(max_length=200)] = ""


class RosterPin(Struct, frozen=True, forbid_unknown_fields=True):
    """The signed roster that this agreement was made with. A later version (same or higher epoch) may replace it."""

    epoch: Annotated[int, Meta(ge=1)]
    version: Annotated[int, Meta(ge=1)]
    digest: Sha256Hex
    authority_fingerprint: Sha256Hex


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """One hospital: its roster name, certificate, the one modality it holds, and its public expected batch size b."""

    node_id: Name
    certificate_fingerprint: Sha256Hex
    modality: Name
    expected_batch_size: Positive


class SecureSum(Struct, frozen=True, forbid_unknown_fields=True):
    """Which protocol sums, among how many, over which graph, and in which fixed-point ring.

    `threshold` signatures open a survivor set. With `neighbours` = 0 every pair of nodes shares a seed and `threshold`
    shares recover a secret; otherwise each node shares seeds with that many others and `share_threshold` of them do.
    `plain_bits` is the plaintext modulus of BFV, 2^plain_bits, 0 for `masked`; `ring_bits` is what the sum of one value takes.
    """

    protocol: Protocol
    minimum_cohort: Annotated[int, Meta(ge=MINIMUM_CONTRIBUTORS, le=MAXIMUM_MEMBERS)]
    threshold: Annotated[int, Meta(ge=2, le=MAXIMUM_MEMBERS)]
    neighbours: Annotated[int, Meta(ge=0, lt=MAXIMUM_MEMBERS)] = 0
    share_threshold: Annotated[int, Meta(ge=0, lt=MAXIMUM_MEMBERS)] = 0
    ring_bits: Literal[32, 24, 20] = 32
    plain_bits: Literal[0, 46, 50] = 0
    value_bits: Annotated[int, Meta(ge=8, le=30)] = VALUE_BITS
    fraction_bits: Annotated[int, Meta(ge=1, le=29)] = 20
    chunk_values: Annotated[int, Meta(ge=1024, le=262_144)] = 262_144
    max_attempts: Annotated[int, Meta(ge=1, le=16)] = 3

    @property
    def shares_needed(self) -> int:
        """How many shares recover one node's secret."""
        return self.share_threshold or self.threshold

    @property
    def encrypted(self) -> bool:
        """Whether uploads are ciphertexts, so that there is a study key."""
        return self.protocol != "masked"

    @property
    def masked(self) -> bool:
        """Whether uploads are masked, before they are encrypted if they are."""
        return self.protocol != "homomorphic"


PrivacyUnit = Literal["record", "patient"]


class Privacy(Struct, frozen=True, forbid_unknown_fields=True):
    """The DP-SGD parameters that every node uses, and the budget that no node may pass.

    The neighbouring relation is add or remove one `unit`; sampling is Poisson over units with rate `sample_rate`. With `patient` the
    gradients of a patient's records are summed before they are clipped; of each the first `records_per_patient` are used.
    A noise multiplier of 0 means no differential privacy (for baselines); epsilon is then infinite.
    """

    unit: PrivacyUnit
    sample_rate: Annotated[float, Meta(gt=0.0, le=1.0)]
    noise_multiplier: NonNegative
    max_grad_norm: Positive
    delta: Annotated[float, Meta(gt=0.0, lt=0.1)]
    epsilon_budget: Positive
    records_per_patient: Annotated[int, Meta(ge=0, le=10_000)] = 0


class HospitalPrivacy(Struct, frozen=True, forbid_unknown_fields=True):
    """Noise inside the secure sum that hides a whole hospital, beside the noise of DP-SGD (docs/privacy.md, docs/adr/0016).

    The neighbouring relation is: one hospital's updates are zero. `max_update_norm` bounds the L2 norm of an update's weighted dB;
    the noise of a sum has a standard deviation of at least `noise_multiplier` times that.
    """

    noise_multiplier: Positive
    max_update_norm: Positive
    delta: Annotated[float, Meta(gt=0.0, lt=0.1)]
    epsilon_budget: Positive


class Training(Struct, frozen=True, forbid_unknown_fields=True):
    """The local objective and optimiser (DESIGN section 8)."""

    steps_per_round: Count
    learning_rate: Positive
    local_learning_rate: Positive
    warmup_steps: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    warmup_learning_rate: Positive = 0.003
    alignment_weight: NonNegative = 1.0
    coordinate_weight: NonNegative = 1.0
    coordinate_rank: Count = 8
    merge_every_rounds: Annotated[int, Meta(ge=0, le=10_000)] = 0


class Precision(Struct, frozen=True, forbid_unknown_fields=True):
    """The precision rule of the weighted average. P0: w = 1 / (tau_squared + v), clamped to [1/clamp, clamp].

    `equal` gives every node weight 1 (plain FedAvg).
    """

    rule: Literal["P0", "equal"] = "P0"
    tau_squared: Positive = 1.0
    clamp: Annotated[float, Meta(ge=1.0, le=1e6)] = 8.0
    ridge: NonNegative = 0.0


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """The public frozen trunk and its low-rank adapters; all weights follow from `seed`, pinned by `trunk_digest`."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    trunk_digest: Sha256Hex
    width: Annotated[int, Meta(ge=8, le=8192)] = 64
    layers: Annotated[int, Meta(ge=1, le=64)] = 2
    heads: Annotated[int, Meta(ge=1, le=64)] = 4
    tokens: Annotated[int, Meta(ge=1, le=4096)] = 4
    feedforward: Annotated[int, Meta(ge=8, le=32768)] = 128
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    alpha: Positive = 8.0


class Modality(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of input: its tokeniser, the shape of one record, and the digest of its view of the public anchors."""

    name: Name
    tokeniser: Literal["tabular", "image", "signal", "embedding"]
    shape: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=3)]
    anchor_digest: Sha256Hex


class Anchors(Struct, frozen=True, forbid_unknown_fields=True):
    """How many public anchors there are; the views are pinned per modality."""

    count: Annotated[int, Meta(ge=4, le=8192)]


class Deadlines(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the aggregator waits in each phase before it goes on without those who are missing."""

    join_seconds: Positive = 120.0
    train_seconds: Positive = 600.0
    phase_seconds: Positive = 30.0


class Agreement(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole study agreement. Build it with `read_agreement`; a value that exists satisfies every rule below."""

    study: Study
    roster: RosterPin
    secure_sum: SecureSum
    privacy: Privacy
    training: Training
    precision: Precision
    model: Model
    anchors: Anchors
    deadlines: Deadlines
    modalities: Annotated[tuple[Modality, ...], Meta(min_length=1, max_length=64)]
    members: Annotated[tuple[Member, ...], Meta(min_length=MINIMUM_CONTRIBUTORS, max_length=MAXIMUM_MEMBERS)]
    hospital_privacy: HospitalPrivacy | None = None

    def member(self, node_id: str) -> Member:
        """The member of that name.

        Raises:
            ConfigError: no hospital of this name takes part.
        """
        for member in self.members:
            if member.node_id == node_id:
                return member
        raise ConfigError(
            f"{node_id} is not a member of study {self.study.id}; ask the authority for an agreement that names it"
        )

    def modality(self, name: str) -> Modality:
        """The modality of that name.

        Raises:
            ConfigError: the agreement has none of this name.
        """
        for modality in self.modalities:
            if modality.name == name:
                return modality
        raise ConfigError(f"study {self.study.id} has no modality {name!r}")

    @property
    def colluders_tolerated(self) -> int:
        """How many members may collude with an aggregator that deviates, wherever they stand in the graph (docs/adr/0013).

        None where only the study key protects an upload, since every member holds it. Otherwise they recover no secret from
        their shares, and cannot have two survivor sets signed: each set needs `threshold` votes, the
        colluders vote for both, and every honest member for one only. And two of the smallest cohort are honest at least: what
        colluders leave of a sum when they take their own off is nobody's alone.
        """
        ring = self.secure_sum
        if not ring.masked:
            return 0
        return min(ring.shares_needed - 1, 2 * ring.threshold - len(self.members) - 1, ring.minimum_cohort - 2)

    @property
    def noise_share(self) -> NoiseShare | None:
        """What each hospital adds to its update, if hospitals share out noise."""
        if self.hospital_privacy is None:
            return None
        counted = self.secure_sum.minimum_cohort - max(1, self.colluders_tolerated)  # every member knows its own share
        step = 2.0**-self.secure_sum.fraction_bits
        return noise_share(self.hospital_privacy.noise_multiplier, self.hospital_privacy.max_update_norm, counted, step)

    @property
    def total_steps(self) -> int:
        """DP-SGD steps of the whole study at one node."""
        return self.study.rounds * self.training.steps_per_round


def agreement_digest(document: bytes) -> bytes:
    """The 32-byte digest by which nodes pin an agreement, over the exact bytes of the TOML file."""
    return hashlib.sha256(Label.AGREEMENT + document).digest()


def read_agreement(document: bytes) -> Agreement:
    """Decode and check an agreement. The signature is checked apart, over the same bytes.

    Raises:
        ConfigError: not TOML, an unknown or missing key, a value out of range, or a rule that does not hold.
    """
    if len(document) > 1 << 22:
        raise ConfigError("the agreement is larger than 4 MiB; this is not an agreement")
    try:
        agreement = msgspec.toml.decode(document, type=Agreement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the agreement cannot be read: {error}") from None
    check_rules(agreement)
    return agreement


def write_agreement(agreement: Agreement) -> bytes:
    """Encode an agreement as TOML, after checking every rule, so that an unsafe agreement cannot be made."""
    check_rules(agreement)
    return tomli_w.dumps(msgspec.to_builtins(agreement)).encode()


def check_rules(agreement: Agreement) -> None:
    """Check the rules that span several fields.

    Raises:
        ConfigError: names the first rule that fails and how to mend it.
    """
    for rule, holds in _rules(agreement):
        if not holds:
            raise ConfigError(f"the agreement breaks a rule: {rule}")


def _rules(agreement: Agreement) -> list[tuple[str, bool]]:
    ring, n_max = agreement.secure_sum, len(agreement.members)
    names = [member.node_id for member in agreement.members]
    modalities = [modality.name for modality in agreement.modalities]
    return [
        (
            f"no overflow: {n_max} members * (2^{ring.value_bits} - 1) must be below 2^{ring.ring_bits}; lower value_bits",
            n_max * (2**ring.value_bits - 1) < 2**ring.ring_bits,
        ),
        (
            "fraction_bits must be below value_bits, else nothing but zero can be encoded",
            ring.fraction_bits < ring.value_bits,
        ),
        (
            f"threshold must be at least {(n_max + 1) // 2 + 1} with {n_max} members, else a colluder could have two survivor sets signed",
            2 * ring.threshold > n_max + 1,
        ),
        (
            "threshold must not exceed minimum_cohort, else a permitted cohort could not recover a dropout",
            ring.threshold <= ring.minimum_cohort,
        ),
        ("minimum_cohort must not exceed the number of members", ring.minimum_cohort <= n_max),
        ("chunk_values must be a multiple of 1024, the row of the tag", ring.chunk_values % 1024 == 0),
        *(
            _ciphertext_rules(ring, n_max)
            if ring.encrypted
            else [("plain_bits is not for `masked`", ring.plain_bits == 0)]
        ),
        *_graph_rules(ring, n_max),
        ("members must have distinct node ids", len(set(names)) == n_max),
        (
            "members must have distinct certificates",
            len({m.certificate_fingerprint for m in agreement.members}) == n_max,
        ),
        ("modalities must have distinct names", len(set(modalities)) == len(modalities)),
        (
            "every member's modality must be listed in modalities",
            all(m.modality in modalities for m in agreement.members),
        ),
        ("model width must be a multiple of heads", agreement.model.width % agreement.model.heads == 0),
        (
            "rank must not exceed width or feedforward",
            agreement.model.rank <= min(agreement.model.width, agreement.model.feedforward),
        ),
        (
            "coordinate_rank must be below the number of anchors",
            agreement.training.coordinate_rank < agreement.anchors.count,
        ),
        (
            "records_per_patient must be 1 or more if the privacy unit is a patient, and 0 if it is a record",
            (agreement.privacy.unit == "patient") == (agreement.privacy.records_per_patient > 0),
        ),
        (
            f"noise_multiplier must be from {NOISE_RANGE[0]:g} to {NOISE_RANGE[1]:g} (or 0: no privacy): no accountant verifies others",
            agreement.privacy.noise_multiplier == 0.0
            or NOISE_RANGE[0] <= agreement.privacy.noise_multiplier <= NOISE_RANGE[1],
        ),
        (
            f"rounds times steps_per_round must not exceed {MAXIMUM_STEPS:,} steps: no accountant verifies more",
            agreement.total_steps <= MAXIMUM_STEPS,
        ),
        *_hospital_rules(agreement),
        ("all numbers must be finite", all(_finite(section) for section in msgspec.structs.astuple(agreement))),
    ]


def _hospital_rules(agreement: Agreement) -> list[tuple[str, bool]]:
    ring, share = agreement.secure_sum, agreement.noise_share
    if share is None:
        return []
    limit = (2 ** (ring.value_bits - 1) - 1) / 2**ring.fraction_bits
    return [
        (
            f"a noise share of standard deviation {share.std:.3g} needs a finer grid: at least {LEAST_STD_STEPS:g} steps of "
            f"2^-{ring.fraction_bits}; raise fraction_bits",
            share.fine_enough,
        ),
        (
            f"max_update_norm {share.max_update_norm:g} and {HEADROOM_STDS:g} times the noise of {share.std:.3g} must lie within the "
            f"encoding's {limit:.4g}; lower fraction_bits",
            share.fits(limit),
        ),
    ]


def _ciphertext_rules(ring: SecureSum, n_max: int) -> list[tuple[str, bool]]:
    packing = choose(ring.value_bits, n_max)
    block, plain_bits = packing.block_values, packing.parameters.plain_bits
    return [
        ("ring_bits must be 32 where ciphertexts are summed", ring.ring_bits == 32),
        (
            f"plain_bits must be {plain_bits} for {n_max} values of {ring.value_bits} bits",
            ring.plain_bits == plain_bits,
        ),
        (
            f"chunk_values must be a multiple of the {block} values of a ciphertext, and at most {CHUNK_BLOCKS * block}",
            ring.chunk_values % block == 0 and ring.chunk_values <= CHUNK_BLOCKS * block,
        ),
        ("neighbours and share_threshold are for masks", ring.masked or ring.neighbours == ring.share_threshold == 0),
    ]


def fit_chunks(ring: dict[str, Any], members: int) -> None:
    """Fill in the size of the chunks of `masked`, where it is not given: 1 MiB up to 16 members, and with more as much smaller as they are
    more. A chunk of each member waits at the aggregator, so what waits there does not grow with their number."""
    ring.setdefault("chunk_values", 262_144 * 16 // max(16, members) // 1024 * 1024)


def fit_ciphertexts(ring: dict[str, Any], n_max: int) -> None:
    """Fill in what follows from the other fields of a `secure_sum` section, where it is not given.

    Raises:
        ConfigError: no BFV parameters carry such sums.
    """
    packing = choose(ring.get("value_bits", VALUE_BITS), n_max)
    ring.setdefault("plain_bits", packing.parameters.plain_bits)
    ring.setdefault("chunk_values", CHUNK_BLOCKS * packing.block_values)


def _graph_rules(ring: SecureSum, n_max: int) -> list[tuple[str, bool]]:
    if ring.neighbours == 0:
        return [("share_threshold needs neighbours: in a complete graph threshold counts", ring.share_threshold == 0)]
    least = (n_max + ring.share_threshold - 1) // 2 + 1
    return [
        (f"a sparse graph needs more than {COMPLETE_GRAPH_LIMIT} members", n_max > COMPLETE_GRAPH_LIMIT),
        (
            "neighbours must be even, at least 4 and below members - 1 (0: complete graph)",
            ring.neighbours % 2 == 0 and 4 <= ring.neighbours < n_max - 1,
        ),
        ("share_threshold must be from 2 to neighbours", 2 <= ring.share_threshold <= ring.neighbours),
        (
            f"threshold must be at least {least} with {n_max} members and a share_threshold of {ring.share_threshold}, "
            "else colluders could have two survivor sets signed",
            ring.threshold >= least,
        ),
    ]


def sparse_graph(members: int) -> tuple[int, int]:
    """The recommended (neighbours, share_threshold): (0, 0), the complete graph, up to 16 members; else k = 4 ceil(log2 n).

    Two thirds of the neighbours recover a secret: k - share_threshold of them may be lost, share_threshold - 1 collude.
    """
    if members <= COMPLETE_GRAPH_LIMIT:
        return 0, 0
    neighbours = 4 * (members - 1).bit_length()
    return (0, 0) if neighbours >= members - 1 else (neighbours, 2 * neighbours // 3)


def _finite(value: object) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    if isinstance(value, Struct):
        return all(_finite(field) for field in msgspec.structs.astuple(value))
    if isinstance(value, tuple):
        return all(_finite(item) for item in value)
    return True
