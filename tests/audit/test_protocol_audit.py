"""The protocol audit holds the real code for sound, and says "broken" of every weakened copy, repetition, bias and open door."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from audit import deployment, protocol, rounds, splits
from audit import door as door_of
from audit.attacks import CATALOGUE, by_aggregator_documents, stage, wire
from audit.attacks.stage import Played, World, reduced, vector_values
from audit.findings import Finding
from audit.promises import COLLUSION, PROMISES
from audit.protocol import ProtocolEvidence, collect, from_json, judge, not_tried, to_json
from audit.uploads import Series
from keys import files as key_files
from keys.errors import ConfigError, KeyFileError, SecGeoError, TransportError
from keys.files import read_secret
from keys.labels import Label
from protocols import messages as m
from protocols.agreement import Agreement, read_agreement
from protocols.attempt_aggregator import AttemptAggregator
from protocols.prg import MaskSet
from protocols.sealing import AttemptSecrets
from secgeo import zap
from secgeo.records import RECEIPTS, TRANSCRIPT
from secgeo.transport import AggregatorEndpoint
from secgeo.update import Layout
from tests.adversary import weaken
from tests.audit.factory import Study, make_study
from tests.keys.factory import AGGREGATOR
from tests.secgeo.site import HOSPITALS, Site, make_site

ROOT = Path(__file__).parents[2]
Guard = Callable[[], AbstractContextManager[None]]


def silent(_what: str, _done: float) -> None:
    pass


def agreed(protocol: str = "masked", count: int = 5, **settings: Any) -> Agreement:
    return make_study(count, protocol=protocol, **settings).agreement


def run(agreement: Agreement, **options: Any) -> ProtocolEvidence:
    return collect(agreement, **{"profile": "fast", "folder": None, "config": None, "progress": silent, **options})


@pytest.fixture(scope="module")
def honest() -> ProtocolEvidence:
    return run(agreed())


@pytest.fixture(scope="module")
def thorough() -> ProtocolEvidence:
    """Over sockets too."""
    return run(agreed(), profile="full")


def finding(findings: list[Finding], name: str) -> Finding:
    (found,) = [f for f in findings if f.name == name]
    return found


def status_of(evidence: ProtocolEvidence, row: str) -> str:
    promise = next(p for p in (*PROMISES, *COLLUSION) if p.row == row)
    return finding(judge(evidence), promise.adversary).status


# --- what the real code gives


def test_the_real_code_breaks_no_promise(honest: ProtocolEvidence) -> None:
    findings = judge(honest)
    assert not [f for f in findings if f.status == "broken"]
    assert len([f for f in findings if f.status == "held"]) >= 28
    assert all(f.detail and f.promise and f.part == "protocol" for f in findings)
    assert all(attack.took_place for attack in honest.played)
    assert honest.control is True
    aggregator = {attack.name for attack in honest.played if attack.adversary == "aggregator"}
    node = {attack.name for attack in honest.played if attack.adversary == "node"}
    assert len(aggregator) >= 12
    assert len(node) >= 8
    assert honest.seconds < 30


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CATALOGUE", CATALOGUE[:2])
    told: list[float] = []
    run(agreed(), progress=lambda _what, done: told.append(done))
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_verdict_follows_from_the_evidence_alone(honest: ProtocolEvidence) -> None:
    again = from_json(to_json(honest))
    assert again == honest
    assert judge(again) == judge(honest)
    hostile_counts = to_json(honest).replace(b'"bits":32', b'"bits":9999', 1)
    for data in (b'{"profile": "fast"}', b"[" * 100_000, b"\xff", hostile_counts):
        with pytest.raises(ConfigError, match="no evidence"):
            from_json(data)


@pytest.mark.parametrize("name", ["layered", "homomorphic"])
def test_ciphertexts_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All attacks on ciphertexts and keys, and a part of the others."""
    kept = [
        attack
        for attack in CATALOGUE
        if attack.needs == "ciphertexts" or attack.row in ("changed-sum", "second-sum", "colluders", "both-shares")
    ]
    monkeypatch.setattr(protocol, "CATALOGUE", kept)
    evidence = run(agreed(name, 4))
    assert not [f for f in judge(evidence) if f.status == "broken"]
    assert not_tried(evidence, agreed(name, 4)) == []
    for row in ("curious-encrypted", "ciphertext-sum", "study-keys", "no-ciphertexts", "no-study-key", "changed-sum"):
        assert status_of(evidence, row) == "held", row
    assert status_of(evidence, "key-holder") == ("held" if name == "layered" else "not testable")
    assert status_of(evidence, "no-colluders") == "held"
    assert status_of(evidence, "both-shares") == ("held" if name == "layered" else "not testable")


def test_every_row_of_the_threat_model_has_its_finding() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    lines = text.splitlines()
    start = lines.index("|---|---|---|")
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append(line.split("|")[1].strip().replace("`", ""))
    assert [p.adversary for p in PROMISES] == rows
    collusion = text.split("## Collusion, precisely")[1].split("\n## ")[0]
    assert collusion.count("\n- ") == len(COLLUSION)


