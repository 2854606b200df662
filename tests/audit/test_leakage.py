"""Leakage audit: attacks work where nothing protects, fail on ours, and verdicts follow from the evidence alone."""

import copy
import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from audit.leakage import OBSERVATIONS, LeakageEvidence, Rate, auc, collect, dp_line, judge, rate_at, recovered, roc
from audit.leakage.evidence import CANDIDATES, UNCLIPPED
from audit.leakage.first_order import Whitebox
from audit.leakage.inversion import ROUNDING, Clue, Prior, clues_of, invert_all
from audit.leakage.scene import LEAST_TRAININGS, SIZES, STEP_OVERHEAD, Scene, protected_as, take_records, vary
from audit.leakage.scores import clopper_pearson, rates
from audit.leakage.sent import Uploads
from audit.leakage.verdicts import crosses
from audit.target import Target
from keys.errors import ConfigError
from protocols.agreement import SecureSum, check_rules, fit_ciphertexts
from protocols.ciphertexts import SEED_BYTES, pack_words
from protocols.encoding import FixedPoint
from protocols.packing import DEGREE, choose
from protocols.prg import MaskSet
from secgeo.datasets import LabelledRecords
from secgeo.noise import NoiseSource
from secgeo.training import CryptographicDPOptimizer
from tests.secgeo import tiny_study

SMALL = replace(
    SIZES["fast"], trainings={"unprotected": 12, "ours": 30}, records=4, rounds=1, warmup=1, noise_samples=40
)
INVERSIONS = tuple(
    f"gradient inversion on {seen}"
    for seen in ("a raw update", "the aggregate", "the released adapter", "the Gram matrix of the anchors")
)
UPLOADS = (
    "membership inference on a protected upload, canaries",
    "membership inference on a protected upload, records",
    "gradient inversion on a protected upload",
)


def make_target(**sections: dict) -> Target:
    study = tiny_study.agreement(**{"privacy": {"noise_multiplier": 2.0}} | sections)
    member = study.members[0]
    kind = member.modality
    records, others = tiny_study.records(kind, 24), tiny_study.records(kind, 60, seed=8)
    return Target(study, member, records, others, tiny_study.anchors(kind), "tiny")


