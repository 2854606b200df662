"""One attempt of four small hospitals, run by the real machines: every value that a second implementation wants to compare.

hospital-01 deals its seeds and vanishes before it uploads, so that its pair masks are recovered: with hospital-00 from a
contribution that was sealed to it, with the two others from its pair master.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgspec
import numpy as np

from audit.attacks.network import MemorySpool
from keys.errors import RemoteProtocolError
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, tags, transcript
from protocols.agreement import agreement_digest, read_agreement
from protocols.attempt_aggregator import AttemptAggregator
from protocols.attempt_node import AttemptNode, Parties
from protocols.encoding import FixedPoint
from protocols.graph import MaskGraph
from protocols.prg import TAG_PRIME
from protocols.rings import make_ring
from protocols.sealing import AttemptId, AttemptSecrets
from tests.vectors.cases import named
from tests.vectors.codec import FOLDER, coins, from_json, to_json
from tests.vectors.key_cases import Recorded, identity
from tests.vectors.product import body_fields

NAMES, LOST, AGGREGATOR = named(4), "hospital-01", "aggregator"
UPDATES = {
    "hospital-00": [0.0, 1.0, -1.0, 0.30000000000000004, 127.99, -500.0],
    "hospital-01": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "hospital-02": [0.5, -2.25, 1e-4, -1e-4, 500.0, -500.0],
    "hospital-03": [-0.0001220703125, 0.0001220703125, 0.0003662109375, 3.14159, -2.71828, 0.0],
}
AGREEMENT = (FOLDER / "agreement.toml").read_text("ascii")

Replace = Callable[[str, str, Any], Any]
"""(recipient, type of body, body) to what is delivered instead."""


class Run:
    """The machines of one attempt, and every message that a node sent."""

    def __init__(self, recorded: Recorded, replace: Replace = lambda _recipient, _kind, body: body) -> None:
        agreement = read_agreement(AGREEMENT.encode())
        self.digest = agreement_digest(AGREEMENT.encode())
        self.attempt = AttemptId(self.digest, 1, 1)
        self.identities = {name: identity(name) for name in NAMES}
        keys = {name: identity.public_key for name, identity in self.identities.items()}
        self.parties = Parties(agreement, self.digest, keys)
        self.secrets = {name: AttemptSecrets.fresh(coins(f"attempt of {name}")) for name in NAMES}
        self.coins = {name: coins(f"attempt of {name}") for name in NAMES}
        self.drawn: dict[str, list[bytes]] = {name: [] for name in NAMES}
        self.nodes: dict[str, AttemptNode] = {}
        self.aggregator = AttemptAggregator(
            self.parties, self.attempt, NAMES, len(UPDATES[LOST]), MemorySpool(), ring=make_ring(agreement)
        )
        self.sent: dict[str, dict[str, list[bytes]]] = {name: {} for name in NAMES}
        self.delivered: dict[tuple[str, str], Any] = {}
        self._replace = replace
        masters = {
            sealing.public_key_bytes(master, self.attempt): master
            for secrets in self.secrets.values()
            for master in (secrets.share_master, secrets.pair_master)
        }

        def seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
            return recorded.seal(masters[public], self.attempt, plaintext, info) if info else b"a valid key"

        with mock.patch.object(sealing, "seal", seal):
            self._run()

    def _coin(self, name: str, count: int) -> bytes:
        drawn = self.coins[name](count)
        self.drawn[name].append(drawn)
        return drawn

    def _run(self) -> None:
        queue = deque(self.aggregator.start())
        while queue:
            name, body = queue.popleft()
            kind = type(body).__name__
            body = self._replace(name, kind, body)
            self.delivered[name, kind] = body
            if isinstance(body, m.AttemptOpen):
                self.nodes[name] = AttemptNode(
                    self.parties,
                    self.identities[name],
                    self.attempt,
                    body.cohort,
                    np.array(UPDATES[name]),
                    ring=make_ring(self.parties.agreement),
                    coins=lambda count, name=name: self._coin(name, count),  # type: ignore[misc]
                    journal=lambda _event, _tag_seed: None,
                )
                answers = self.nodes[name].open()
            elif name == LOST and isinstance(body, m.Credit):
                queue.extend(self.aggregator.leave(LOST))
                continue
            else:
                answers = self.nodes[name].receive(body)
            for data in answers:
                self._to_aggregator(queue, name, data)

    def _to_aggregator(self, queue: deque[Any], name: str, data: bytes) -> None:
        message = m.decode(data, name, self.parties.public_keys[name], self.digest)
        kind = type(message.body).__name__
        body = self._replace(AGGREGATOR, f"{kind} of {name}", message.body)
        if body is not message.body:
            data = m.encode(self.identities[name], self.attempt, body, message.tail)
            message = m.decode(data, name, self.parties.public_keys[name], self.digest)
        self.sent[name].setdefault(kind, []).append(data)
        queue.extend(self.aggregator.receive(name, message, data))

    def body(self, name: str, kind: str) -> Any:
        """The first body of that kind that a node sent."""
        return self.bodies(name, kind)[0]

    def bodies(self, name: str, kind: str) -> list[Any]:
        key = self.parties.public_keys[name]
        return [m.decode(data, name, key, self.digest).body for data in self.sent[name][kind]]


@dataclass(frozen=True)
class Refusal:
    """A body that comes instead of the right one, and must be refused."""

    description: str
    at: str
    instead_of: str
    body: Any


def refuse(recorded: Recorded, at: str, instead_of: str, fields: Any) -> str:
    """What the machine at fault is told; fields as on the wire.

    Raises:
        AssertionError: the body was not refused.
    """
    bad = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=m.AnyBody)

    def replace(recipient: str, kind: str, body: Any) -> Any:
        return bad if (recipient, kind) == (at, instead_of) else body

    try:
        run = Run(recorded, replace)
    except RemoteProtocolError as error:
        if at != AGGREGATOR and error.peer == AGGREGATOR:
            return str(error)
        raise
    author = instead_of.rpartition(" ")[2]
    if at != AGGREGATOR or author not in run.aggregator.blamed:
        raise AssertionError(f"{at} took it")
    return run.aggregator.blamed[author]


def document(recorded: Recorded) -> dict[str, Any]:
    """The whole of round.json, as JSON values."""
    run = Run(recorded)
    refused = []
    for case in _refusals(run):
        fields = body_fields(case.body)
        says = refuse(recorded, case.at, case.instead_of, fields)
        entry = {"description": case.description, "at": case.at, "instead_of": case.instead_of, "body": fields}
        refused.append(entry | {"error": "RemoteProtocolError", "says": says})
    return to_json(
        {
            "subject": "round",
            "about": "One attempt of four hospitals, of which hospital-01 is lost after it dealt its seeds. See README.md.",
            "agreement": AGREEMENT,
            "agreement_digest": run.digest,
            "round": run.attempt.round,
            "attempt": run.attempt.attempt,
            "lost": LOST,
            "nodes": {name: _node(run, name) for name in NAMES},
            **_schedule(run),
            "sealed": list(_seals(run)),
            "uploads": {name: _upload(run, name) for name in NAMES if name != LOST},
            **_unmasking(run),
            "refused": refused,
        }
    )


def _node(run: Run, name: str) -> dict[str, Any]:
    secrets, coins_of = run.secrets[name], run.drawn[name][4:]
    private = run.identities[name]._signing_key.private_bytes_raw()
    return {
        "identity_private": private,
        "identity_public": run.parties.public_keys[name].public_bytes_raw(),
        "update": UPDATES[name],
        "self_seed": secrets.self_seed,
        "share_master": secrets.share_master,
        "pair_master": secrets.pair_master,
        "tag_seed": secrets.tag_seed,
        "self_seed_coins": coins_of[:2],
        "pair_master_coins": coins_of[2:],
        "round_keys_message": run.sent[name]["RoundKeys"][0],
    }


def _schedule(run: Run) -> dict[str, Any]:
    digests = {name: sealing.keys_digest(run.sent[name]["RoundKeys"][0]) for name in NAMES}
    cohort = sealing.cohort_digest(run.attempt, digests)
    graph = MaskGraph.build(NAMES, 0, cohort)
    pairs = {}
    for low in NAMES:
        for high in NAMES[NAMES.index(low) + 1 :]:
            own = sealing.contribution(run.secrets[low].pair_master, run.attempt, cohort, low, high)
            key = sealing.pair_mask_key(own, run.attempt, cohort, low, high)
            pairs[f"{low} {high}"] = {"contribution": own, "pair_seed": key}
    return {
        "keys_digests": digests,
        "cohort_digest": cohort,
        "order": list(graph.order),
        "dealers": list(graph.dealers),
        "self_mask_keys": {n: sealing.self_mask_key(run.secrets[n].self_seed, run.attempt, n) for n in NAMES},
        "pairs": pairs,
        "senders": NAMES,
        "view": sealing.senders_view(run.attempt, cohort, NAMES),
        "tag_seed": run.secrets[graph.dealers[0]].tag_seed,
    }


def _seals(run: Run) -> Iterator[dict[str, Any]]:
    for sender in NAMES:
        for body, message in zip(run.bodies(sender, "SealedSeeds"), run.sent[sender]["SealedSeeds"], strict=True):
            to, cohort = body.recipient, body.cohort_digest
            names = {"sender": sender, "recipient": to}
            info = sealing.shares_info(run.attempt, cohort, sender, to)
            plaintext = _opened(run.secrets[to].share_master, run, info, body.shares)
            yield {**names, "key": "share", "info": info, "plaintext": plaintext, "sealed": body.shares}
            if body.contribution:
                info = sealing.contribution_info(run.attempt, cohort, sender, to)
                plaintext = _opened(run.secrets[to].pair_master, run, info, body.contribution)
                yield {**names, "key": "pair", "info": info, "plaintext": plaintext, "sealed": body.contribution}
            yield {**names, "fields_after_the_seals": body_fields(body)[5:], "message_digest": m.chunk_digest(message)}


def _opened(master: bytes, run: Run, info: bytes, sealed: bytes) -> bytes:
    return sealing.unseal(sealing.private_key(master, run.attempt), sealed, info)


def _upload(run: Run, name: str) -> dict[str, Any]:
    fixed_point = FixedPoint.from_agreement(run.parties.agreement)
    encoded = fixed_point.encode(np.array(UPDATES[name]))
    tagger = tags.Tagger(_schedule(run)["tag_seed"], run.attempt)
    tag = (tagger.part(encoded) + tagger.pad) % TAG_PRIME
    chunk = run.sent[name]["UploadChunk"][0]
    head_bytes = 4 + int.from_bytes(chunk[:4])
    return {
        "encoded": encoded.tolist(),
        "tag": tag.to_bytes(8),
        "chunk": chunk[head_bytes:],
        "upload_chunk_message": chunk,
        "masked_tag": run.body(name, "UploadDone").tag.to_bytes(8),
        "upload_digest": run.body(name, "UploadDone").digest,
        "upload_done_message": run.sent[name]["UploadDone"][0],
    }


def _unmasking(run: Run) -> dict[str, Any]:
    outcome = run.aggregator.outcome
    if outcome is None:
        raise AssertionError(run.aggregator.failure)
    alive = [name for name in NAMES if name != LOST]
    fixed_point = FixedPoint.from_agreement(run.parties.agreement)
    reveals = {name: run.body(name, "Unmasking") for name in alive}
    return {
        "survivors": outcome.survivors,
        "survivor_statement": transcript.survivor_statement(run.attempt, outcome.view, outcome.survivors),
        "votes": outcome.votes,
        "revealed": {n: {"self_shares": b.self_shares, "pair_shares": b.pair_shares} for n, b in reveals.items()},
        "unmasking_message": run.sent["hospital-00"]["Unmasking"][0],
        "sum": outcome.total.tolist(),
        "aggregate_tag": outcome.tag.to_bytes(8),
        "aggregate_digest": transcript.aggregate_digest(outcome.total.data),
        "decoded": fixed_point.decode(outcome.total, len(alive)).tolist(),
    }


def _refusals(run: Run) -> Iterator[Refusal]:
    node = "hospital-00"

    def got(kind: str) -> Any:
        return run.delivered[node, kind]

    keys, seeds, alive, proof = got("KeySet"), got("SeedSet"), got("Survivors"), got("SurvivorProof")
    listed, others = keys.digests, tuple(entry for entry in keys.digests if entry[0] != node)
    for why, digests in (
        ("our own round keys are left out", others),
        ("our own round keys are replaced", ((node, bytes(32)), *others)),
        ("the digests are not sorted", listed[::-1]),
        ("a node that is not in the cohort", (*listed, ("hospital-09", bytes(32)))),
        ("fewer nodes than the minimum cohort", listed[:2]),
        ("the round keys themselves are held back", listed),
    ):
        yield Refusal(why, node, "KeySet", m.KeySet(digests, ()))
    yield Refusal("out of order", node, "KeySet", m.Credit(1))
    for why, senders in (
        ("we are left out, who dealt", tuple(NAMES[1:])),
        ("a sender is named twice", (*NAMES, NAMES[0])),
        ("a sender without round keys", (*NAMES, "hospital-09")),
        ("fewer senders than the minimum cohort", tuple(NAMES[:2])),
        ("the seeds themselves are held back", tuple(NAMES)),
    ):
        yield Refusal(why, node, "SeedSet", m.SeedSet(senders, ()))
    misled = next(data for data in run.sent["hospital-02"]["SealedSeeds"] if data not in seeds.sealed)
    yield Refusal("seeds that were sealed to another node", node, "SeedSet", m.SeedSet(tuple(NAMES), (misled,)))
    own = dict(alive.survivors)[node]
    for why, survivors, uploads in (
        ("not sorted", alive.survivors[::-1], alive.uploads),
        ("a node twice", (*alive.survivors, alive.survivors[-1]), alive.uploads),
        ("a node that never dealt seeds", (*alive.survivors, ("hospital-09", own)), alive.uploads),
        ("fewer than the minimum cohort", alive.survivors[:2], alive.uploads),
        ("another digest of our own upload", ((node, bytes(32)), *alive.survivors[1:]), alive.uploads),
        ("another digest of a neighbour's upload", (*alive.survivors[:-1], (NAMES[-1], own)), alive.uploads),
        ("the lost node as a survivor", tuple(sorted((*alive.survivors, (LOST, own)))), alive.uploads),
        ("a neighbour's signed upload is held back", alive.survivors, alive.uploads[:1]),
    ):
        yield Refusal(f"survivors: {why}", node, "Survivors", m.Survivors(survivors, uploads))
    lost_vote = run.identities[LOST].sign(Label.SURVIVORS, b"")
    for why, votes in (
        ("fewer than the threshold", proof.votes[:2]),
        ("one vote twice", (*proof.votes[:2], proof.votes[1])),
        ("a vote of a node that is no survivor", (*proof.votes[:2], (LOST, lost_vote))),
        ("a vote under another's name", (*proof.votes[:2], (proof.votes[2][0], proof.votes[1][1]))),
    ):
        yield Refusal(f"votes: {why}", node, "SurvivorProof", m.SurvivorProof(votes))
    shown = run.body(node, "Unmasking")
    self_shares, pair_shares = shown.self_shares, shown.pair_shares
    wrong = (self_shares[1][0], bytes([*self_shares[1][1][:-1], self_shares[1][1][-1] ^ 1]))
    for why, bad in (
        ("a share other than the dealt one", m.Unmasking((self_shares[0], wrong, *self_shares[2:]), pair_shares)),
        ("a share that is no field element", m.Unmasking(((node, b"\xff" * 33), *self_shares[1:]), pair_shares)),
        ("a share is missing", m.Unmasking(self_shares[:-1], pair_shares)),
        ("both shares of one node", m.Unmasking((*self_shares, (LOST, self_shares[0][1])), pair_shares)),
        ("one share twice", m.Unmasking((*self_shares, self_shares[0]), pair_shares)),
    ):
        yield Refusal(f"revealed: {why}", AGGREGATOR, f"Unmasking of {node}", bad)
    done = run.body(node, "UploadDone")
    for why, digest, view, tag in (
        ("another digest than that of the chunks", bytes(32), done.view, done.tag),
        ("masked for other senders", done.digest, bytes(32), done.tag),
        ("another tag than the digest is over", done.digest, done.view, done.tag ^ 1),
    ):
        yield Refusal(f"upload: {why}", AGGREGATOR, f"UploadDone of {node}", m.UploadDone(digest, view, tag))
    vote = m.SurvivorVote(run.identities[node].sign(Label.SURVIVORS, b"another statement"))
    yield Refusal("a vote on another statement", AGGREGATOR, f"SurvivorVote of {node}", vote)
    yield Refusal("out of order", AGGREGATOR, f"RoundKeys of {node}", done)


def replayed(recorded: Recorded, case: dict[str, Any]) -> str:
    """What the refused case of round.json gives now."""
    return refuse(recorded, case["at"], case["instead_of"], from_json(case["body"]))