def test_every_theme_is_in_the_catalogue_and_has_its_place() -> None:
    themes = list(dict.fromkeys(attack.perform.__module__.rpartition(".")[2] for attack in CATALOGUE))
    assert sorted(themes) == sorted(path.stem for path in (ROOT / "audit" / "attacks").glob("by_*.py"))
    assert [theme.split("_")[1] for theme in themes] == ["aggregator"] * 6 + ["members"] * 3 + [
        "losses",
        "colluders",
        "strangers",
    ]
    assert CATALOGUE[0].name == "substituted round keys"
    assert CATALOGUE[-1].name == "a stranger at the door"
    assert len({(attack.name, attack.tried) for attack in CATALOGUE}) == len(CATALOGUE) == 83


def test_large_agreements_are_played_small_and_say_so() -> None:
    large = sparse_agreement()
    small = reduced(large, 6)
    assert len(small.members) == 6
    assert small.secure_sum.threshold <= small.secure_sum.minimum_cohort <= 6
    assert 2 * small.secure_sum.threshold > 7
    assert vector_values(small, 10**7) < 3000
    layered = reduced(agreed("layered", 9), 5)
    assert len(layered.members) == 5


def test_an_agreement_that_breaks_a_rule_is_broken_and_nothing_is_played() -> None:
    agreement = agreed()
    weak = msgspec.structs.replace(agreement, secure_sum=msgspec.structs.replace(agreement.secure_sum, threshold=2))
    evidence = run(weak)
    assert not evidence.played
    assert finding(judge(evidence), "parameters of the sum").status == "broken"
    assert status_of(evidence, "keys") == "not testable"


# --- an attack that can succeed is seen to


def play(name: str, guard: AbstractContextManager[None], world: World) -> Played:
    (attack,) = [attack for attack in CATALOGUE if attack.name == name][:1]
    with guard:
        return attack.play(world)