def run(target: Target, **sizes: object) -> LeakageEvidence:
    """Coins, samples and noise are the same at every call: with so few trainings an attack fails by chance once in some ten."""
    keys = itertools.count(7000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("audit.target.NoiseSource", lambda: NoiseSource(next(keys).to_bytes(32, "big")))
        patch.setitem(SIZES, "fast", replace(SMALL, **sizes))
        return collect(target, profile="fast", progress=lambda what, done: None, seed=5)


def place(observation: str, candidates: str) -> int:
    """Of a finding of membership inference among all of leakage."""
    return 2 * OBSERVATIONS.index(observation) + CANDIDATES.index(candidates)


def verdicts(evidence: LeakageEvidence, target: Target) -> dict[str, str]:
    return {finding.name: finding.status for finding in judge(evidence, target.agreement)}


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target()


@pytest.fixture(scope="module")
def evidence(target: Target) -> LeakageEvidence:
    return run(target)


def change(evidence: LeakageEvidence, observation: str, protection: str, **fields: object) -> LeakageEvidence:
    """The evidence with other fields in all membership rows of one observation and protection."""
    rows = [
        msgspec.structs.replace(row, **fields)
        if (row.observation, row.protection) == (observation, protection)
        else row
        for row in evidence.membership
    ]
    return msgspec.structs.replace(evidence, membership=rows)


def change_inversion(evidence: LeakageEvidence, observation: str, **fields: object) -> LeakageEvidence:
    """The evidence with other fields in the inversion of one observation on ours."""
    rows = [
        msgspec.structs.replace(row, **fields) if (row.observation, row.protection) == (observation, "ours") else row
        for row in evidence.inversion
    ]
    return msgspec.structs.replace(evidence, inversion=rows)


# --- sizes, and gradients that are not computed twice


def test_a_large_model_is_trained_less_often_but_often_enough(target):
    """Sizes follow from the agreement and the model alone."""
    agreement, size = target.agreement, SIZES["fast"]
    steps = min(size.rounds, agreement.study.rounds - 1) * agreement.training.steps_per_round
    fits = size.work / (size.trainings["ours"] * steps) - STEP_OVERHEAD
    assert size.affordable(agreement, int(fits) - 1) == size.trainings
    some = size.affordable(agreement, int(1.3 * (fits + STEP_OVERHEAD)) - STEP_OVERHEAD)
    assert LEAST_TRAININGS["ours"] < some["ours"] < size.trainings["ours"]
    assert size.affordable(agreement, 10**9) == LEAST_TRAININGS
    few = replace(size, trainings={"unprotected": 3, "ours": 5})
    assert few.affordable(agreement, 10**9) == few.trainings
    full = SIZES["full"]
    assert full.affordable(agreement, 10**9) == full.trainings


def test_the_sizes_that_were_used_are_told(target):
    evidence = run(target, work=1.0, trainings=SIZES["fast"].trainings)
    assert evidence.settings.trainings == LEAST_TRAININGS["ours"]
    assert evidence.settings.trainings_unprotected == LEAST_TRAININGS["unprotected"]
    scores = [row for row in evidence.membership if (row.observation, row.protection) == ("update", "ours")]
    assert sum(len(row.members) + len(row.others) for row in scores) == LEAST_TRAININGS["ours"] * (4 + 16)
    assert "broken" not in verdicts(evidence, target).values()
    assert judge(evidence, target.agreement)[0].detail.startswith("24 trainings of ours, 12 unprotected; ")


@pytest.mark.parametrize("limit", [0.3, UNCLIPPED])
def test_the_attackers_gradients_are_those_of_the_trainer(target, limit):
    clipped = make_target(privacy={"noise_multiplier": 0.6 / limit, "max_grad_norm": limit})
    trainer, whitebox = clipped.trainer(), Whitebox(clipped)
    for _ in range(3):
        trainer.step()
    whitebox.take(trainer)
    trainer._private_gradient(np.ones(len(clipped.records), np.bool_))
    rows = trainer._optimizer.vector.grad_sample.double()
    rows = rows / (rows.norm(dim=1, keepdim=True) / limit).clamp(min=1.0)
    records = torch.from_numpy(clipped.records.features).double(), torch.from_numpy(clipped.records.labels)
    directions = torch.randn(whitebox.take(trainer).numel(), 3, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        found, projected = whitebox.gradients(*records), whitebox.projected(*records, directions)
        shared = whitebox.gradients(*records, shared=True)
    torch.testing.assert_close(found, rows, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(shared, found[:, : whitebox.shared])
    torch.testing.assert_close(projected, found @ directions)


def test_what_tells_the_same_is_searched_once(evidence):
    def effect(features, labels):
        return np.zeros((len(labels), 5))

    seen = np.random.default_rng(0).normal(size=(3, 5))
    clue = Clue(seen, effect, 0.1)
    assert replace(clue, seen=seen * (1.0 + 0.5 * ROUNDING)).tells_as(clue)
    for other in (
        replace(clue, seen=seen + np.array([[0.0], [0.1], [0.0]])),
        replace(clue, seen=seen[:2]),
        replace(clue, noise=0.2),
        replace(clue, together=2),
        replace(clue, effect=lambda features, labels: effect(features, labels)),
    ):
        assert not other.tells_as(clue)
    rows = {(row.observation, row.protection): row for row in evidence.inversion}
    for protection in ("ours", "unprotected"):
        assert rows["aggregate", protection].similarity == rows["adapter", protection].similarity


# --- the attacks


def test_attacks_work_where_nothing_protects(evidence):
    canaries = [row for row in evidence.membership if (row.protection, row.candidates) == ("unprotected", "canaries")]
    assert {row.observation for row in canaries} == set(OBSERVATIONS)
    for row in canaries:
        assert auc(row.members, row.others) > 0.85, row.observation
        assert rate_at(row.members, row.others, 0.01).tpr > 0.3, row.observation
    inverted = [row for row in evidence.inversion if row.protection == "unprotected"]
    assert {row.observation for row in inverted} == set(OBSERVATIONS)
    for row in inverted:
        middle, chance = recovered(row)
        assert middle > 0.9, row.observation
        assert chance < 1e-3, row.observation
        assert row.labels_right >= 6, row.observation


def test_they_fail_on_ours(evidence, target):
    found = verdicts(evidence, target)
    assert len(found) == 15
    assert {status for name, status in found.items() if not name.endswith("records")} == {"held"}
    of_records = [status for name, status in found.items() if name.endswith("records")]
    assert of_records.count("held") >= 3  # so few scores do not always tell
    assert "broken" not in of_records
    for row in evidence.membership:
        if row.protection == "ours":
            assert auc(row.members, row.others) < 0.75


def test_an_upload_without_its_mask_is_found(monkeypatch, target):
    monkeypatch.setattr(MaskSet, "apply", lambda self, values, start=0: None)
    found = verdicts(run(target, trainings={"unprotected": 12, "ours": 2}), target)
    assert {found[name] for name in UPLOADS} == {"broken"}


def test_training_that_forgets_its_noise_is_found(monkeypatch, target):
    quiet = CryptographicDPOptimizer.add_noise

    def add_noise(self):
        multiplier, self.noise_multiplier = self.noise_multiplier, 0.0
        quiet(self)
        self.noise_multiplier = multiplier

    monkeypatch.setattr(CryptographicDPOptimizer, "add_noise", add_noise)
    found = verdicts(run(target, trainings={"unprotected": 12, "ours": 2}), target)
    assert {found[name] for name in INVERSIONS} == {"broken"}
    assert found["gradient inversion on a protected upload"] == "held"


def test_patients_and_a_target_without_others(target):
    patients = np.repeat(np.arange(12), 2).astype(np.str_)
    records = LabelledRecords(target.records.features, target.records.labels, patients)
    privacy = {"unit": "patient", "records_per_patient": 2, "noise_multiplier": 2.0}
    sizes = {"trainings": {"unprotected": 3, "ours": 3}, "starts": 1, "inverted": 2}
    evidence = run(replace(make_target(privacy=privacy), records=records, others=None), **sizes)
    assert evidence.settings.base_records + evidence.settings.candidate_records == 12


def test_records_that_are_looked_for_are_those_that_the_model_expects_least(target):
    scene = Scene(target, SMALL, np.random.default_rng(5))
    trainer = scene.trainer(target, scene.base)
    trainer.load_shared(scene.start.state)
    looked_for = take_records(scene.candidates, np.arange(SMALL.records))
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                trainer.model(torch.from_numpy(records.features)), torch.from_numpy(records.labels), reduction="none"
            )
            for records in (looked_for, scene.base)
        ]
    assert losses[0].min() > losses[1].max() - 1e-4


def test_a_gram_matrix_that_nothing_moves_shows_nothing(monkeypatch, target):
    """A model may be such that no record moves it: attacks find nothing, and go on."""
    upper = Whitebox(target)._gram().detach()
    monkeypatch.setattr(Whitebox, "_gram", lambda whitebox: upper + 0.0 * sum(p.sum() for p in whitebox.parameters))
    scene = Scene(target, replace(SMALL, inverted=2, starts=1), np.random.default_rng(5))
    rows = {(row.observation, row.protection): row for row in invert_all(scene)}
    assert len(rows) == 10
    for protection in ("ours", "unprotected"):
        assert np.max(rows["gram", protection].similarity) < 0.95


# --- uploads


@pytest.mark.parametrize("protocol", ["masked", "layered", "homomorphic"])
def test_uploads_are_read_right_and_show_nothing(protocol, target):
    agreement, vector = target.agreement, np.linspace(-3.0, 3.0, 5000)
    if protocol != "masked":
        ring = {"protocol": protocol, "minimum_cohort": 3, "threshold": 3}
        fit_ciphertexts(ring, len(agreement.members))
        agreement = msgspec.structs.replace(agreement, secure_sum=SecureSum(**ring))
        check_rules(agreement)
    uploads = Uploads(agreement, target.member.node_id)
    first, second = uploads.seen(vector), uploads.seen(vector)
    assert first.shape == vector.shape
    assert abs(np.corrcoef(first, vector)[0, 1]) < 0.1
    assert np.mean(first == second) < 0.01
    assert np.abs(uploads.seen(vector, protected=False) - vector).max() < 1e-5

    code = FixedPoint.from_agreement(agreement)
    if protocol == "masked":
        bare = code.encode(vector).tobytes()
    else:  # what encryption without a secret would give: the plaintext, scaled up
        packing = choose(agreement.secure_sum.value_bits, len(agreement.members))
        words = packing.pack(code.encode(vector)).astype(object) * packing.parameters.prime
        words = (words >> packing.parameters.plain_bits).astype(np.uint64).reshape(-1, DEGREE)
        bare = b"".join(pack_words(word, packing.parameters) + bytes(SEED_BYTES) for word in words)
    assert np.abs(uploads.read(bare, vector.size) - vector).max() < 1e-3


# --- verdicts


def test_verdicts_follow_from_the_evidence_alone(evidence, target):
    before = copy.deepcopy(evidence)
    findings = judge(evidence, target.agreement)
    sent = msgspec.json.decode(msgspec.json.encode(evidence), type=LeakageEvidence)
    assert sent == before == evidence
    assert judge(sent, target.agreement) == findings
    assert all(finding.part == "leakage" and finding.detail for finding in findings)


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_perfect_separation_is_broken(observation, evidence, target):
    perfect = change(evidence, observation, "ours", members=[1.0] * 300, others=[0.0] * 300)
    findings = judge(perfect, target.agreement)
    assert [f.status for f in findings].count("broken") == 2
    for of in CANDIDATES:
        assert findings[place(observation, of)].status == "broken"


def test_a_slight_tilt_of_uploads_is_broken_and_of_updates_is_not(evidence, target):
    chance = np.random.Generator(np.random.PCG64(2))
    members, others = chance.normal(0.5, 1.0, 500).tolist(), chance.normal(0.0, 1.0, 500).tolist()
    for observation, status in (("upload", "broken"), ("update", "held")):
        tilted = change(evidence, observation, "ours", members=members, others=others)
        assert judge(tilted, target.agreement)[place(observation, "canaries")].status == status


def test_a_weak_attack_proves_nothing(evidence, target):
    weak = change(evidence, "gram", "unprotected", members=[0.0, 1.0] * 100, others=[0.0, 1.0] * 100)
    for of in CANDIDATES:
        assert verdicts(weak, target)[f"membership inference on the Gram matrix of the anchors, {of}"] == "not testable"
    reference = [
        msgspec.structs.replace(row, similarity=np.zeros((12, 12)).tolist()) if row.protection == "unprotected" else row
        for row in evidence.inversion
    ]
    blind = msgspec.structs.replace(evidence, inversion=reference)
    findings = judge(blind, target.agreement)[10:]
    assert {finding.status for finding in findings} == {"not testable"}
    assert all("fails on unprotected training" in finding.detail for finding in findings)


def test_too_few_scores_prove_nothing(evidence, target):
    few = change(evidence, "update", "ours", members=[0.0, 1.0] * 5, others=[0.0, 1.0] * 5)
    finding = judge(few, target.agreement)[0]
    assert finding.status == "not testable"
    assert "too few scores" in finding.detail


def test_an_attack_that_succeeds_on_ours_breaks_the_promise_also_within_what_dp_allows(evidence, target):
    privacy = msgspec.structs.replace(target.agreement.privacy, noise_multiplier=0.31)
    agreement = msgspec.structs.replace(target.agreement, privacy=privacy)
    found = change(evidence, "update", "ours", members=[1.0] * 80 + [0.0] * 20, others=[0.0] * 100)
    finding = judge(found, agreement)[0]
    assert finding.status == "broken"
    assert "within what DP allows" in finding.detail


def test_without_noise_nothing_is_promised(evidence, target):
    privacy = msgspec.structs.replace(target.agreement.privacy, noise_multiplier=0.0)
    findings = judge(evidence, msgspec.structs.replace(target.agreement, privacy=privacy))
    uploads = {place("upload", of) for of in CANDIDATES}
    assert {index for index, finding in enumerate(findings[:10]) if finding.status == "held"} == uploads


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_reconstructions_that_are_right_are_broken(observation, evidence, target):
    right = change_inversion(evidence, observation, similarity=np.eye(12).tolist())
    findings = judge(right, target.agreement)
    assert [finding.status for finding in findings].count("broken") == 1
    assert findings[10 + OBSERVATIONS.index(observation)].status == "broken"


def test_right_reconstructions_of_few_records_are_not_called_held(evidence, target):
    few = change_inversion(evidence, "gram", similarity=np.eye(3).tolist(), labels_right=3)
    finding = judge(few, target.agreement)[-1]
    assert finding.status == "not testable"
    assert "not so that it is certain" in finding.detail


@pytest.mark.parametrize("lost", [0, 1, 3, 5])
def test_some_records_that_come_back_are_lost_whatever_the_median_is(lost: int, evidence, target):
    similarity = np.diag([0.999] * lost + [0.1] * (12 - lost)).tolist()
    finding = judge(change_inversion(evidence, "gram", similarity=similarity), target.agreement)[-1]
    assert (finding.status == "broken") is (lost >= 3)
    assert f"{lost} of 12 above 0.9" in finding.detail


def test_findings_say_what_the_attacker_knows(evidence, target):
    details = {finding.name: finding.detail for finding in judge(evidence, target.agreement)}
    assert "all other hospitals but one" in details["gradient inversion on the aggregate"]
    assert "one other" in details["gradient inversion on the released adapter"]


def test_the_released_adapter_shows_the_aggregate_of_two(target):
    scene = Scene(target, SMALL, np.random.Generator(np.random.PCG64(3)))
    bare = vary(protected_as(target, "unprotected"), training={"steps_per_round": 1, "warmup_steps": 0}, batch=1.0)
    records = take_records(scene.base, np.arange(4))
    with sdpa_kernel(SDPBackend.MATH):
        clues = clues_of(scene, bare, Prior.of(bare), records, set())
    update, aggregate, adapter = clues["update"], clues["aggregate"], clues["adapter"]
    assert np.abs(aggregate.seen - adapter.seen).max() < 1e-9
    assert aggregate.together == adapter.together == 2 * update.together
    assert aggregate.noise == adapter.noise == 2 * update.noise
    others = np.linalg.norm(aggregate.seen - update.seen, axis=1) / np.linalg.norm(update.seen, axis=1)
    assert 0.1 < np.median(others) < 10.0


def test_the_gram_matrix_moves_as_its_slopes_say(target):
    scene = Scene(target, SMALL, np.random.Generator(np.random.PCG64(3)))
    whitebox, trainer = Whitebox(target), scene.trainer(target, target.records)
    trainer.load_shared(scene.start.state)
    at = whitebox.take(trainer)
    chance = np.random.Generator(np.random.PCG64(4))
    step, along = 1e-6 * chance.normal(size=len(at)), chance.normal(size=(3, 78))
    moved = along @ (whitebox.gram(at + torch.from_numpy(step)) - whitebox.gram(at))
    assert whitebox.gram_slopes(along) @ step == pytest.approx(moved, rel=1e-3)


# --- numbers


def test_rates():
    members, others = [3.0, 2.0, 1.0, 0.0], [2.5, 0.5, 0.5, 0.5]
    fpr, tpr = roc(members, others)
    assert fpr[0] == tpr[0] == 0.0
    assert fpr[-1] == tpr[-1] == 1.0
    assert auc(members, others) == pytest.approx(10 / 16)
    assert rate_at(members, others, 0.0) == Rate(1, 4, 0, 4)
    assert rate_at(members, others, 0.25) == Rate(3, 4, 1, 4)
    assert rates(members, others) == [Rate(1, 4, 0, 4)]
    assert [rate.wrong for rate in rates([1.0], np.arange(2000.0).tolist())] == [20, 2]


def test_intervals_and_the_line():
    assert clopper_pearson(0, 10, 0.05) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert clopper_pearson(10, 10, 0.05) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert clopper_pearson(5, 10, 0.05) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    assert dp_line(0.0, 0.0, 0.3) == 0.3
    assert dp_line(1.0, 0.01, 0.1) == pytest.approx(0.2818, abs=1e-4)
    assert dp_line(float("inf"), 0.0, 0.1) == 1.0
    assert not crosses(Rate(50, 100, 0, 100), epsilon=2.0, delta=0.001)
    assert crosses(Rate(500, 1000, 0, 1000), epsilon=2.0, delta=0.001)


def test_evidence_that_says_nothing_is_refused(evidence, target):
    for members, others in (([], [1.0]), ([1.0], []), ([float("nan")], [1.0])):
        with pytest.raises(ConfigError, match="finite scores"):
            roc(members, others)
        with pytest.raises(ConfigError, match="finite scores"):
            judge(change(evidence, "gram", "ours", members=members, others=others), target.agreement)
    with pytest.raises(ConfigError, match="not one attack each"):
        judge(msgspec.structs.replace(evidence, membership=[]), target.agreement)
    with pytest.raises(ConfigError, match="not one inversion"):
        judge(msgspec.structs.replace(evidence, inversion=[]), target.agreement)
    for left, row in enumerate(evidence.inversion):
        rows = evidence.inversion[:left] + evidence.inversion[left + 1 :]
        for changed in (rows, [*evidence.inversion, row]):
            with pytest.raises(ConfigError, match="not one inversion"):
                judge(msgspec.structs.replace(evidence, inversion=changed), target.agreement)
    with pytest.raises(ConfigError, match="whole rounds"):
        judge(change(evidence, "update", "ours", steps=10**6), target.agreement)
    for similarity in ([], [[1.0]], [[1.0, 0.0]], [[float("nan"), 0.0], [0.0, 1.0]], [[5.0, 0.0], [0.0, 1.0]]):
        for observation in OBSERVATIONS:
            with pytest.raises(ConfigError, match="similarit"):
                judge(change_inversion(evidence, observation, similarity=similarity), target.agreement)
    for labels_right in (-1, 100):
        with pytest.raises(ConfigError, match="labels"):
            judge(change_inversion(evidence, "gram", labels_right=labels_right), target.agreement)


def test_too_few_records_are_refused(target):
    few = LabelledRecords(target.records.features[:7], target.records.labels[:7])
    for changed in ({"records": few}, {"others": few}):
        with pytest.raises(ConfigError, match="8 or more records"):
            run(replace(target, **changed))