WEAKENED: dict[str, tuple[str, Guard]] = {
    "substituted round keys": ("keys", weaken.relayed_signatures),
    "replayed round keys": ("keys", weaken.relayed_freshness),
    "a shrunk cohort": ("keys", weaken.minimum_cohort),
    "a cohort shrunk by uploads": ("keys", weaken.minimum_cohort),
    "self seed and pair shares of one node": ("both-shares", weaken.one_vote_one_revelation),
    "too few votes": ("survivors", weaken.vote_quorum),
    "votes for another set": ("survivors", weaken.vote_signatures),
    "a neighbour that never dealt seeds": ("neighbours", weaken.neighbours_views),
    "a second attempt after the votes": ("second-sum", weaken.memory_of_votes),
    "an upload held back": ("second-sum", weaken.vote_signatures),
    "a changed sum": ("changed-sum", weaken.sum_tags),
    "a replayed sum": ("changed-sum", weaken.round_of_the_record),
    "a multiple of the sum": ("multiple", weaken.pads_of_tags),
    "a wrong sum for a latecomer": ("latecomer", weaken.receipts_of_contributors),
    "two records of one round": ("two-stories", weaken.memory_of_records),
    "a round lost for one only": ("fork", weaken.last_records),
    "sums out of order": ("order", weaken.sequence_of_sums),
    "broken messages of the aggregator": ("decoders", weaken.decoding_errors),
    "wrong documents": ("documents", lambda: weaken.replaced(by_aggregator_documents, "check_policy", weaken.accept)),
    "a second upload with another digest": ("messages", weaken.digest_of_an_upload),
    "wrong shares revealed": ("shares", lambda: weaken.replaced(AttemptAggregator, "_check_dealt", weaken.accept)),
    "two tag seeds of one dealer": ("tag-seeds", weaken.dealt_tag_seeds),
    "not a number": ("not-finite", weaken.finite_inputs),
    "out of range": ("not-finite", weaken.agreed_range),
    "a silent member": ("silence", weaken.deadlines),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", WEAKENED)
def test_a_weakened_copy_is_broken(name: str, honest: ProtocolEvidence) -> None:
    row, guard = WEAKENED[name]
    agreement = agreed()
    world = World(reduced(agreement, 5), 1500)
    weak = play(name, guard(), world)
    assert status_of(msgspec.structs.replace(honest, played=(weak,)), row) == "broken", weak
    genuine = next(attack for attack in honest.played if attack.name == name)
    assert status_of(msgspec.structs.replace(honest, played=(genuine,)), row) == "held"


def test_a_victim_that_is_cut_off_in_a_sparse_graph() -> None:
    world = World(reduced(sparse_agreement(), 17), 1100)
    assert protocol.harms_of(play("a victim cut off", nullcontext(), world)) == []
    harms = protocol.harms_of(play("a victim cut off", weaken.connectivity(), world))
    assert "the vector of hospital-00 was read" in harms


@pytest.mark.parametrize("name", ["a false complaint", "withheld round keys"])
def test_in_a_sparse_graph_attacks_are_on_who_shares_masks(name: str) -> None:
    """Who does follows from a hash over fresh keys: half of the members, each time others."""
    world = World(reduced(sparse_agreement(), 17), 1100)
    for _ in range(5):
        attack = play(name, nullcontext(), world)
        assert attack.took_place
        assert protocol.harms_of(attack) == []


# --- shares


def sparse_agreement() -> Agreement:
    return agreed("masked", 17, threshold=11, minimum_cohort=11, neighbours=8, share_threshold=4)


TOLD_BY_FEWER = {
    "one fewer": weaken.degree_of_shares,
    "constants": weaken.coefficients_of_shares,
    "two secrets": weaken.coefficients_of_two_secrets,
    "every share": weaken.secrets_for_shares,
}


@pytest.mark.parametrize("graph", ["complete", "sparse"])
@pytest.mark.parametrize("how", [*TOLD_BY_FEWER, "sound"])
def test_fewer_colluders_than_the_threshold_read_a_vector_where_shares_are_weak(
    how: str, graph: str, honest: ProtocolEvidence
) -> None:
    """The attacker does not believe in the threshold: it takes what its shares give, and checks it against what is public."""
    agreement = agreed() if graph == "complete" else sparse_agreement()
    world = World(reduced(agreement, len(agreement.members)), 1100)
    guard = TOLD_BY_FEWER.get(how, nullcontext)
    played = play("colluders below the threshold", guard(), world)
    assert played.took_place
    assert len(world.names) - len(played.summed) == agreement.secure_sum.shares_needed - 1
    assert (world.names[0] in played.read) == (how != "sound")
    status = "held" if how == "sound" else "broken"
    assert status_of(msgspec.structs.replace(honest, played=(played,)), "colluders") == status


WEAK_SHARES: dict[str, tuple[Guard, str]] = {
    "one fewer": (weaken.degree_of_shares, "fewer than 4 shares gave a secret of zeros away in 5000 of"),
    "constants": (weaken.coefficients_of_shares, "shares of two splits of a secret of zeros are equal at"),
    "one coefficient": (
        weaken.one_coefficient_of_shares,
        "coefficients beside a secret of zeros only 5000 are different",
    ),
    "two secrets": (weaken.coefficients_of_two_secrets, "shares of two splits of a secret of ones are equal at"),
    "every share": (weaken.secrets_for_shares, "fewer than 4 shares gave a secret of ones away in 15000 of 15000"),
    "little entropy": (weaken.low_entropy_of_shares, "are different"),
    "small coefficients": (
        weaken.small_coefficients_of_shares,
        "the top bytes of shares of a secret of ones are not uniform",
    ),
}


@pytest.mark.parametrize("graph", ["complete", "sparse"])
@pytest.mark.parametrize("how", WEAK_SHARES)
def test_weak_shares_are_seen(how: str, graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CATALOGUE", [])
    monkeypatch.setattr(protocol, "UPLOAD_ROUNDS", {"fast": 1})
    guard, says = WEAK_SHARES[how]
    with guard():
        found = finding(judge(run(agreed() if graph == "complete" else sparse_agreement())), "shares of secrets")
    assert found.status == "broken"
    assert says in found.detail


def test_sound_shares_say_nothing_of_their_secret(honest: ProtocolEvidence) -> None:
    found = finding(judge(honest), "shares of secrets")
    assert found.status == "held"
    assert "a source of 20 bits or less would have repeated itself" in found.detail
    sparse = sparse_agreement()
    assert splits.shape(sparse, reduced(sparse, 6)) == (4, 9)
    assert splits.judge_splits(splits.measure_splits(4, 9)).status == "held"
    assert splits.judge_splits(splits.measure_splits(2, 3)).status == "held"
    lost = msgspec.structs.replace(honest.splits[0], recovered=4999)
    assert splits.judge_splits([lost]).status == "broken"


def test_everything_that_this_agreement_allows_is_tried(honest: ProtocolEvidence) -> None:
    assert not_tried(honest, agreed()) == []
    idle = (msgspec.structs.replace(honest.played[0], took_place=False), *honest.played[1:])
    assert not_tried(msgspec.structs.replace(honest, played=idle), agreed()) == [honest.played[0].name]
    assert not_tried(msgspec.structs.replace(honest, control=None), agreed()) == ["control"]
    assert not_tried(msgspec.structs.replace(honest, repeats=()), agreed()) == ["freshness"]
    assert not_tried(msgspec.structs.replace(honest, splits=honest.splits[1:]), agreed()) == ["shares of secrets"]
    few = tuple(msgspec.structs.replace(series, low=(5,) * 256) for series in honest.series)
    assert not_tried(msgspec.structs.replace(honest, series=few), agreed()) == [series.name for series in few]
    assert not_tried(run(agreed(count=3)), agreed(count=3)) == []


def test_an_attack_that_never_took_place_shows_nothing(honest: ProtocolEvidence) -> None:
    idle = tuple(msgspec.structs.replace(attack, took_place=False) for attack in honest.played)
    assert status_of(msgspec.structs.replace(honest, played=idle), "survivors") == "not testable"
    assert status_of(msgspec.structs.replace(honest, control=False), "colluders") == "not testable"


@pytest.mark.parametrize(
    "change",
    [
        {"crashed": ("SystemError: died",)},
        {"read": ("hospital-01",)},
        {"wrong": ("hospital-01",)},
        {"expelled": ("hospital-00", "hospital-01")},
        {"summed": {"hospital-01": 0}},
        {"answers": (stage.Answer("hospital-01", "RemoteProtocolError", "aggregator", "..."),)},
        {"answers": (stage.Answer("hospital-01", "VerificationFailed", "", "..."),)},
        {"expelled": ()},
    ],
)
def test_each_harm_counts(change: dict[str, Any], honest: ProtocolEvidence) -> None:
    attack = next(attack for attack in honest.played if attack.name == "a second upload with another digest")
    changed = msgspec.structs.replace(honest, played=(msgspec.structs.replace(attack, **change),))
    assert status_of(changed, "messages") == "broken"


# --- over sockets


def test_profile_full_plays_everything_over_sockets_too(thorough: ProtocolEvidence, honest: ProtocolEvidence) -> None:
    findings = judge(thorough)
    assert not [f for f in findings if f.status == "broken"]
    assert not_tried(thorough, agreed()) == []
    over = {"memory": set[tuple[str, str]](), "sockets": set[tuple[str, str]]()}
    for attack in thorough.played:
        over[attack.over].add((attack.name, attack.tried))
    alone = {attack.name for attack in CATALOGUE if not attack.carried}
    assert {name for name, _ in over["memory"] - over["sockets"]} == alone
    assert {name for name, _ in over["sockets"] - over["memory"]} == {"a stranger at the door"}
    assert len(over["sockets"]) > 65
    assert "in memory and over sockets (" in finding(findings, "... silence in any phase").detail
    assert status_of(thorough, "strangers") == "held"
    assert status_of(honest, "strangers") == "not testable"
    assert {attack.over for attack in honest.played} == {"memory"}
    assert honest.parameters.members_over_sockets == 0 < thorough.parameters.members_over_sockets


def test_what_was_not_played_over_sockets_is_missed(thorough: ProtocolEvidence) -> None:
    lost = thorough.played[-2]
    assert lost.over == "sockets"
    kept = tuple(attack for attack in thorough.played if attack is not lost)
    assert not_tried(msgspec.structs.replace(thorough, played=kept), agreed()) == [f"{lost.name} (over sockets)"]
    again = msgspec.structs.replace(lost, over="memory")
    assert not_tried(msgspec.structs.replace(thorough, played=(*kept, again)), agreed()) == [
        f"{lost.name} (over sockets)"
    ]


def no_name_but_the_claimed() -> AbstractContextManager[None]:
    """The aggregator believes who a message says that it is from, and not who the door has let in."""
    genuine = AggregatorEndpoint.receive

    def receive(self: AggregatorEndpoint, timeout_seconds: float) -> tuple[str, bytes] | None:
        received = genuine(self, timeout_seconds)
        return received and (m.claimed_sender(received[1]), received[1])

    return weaken.replaced(AggregatorEndpoint, "receive", receive)


def open_door() -> AbstractContextManager[None]:
    """The doorkeeper lets in whoever has any key."""
    genuine = zap.Doorkeeper._answer

    def let_in(self: zap.Doorkeeper, question: list[bytes]) -> list[bytes]:
        self.allowed = {**self.allowed, question[-1]: self.allowed.get(question[-1], "anybody")}
        return genuine(self, question)

    return weaken.replaced(zap.Doorkeeper, "_answer", let_in)


@pytest.mark.parametrize(
    ("name", "guard"),
    [
        ("a message in the name of another", no_name_but_the_claimed),
        ("a stranger at the door", open_door),
        ("self seed and pair shares of one node", weaken.one_vote_one_revelation),
        ("a changed sum", weaken.sum_tags),
        ("a silent member", weaken.deadlines),
    ],
)
def test_a_weakened_copy_is_broken_over_sockets(
    name: str, guard: Guard, thorough: ProtocolEvidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PATIENCE_SECONDS", 3.0)
    world = World(reduced(agreed(), 5), 1500, over="sockets")
    weak = play(name, guard(), world)
    assert weak.over == "sockets"
    assert [harm for harm in protocol.harms_of(weak) if harm not in weak.crashed]
    assert status_of(msgspec.structs.replace(thorough, played=(weak,)), weak.row) == "broken", weak
    sound = play(name, nullcontext(), world)
    assert status_of(msgspec.structs.replace(thorough, played=(sound,)), weak.row) == "held", sound


def test_sockets_that_cannot_be_opened_leave_the_audit_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TransportError("cannot listen")

    monkeypatch.setattr(protocol, "CATALOGUE", CATALOGUE[:2])
    monkeypatch.setattr(AggregatorEndpoint, "__init__", refuse)
    evidence = run(agreed(), profile="full")
    assert [attack.over for attack in evidence.played] == ["memory", "memory"]
    assert not_tried(evidence, agreed()) == [f"{attack.name} (over sockets)" for attack in CATALOGUE[:2]]


# --- uniform, fresh, secret


def test_uploads_without_masks_are_not_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CATALOGUE", [])
    with weaken.replaced(MaskSet, "apply", weaken.accept):
        evidence = run(agreed())
    found = finding(judge(evidence), "curious aggregator (masked)")
    assert found.status == "broken"
    assert "not uniform" in found.detail
    assert "places are equal" in found.detail
    assert "correlated with the input" in found.detail


def test_seeds_that_come_again_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that gives every hospital the same in every round: masks repeat, and seeds."""
    monkeypatch.setattr(protocol, "CATALOGUE", [])
    same = AttemptSecrets(*(bytes([index]) * 32 for index in range(4)))
    with weaken.replaced(AttemptSecrets, "fresh", staticmethod(lambda _coins: same)):
        evidence = run(agreed())
    assert finding(judge(evidence), "freshness of seeds and keys").status == "broken"


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_seeds_of_little_entropy_are_found(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed is stretched from so few bits that it rarely comes twice in the few studies that are played."""

    def stretched(count: int) -> bytes:
        seed = secrets.randbits(bits).to_bytes(4)
        return hashlib.shake_256(seed).digest(count)

    monkeypatch.setattr(protocol, "CATALOGUE", [])
    monkeypatch.setattr(os, "urandom", stretched)
    evidence = run(agreed(count=3))
    found = finding(judge(evidence), "freshness of seeds and keys")
    assert found.status == "broken"
    assert "self seeds" in found.detail


def test_how_little_entropy_would_have_been_found(honest: ProtocolEvidence) -> None:
    found = finding(judge(honest), "freshness of seeds and keys")
    assert found.status == "held"
    assert "a source of 24 bits or less would have repeated itself" in found.detail


def test_a_slight_bias_is_found_and_chance_is_not(honest: ProtocolEvidence) -> None:
    fair = np.random.default_rng(1).multinomial(200_000, [1 / 256] * 256)
    biased = fair + np.where(np.arange(256) < 128, 30, -30)
    for counts, status in ((fair, "held"), (biased, "broken")):
        series = Series("masked values, zeros", tuple(counts.tolist()), tuple(fair.tolist()))
        assert status_of(msgspec.structs.replace(honest, series=(series,)), "curious-masked") == status
    few = Series("masked values, zeros", (1,) * 256, (1,) * 256)
    assert status_of(msgspec.structs.replace(honest, series=(few,)), "curious-masked") == "not testable"


def test_secrets_in_clear_are_found(honest: ProtocolEvidence) -> None:
    assert honest.secrets_searched > 100
    assert honest.secrets_found == 0
    assert status_of(msgspec.structs.replace(honest, secrets_found=1), "secrets") == "broken"


# --- records


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(3).write(tmp_path_factory.mktemp("study") / "records")


NOW = datetime(2026, 6, 2, tzinfo=UTC)


def test_honest_records_repeat_nothing(study_folder: Path) -> None:
    evidence = rounds.collect_records(study_folder, NOW)
    findings = rounds.judge_records(evidence)
    assert [f.status for f in findings if f.name != "records repeat nothing"] == ["held"] * 3, findings
    assert evidence.rounds == 2
    assert len(evidence.certificates) == 4
    assert all("Ed25519" in certificate.key for certificate in evidence.certificates)
    repeat = msgspec.structs.replace(evidence, repeats=(rounds.Repeats("digests of uploads", 6, 5),))
    assert finding(rounds.judge_records(repeat), "records repeat nothing").status == "broken"
    soon = msgspec.structs.replace(evidence, taken_at=NOW + timedelta(days=350))
    assert finding(rounds.judge_records(soon), "certificates of the records last").status == "broken"


def hostile(folder: Path, how: str) -> None:
    match how:
        case "garbage":
            (folder / TRANSCRIPT).write_bytes(os.urandom(2000))
        case "no roster":
            (folder / "roster.json").unlink()
        case "a link":
            (folder / "link").symlink_to("/etc/passwd")
        case "a receipt of nobody":
            (folder / RECEIPTS / "x.jsonl").write_bytes(b'{"seq":0}\n')
        case "another agreement":
            path = folder / "agreement.toml"
            path.write_bytes(path.read_bytes().replace(b"rounds", b"sounds", 1))
        case "nested":
            (folder / TRANSCRIPT).write_bytes(b"[" * 100_000)


@pytest.mark.parametrize(
    "how", ["garbage", "no roster", "a link", "a receipt of nobody", "another agreement", "nested"]
)
def test_hostile_folders_give_findings(how: str, study_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    shutil.copytree(study_folder, folder)
    hostile(folder, how)
    findings = rounds.judge_records(rounds.collect_records(folder, NOW))
    assert finding(findings, "records can be read").status == "broken"


def test_what_cannot_be_looked_at_is_said_before_anything_is_played(tmp_path: Path) -> None:
    for options in ({"folder": tmp_path / "nowhere"}, {"config": tmp_path / "nowhere.toml"}):
        with pytest.raises(ConfigError):
            run(agreed(), **options)
    for text in (b"\xff\xfe", b"keys = ", b"[" * 100_000, b"keys = 'keys'\n"):
        (tmp_path / "bad.toml").write_bytes(text)
        with pytest.raises(ConfigError):
            deployment.collect_deployment(tmp_path / "bad.toml", NOW)


# --- a deployment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def copied(site: Site, folder: Path) -> Site:
    copy = Site(folder / "site", site.consortium, site.digest)
    shutil.copytree(site.base, copy.base)
    return copy


def look(site: Site, name: str, **options: Any) -> list[Finding]:
    evidence = deployment.collect_deployment(site.config(name), datetime.now(UTC), **{"probe": False, **options})
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=deployment.DeploymentEvidence) == evidence
    return deployment.judge_deployment(evidence)


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {f.name: f.status for f in findings}


def test_a_site_with_keys_in_clear_is_told_so_and_of_nothing_else(site: Site) -> None:
    for name in (HOSPITALS[0], AGGREGATOR):
        found = statuses(look(site, name))
        assert found.pop("key files are encrypted") == "broken"
        assert found.pop("local policy") == ("held" if name != AGGREGATOR else "not testable")
        assert found.pop("rounds of the running study") == "not testable"
        assert set(found.values()) == {"held"}, found


def test_encrypted_keys_are_seen_without_the_passphrase(site: Site) -> None:
    name = HOSPITALS[1]
    keys = site.base / name / "keys"
    shutil.rmtree(keys)
    site.consortium.identities[name].save(keys, b"correct horse")
    found = statuses(look(site, name))
    assert found.pop("rounds of the running study") == "not testable"
    assert set(found.values()) == {"held"}


def spoil(site: Site, name: str, how: str) -> None:
    keys = site.base / name / "keys"
    match how:
        case "loose key file":
            (keys / "identity.key").chmod(0o644)
        case "loose key folder":
            keys.chmod(0o755)
        case "link":
            (keys / "identity.key").rename(keys / "real.key")
            (keys / "identity.key").symlink_to("real.key")
        case "no key file of ours":
            (keys / "identity.key").write_bytes(b"-----BEGIN PRIVATE KEY-----")
        case "another's certificate":
            shutil.copy(site.base / AGGREGATOR / "keys" / "certificate.pem", keys / "certificate.pem")
        case "another pin":
            study = {"folder": "../study", "agreement_digest": "0" * 64, "authority_fingerprint": "0" * 64}
            site.write_config(name, study=study)
        case "stricter policy":
            site.write_config(name, policy={"max_epsilon": 0.001})
        case "loose state":
            (site.base / name / "state" / "study").mkdir(parents=True)
            (site.base / name / "state" / "study").chmod(0o755)


@pytest.mark.parametrize(
    ("how", "broken"),
    [
        ("loose key file", "key files are private"),
        ("loose key folder", "folders are private"),
        ("link", "key files are private"),
        ("no key file of ours", "key files are encrypted"),
        ("another's certificate", "own certificate"),
        ("another pin", "documents of the study"),
        ("stricter policy", "local policy"),
        ("loose state", "folders are private"),
    ],
)
def test_what_is_wrong_with_a_site_is_found(how: str, broken: str, site: Site, tmp_path: Path) -> None:
    copy = copied(site, tmp_path)
    spoil(copy, HOSPITALS[2], how)
    assert statuses(look(copy, HOSPITALS[2]))[broken] == "broken"


SALT, NONCE = bytes([7]) * 16, bytes([8]) * 12
GARBAGE: dict[str, bytes] = {
    "a header and no ciphertext": b"\1" + bytes((17, 8, 1)) + SALT + NONCE,
    "a header without salt and nonce": b"\1" + bytes((17,)),
    "a ciphertext that is a tag": b"\1" + bytes((17, 8, 1)) + SALT + NONCE + bytes(16),
    "an N of 2^255": b"\1" + bytes((255, 1, 1)) + bytes(28) + bytes(120),
    "an N of 2^19": b"\1" + bytes((19, 8, 1)) + SALT + NONCE + bytes(120),
    "another r": b"\1" + bytes((17, 1, 1)) + SALT + NONCE + bytes(120),
    "another p": b"\1" + bytes((17, 8, 2)) + SALT + NONCE + bytes(120),
    "a salt of zeros": b"\1" + bytes((17, 8, 1)) + bytes(16) + NONCE + bytes(120),
    "a nonce of zeros": b"\1" + bytes((17, 8, 1)) + SALT + bytes(12) + bytes(120),
    "too large": b"\1" + bytes((17, 8, 1)) + SALT + NONCE + bytes(1 << 16),
    "a wrong checksum": b"\0" + bytes(120),
    "another kind": b"\2" + bytes((17, 8, 1)) + SALT + NONCE + bytes(120),
}


@pytest.mark.parametrize("how", GARBAGE)
def test_a_key_file_that_no_node_would_read_is_broken(how: str, site: Site, tmp_path: Path) -> None:
    copy = copied(site, tmp_path)
    path = copy.base / HOSPITALS[2] / "keys" / "identity.key"
    path.write_bytes(Label.KEY_FILE + GARBAGE[how])
    found = finding(look(copy, HOSPITALS[2]), "key files are encrypted")
    assert found.status == "broken", found
    assert "scrypt with N" not in found.detail
    if how != "a ciphertext that is a tag":
        with pytest.raises(KeyFileError) as caught:
            read_secret(path, b"correct horse")
        assert found.detail in str(caught.value)


def test_a_weak_but_readable_scrypt_is_broken(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(site, tmp_path)
    keys = copy.base / HOSPITALS[2] / "keys"
    shutil.rmtree(keys)
    monkeypatch.setattr(key_files, "SCRYPT_LOG2_N", 14)
    site.consortium.identities[HOSPITALS[2]].save(keys, b"correct horse")
    found = finding(look(copy, HOSPITALS[2]), "key files are encrypted")
    assert (found.status, found.detail) == ("broken", "scrypt with N = 2^14")


@pytest.mark.parametrize(
    ("content", "mode", "status"),
    [
        (b"correct horse\n", 0o600, "held"),
        (b"", 0o600, "broken"),
        (b"\n", 0o600, "broken"),
        (b"x" * 5000, 0o600, "broken"),
        (b"correct horse\n", 0o644, "broken"),
        (b"correct horse\n", 0o640, "broken"),
    ],
)
def test_passphrase_files(content: bytes, mode: int, status: str, site: Site, tmp_path: Path) -> None:
    copy = copied(site, tmp_path)
    config = copy.write_config(HOSPITALS[2], passphrase_file="passphrase")
    (config.parent / "passphrase").write_bytes(content)
    (config.parent / "passphrase").chmod(mode)
    found = finding(look(copy, HOSPITALS[2]), "key files are private")
    assert found.status == status, found
    assert "horse" not in found.detail


def test_a_passphrase_file_that_is_not_there_is_told(site: Site, tmp_path: Path) -> None:
    copy = copied(site, tmp_path)
    copy.write_config(HOSPITALS[2], passphrase_file="passphrase")
    found = finding(look(copy, HOSPITALS[2]), "key files are private")
    assert found.status == "held"
    assert "is not there" in found.detail


@pytest.fixture
def public(site: Site) -> Iterator[Site]:
    """A site in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        copy = copied(site, Path(folder))
        for path in (copy.base, *copy.base.iterdir()):
            path.chmod(0o755)
        for path in copy.base.glob("*/records.npz"):
            path.chmod(0o600)
        yield copy


@pytest.mark.parametrize(
    ("name", "mode", "broken"),
    [
        ("records.npz", 0o600, ""),
        ("records.npz", 0o640, ""),
        ("records.npz", 0o604, "data are private"),
        ("records.npz", 0o602, "data are private"),
        ("records.npz", 0o660, "data are private"),
        ("config.toml", 0o644, ""),
        ("config.toml", 0o664, "configuration is protected"),
        ("config.toml", 0o646, "configuration is protected"),
        ("", 0o1777, ""),
    ],
)
def test_who_can_read_or_change_records_and_configuration(name: str, mode: int, broken: str, public: Site) -> None:
    (public.base / HOSPITALS[2] / name).chmod(mode)
    found = statuses(look(public, HOSPITALS[2]))
    for what in ("data are private", "configuration is protected"):
        assert found[what] == ("broken" if what == broken else "held")


def test_a_folder_in_which_everybody_can_write_lets_everybody_change_its_files(public: Site) -> None:
    (public.base / HOSPITALS[2]).chmod(0o777)
    found = statuses(look(public, HOSPITALS[2]))
    assert found["data are private"] == found["configuration is protected"] == "broken"


def test_a_folder_that_nobody_else_may_enter_keeps_its_files(public: Site) -> None:
    for name in ("records.npz", "config.toml"):
        (public.base / HOSPITALS[2] / name).chmod(0o666)
    (public.base / HOSPITALS[2]).chmod(0o700)
    found = statuses(look(public, HOSPITALS[2]))
    assert found["data are private"] == found["configuration is protected"] == "held"


def test_records_for_evaluation_and_programs_that_give_records(public: Site) -> None:
    folder = public.base / HOSPITALS[2]
    shutil.copy(folder / "records.npz", folder / "held-out.npz")
    (folder / "held-out.npz").chmod(0o644)
    (folder / "program").mkdir(0o755)
    evaluation = {"kind": "arrays", "path": "held-out.npz"}
    public.write_config(HOSPITALS[2], evaluation=evaluation)
    found = finding(look(public, HOSPITALS[2]), "data are private")
    assert (found.status, found.detail) == ("broken", "held-out.npz can be read by everybody")
    program = {"kind": "entry-point", "function": "hospital:records", "folder": "program"}
    public.write_config(HOSPITALS[2], data=program)
    assert finding(look(public, HOSPITALS[2]), "data are private").status == "held"
    (folder / "program").chmod(0o775)
    found = finding(look(public, HOSPITALS[2]), "data are private")
    assert (found.status, found.detail) == ("broken", "program can be changed by its group")
    public.write_config(HOSPITALS[2], data={"kind": "arrays", "path": "nowhere.npz"})
    assert finding(look(public, HOSPITALS[2]), "data are private").status == "not testable"


def test_whoever_audits_a_site_finds_it_its_owners(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root looks at the node of a service user."""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    found = statuses(look(site, HOSPITALS[2]))
    assert found["key files are private"] == found["folders are private"] == "held"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("given", ["all", "all but the configuration", "the key file"])
def test_files_that_belong_to_another_user(given: str, site: Site, tmp_path: Path) -> None:
    copy = copied(site, tmp_path)
    folder = copy.base / HOSPITALS[2]
    (folder / "state").mkdir(0o700)
    paths = [folder / "keys" / "identity.key"] if given == "the key file" else [folder, *folder.rglob("*")]
    for path in paths:
        if given != "all but the configuration" or path != copy.config(HOSPITALS[2]):
            os.chown(path, 1000, 1000)
    found = look(copy, HOSPITALS[2])
    assert finding(found, "folders are private").status == "held"
    assert finding(found, "key files are private").status == ("broken" if given == "the key file" else "held")


def test_a_certificate_that_ends_soon_is_found(site: Site) -> None:
    late = datetime.now(UTC) + timedelta(days=350)
    findings = deployment.judge_deployment(deployment.collect_deployment(site.config(HOSPITALS[0]), late, probe=False))
    assert statuses(findings)["certificates of the study last"] == "broken"
    assert statuses(findings)["certificates of the study"] == "held"


# --- the rounds of a running study


def twice(study: Study, lines: list[bytes]) -> list[bytes]:
    other = study.sign_transcript([study.round_record(1, upload_bytes=1, builds_on="11" * 32)])
    return [*lines, *other]


def few_votes(study: Study, _lines: list[bytes]) -> list[bytes]:
    return study.sign_transcript([study.round_record(1, voters=study.names[:2])])


def small_cohort(study: Study, _lines: list[bytes]) -> list[bytes]:
    return study.sign_transcript([study.round_record(1, survivors=study.names[:2], cohort=study.names[:2])])


ROUNDS: dict[str, tuple[Callable[[Study, list[bytes]], list[bytes]], str, str]] = {
    "honest": (lambda _, lines: lines, "held", "2 records"),
    "torn": (lambda _, lines: [lines[0], lines[1][:-20]], "held", "1 records"),
    "none yet": (lambda _, lines: [lines[0][:-1]], "not testable", "no round is finished"),
    "two records of one round": (twice, "broken", "EQUIVOCATION"),
    "few votes": (few_votes, "broken", "2 votes"),
    "small cohort": (small_cohort, "broken", "fewer than 3 survivors"),
    "a changed byte": (lambda _, lines: [lines[0].replace(b"seconds", b"sekonds", 1)], "broken", "receipts.jsonl"),
}


@pytest.mark.parametrize("how", ROUNDS)
def test_rounds_that_the_running_aggregator_has_signed(how: str, site: Site, tmp_path: Path) -> None:
    change, status, says = ROUNDS[how]
    copy = copied(site, tmp_path)
    study = Study(site.consortium, read_agreement((site.base / "study" / "agreement.toml").read_bytes()))
    state = copy.base / HOSPITALS[1] / "state" / f"test-study-{site.digest[:16]}"
    state.mkdir(parents=True, mode=0o700)
    (state / "receipts.jsonl").write_bytes(b"".join(change(study, study.shown(study.transcript()))))
    (state / "receipts.jsonl").chmod(0o600)
    found = finding(look(copy, HOSPITALS[1]), "rounds of the running study")
    assert found.status == status, found
    assert says in found.detail


def test_uploads_that_come_again_in_a_running_study_are_found() -> None:
    study = rounds.RunningStudy(2, (rounds.Repeats("digests of uploads", 8, 7),), 0, ())
    assert rounds.judge_rounds(study).status == "broken"
    assert rounds.judge_rounds(msgspec.structs.replace(study, repeats=(), study_keys=2)).status == "broken"


# --- the door


@contextmanager
def aggregator(site: Site) -> Iterator[str]:
    """The real process, as `secgeo aggregator` runs it."""
    command = [sys.executable, "-m", "secgeo.cli", "aggregator", str(site.config(AGGREGATOR)), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
        assert process.poll() is None  # it has outlived whatever was done to it
        process.terminate()
        process.wait(20)


def test_a_running_aggregator_turns_every_stranger_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CATALOGUE", [])
    with aggregator(site) as address:
        config = site.write_config(HOSPITALS[3], aggregator_address=address)
        evidence = run(agreed(), config=config)
    seen = evidence.deployment
    assert seen is not None
    assert len(seen.probes) == 9
    assert not [probe for probe in seen.probes if probe.served or not probe.reached]
    assert sum(probe.seconds for probe in seen.probes) < 10
    assert status_of(evidence, "strangers") == "held"
    assert status_of(evidence, "secrets") == "broken"  # the keys of this site are in clear


def door(site: Site, endpoint_address: str) -> tuple[str, str]:
    evidence = deployment.collect_deployment(
        site.write_config(HOSPITALS[3], aggregator_address=endpoint_address), datetime.now(UTC)
    )
    return deployment.judge_strangers(evidence)


def test_an_open_door_is_broken(site: Site) -> None:
    identity = site.consortium.identities[AGGREGATOR]
    with (
        open_door(),
        AggregatorEndpoint(
            "tcp://127.0.0.1:*", curve_secret=identity.curve_secret, curve_public=identity.curve_public, allowed={}
        ) as endpoint,
    ):
        status, detail = door(site, endpoint.address)
    assert (status, detail) == ("broken", "served: a key that no roster has")


def test_what_is_no_aggregator_or_not_there_is_not_testable(site: Site) -> None:
    assert door(site, "tcp://127.0.0.1:9")[0] == "not testable"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                peer.close()

        threading.Thread(target=answer, daemon=True).start()
        status, detail = door(site, f"tcp://127.0.0.1:{port}")
        server.shutdown(socket.SHUT_RDWR)
    assert status == "not testable", detail


def test_a_door_without_encryption_is_broken() -> None:
    """A peer that greets with NULL and says it is ready serves everybody."""
    from secgeo.probe import greeting, say

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(greeting(b"NULL") + b"\x04\x05\x05READY")

        threading.Thread(target=serve, daemon=True).start()
        reply = say(f"tcp://127.0.0.1:{server.getsockname()[1]}", greeting(b"NULL"), seconds=2.0)
    assert door_of._probe("no encryption (NULL)", reply).served
    assert reply.mechanism == "NULL"
    for address in ("tcp://127.0.0.1:0", "tcp://*:1", "127.0.0.1:80", "tcp://host:99999"):
        with pytest.raises(SecGeoError):
            say(address, b"")


def test_the_size_of_the_vector_is_the_agreements(honest: ProtocolEvidence) -> None:
    agreement = agreed()
    assert honest.parameters.values == Layout.from_agreement(agreement).size
    assert honest.parameters.members == len(agreement.members)
