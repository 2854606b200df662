"""Targets of what comes from the network: the envelope of messages, the two state machines, and what nodes seal for each other.

An attacker of the machines is a party of the study: it holds its own signing key. So the fuzzer changes values, and `_resolve`
makes of them messages that are really signed, with relayed messages, record lines and digests in them made right again;
otherwise nothing but the signature checks would ever be reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

from keys.errors import RemoteProtocolError, SecGeoError, VerificationFailed
from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols import sealing
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols.attempt_node import open_contribution, open_shares
from protocols.sealing import AttemptId
from protocols.transcript import read_transcript, verify_transcript
from tests.fuzz import mutate
from tests.fuzz.property import Target, require
from tests.fuzz.world import NODE, Moment, Recording, again, recordings
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import body_type, head

MAXIMUM_FRAMES = 6
PATIENCE_TICKS = 100
"""A study of two rounds ends after far fewer deadlines, whatever happens."""


# --- symbolic messages: [peer, round, attempt, body, tail]


def _symbolic(value: Any, tail: bytes, identities: Any, nested: list[bytes]) -> Any:
    """A body in which everything that is derived stands as a map that says how: relayed messages, record lines, digests."""
    match value:
        case list():
            return [_symbolic(item, tail, identities, nested) for item in value]
        case bytes() if value in [hashlib.sha256(other).digest() for other in nested]:
            return {"digest": [hashlib.sha256(other).digest() for other in nested].index(value)}
        case bytes() if tail and value == m.chunk_digest(tail):
            return {"tail": 0}
        case bytes() if value.startswith(b'{"seq"'):
            return {"line": {k: v for k, v in msgspec.json.decode(value).items() if k != "signature"}}
        case bytes() if m.claimed_sender(value) in identities:
            _, _, number, attempt, sender, body, _ = head(value)
            return {"signed": [sender, number, attempt, body]}
        case _:
            return value


def _relayed(value: Any, identities: Any) -> list[bytes]:
    if isinstance(value, list):
        return [found for item in value for found in _relayed(item, identities)]
    return [value] if isinstance(value, bytes) and m.claimed_sender(value) in identities else []


def _frame(recording: Recording, moment: Moment, data: bytes) -> list[Any]:
    identities = recording.network.consortium.identities
    _, _, number, attempt, sender, body, _ = head(data)
    tail = data[4 + int.from_bytes(data[:4]) :]
    symbolic = _symbolic(body, tail, identities, _relayed(body, identities))
    return [sorted(identities).index(sender), number, attempt, symbolic, tail]


def _resolve(value: Any, tail: bytes, recording: Recording, nested: list[bytes]) -> Any:
    """The inverse of `_symbolic`: everything is signed and hashed anew."""
    identities, digest = recording.network.consortium.identities, recording.network.digest
    match value:
        case {"signed": [sender, number, attempt, body]}:
            signed = m.encode(identities[sender], AttemptId(digest, number, attempt), body)
            nested.append(signed)
            return signed
        case {"line": dict(unsigned)}:
            signature = identities[AGGREGATOR].sign(Label.TRANSCRIPT, msgspec.json.encode(unsigned)).hex()
            return msgspec.json.encode({**unsigned, "signature": signature}) + b"\n"
        case {"tail": 0}:
            return m.chunk_digest(tail)
        case list():
            return [_resolve(item, tail, recording, nested) for item in value]
        case _:
            return value


def _digests(value: Any, nested: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_digests(item, nested) for item in value]
    if isinstance(value, dict) and "digest" in value:
        return hashlib.sha256(nested[value["digest"]]).digest()
    return value


def _sign_frame(frame: list[Any], recording: Recording, identity: Identity) -> bytes:
    _, number, attempt, body, tail = frame
    nested: list[bytes] = []
    resolved = _digests(_resolve(body, tail, recording, nested), nested)
    return m.encode(identity, AttemptId(recording.network.digest, number, attempt), resolved, tail)


def _read_script(
    data: bytes, moments: Callable[[Recording], list[Moment]], signer: str | None
) -> tuple[Recording, Moment, list[tuple[str, bytes]]] | None:
    """What an input says: in which run, from which moment on, which signed messages come. None if it says nothing."""
    try:
        run, stage, frames = msgspec.msgpack.decode(data)
        recording = recordings()[run % len(recordings())]
        known = moments(recording)
        identities = recording.network.consortium.identities
        names = sorted(identities)
        messages = []
        for frame in frames[:MAXIMUM_FRAMES]:
            sender = signer or names[frame[0] % len(names)]
            messages.append((sender, _sign_frame(frame, recording, identities[sender])))
        return recording, known[stage % len(known)], messages
    except Exception:  # whatever is wrong with a script, it is none
        return None


def _scripts(moments: Callable[[Recording], list[Moment]]) -> list[bytes]:
    """Each recorded message at its moment, alone and twice."""
    scripts = []
    for run, recording in enumerate(recordings()):
        for stage, moment in enumerate(moments(recording)):
            frame = _frame(recording, moment, moment.data)
            scripts += [msgspec.msgpack.encode([run, stage, [frame] * times]) for times in (1, 2)]
    return scripts


def _aggregator_scripts() -> list[bytes]:
    """The same, and what a node says that no run has: mutations move it to every moment."""
    scripts = _scripts(lambda recording: recording.aggregator)
    index = sorted(recordings()[0].network.consortium.identities).index(NODE)
    extra = (["Complaint", "hospital-02"], ["Declined", "x"], ["Join", 1, bytes(32), b""], ["StudyEnded", "x"])
    return [*scripts, *(msgspec.msgpack.encode([0, 4, [[index, 1, 1, body, b""]]]) for body in extra)]


# --- the envelope


def _message(data: bytes) -> None:
    network = recordings()[0].network
    identities = network.consortium.identities
    claimed = m.claimed_sender(data)
    sender = claimed if claimed in identities else NODE
    try:
        message = m.decode(data, sender, identities[sender].public_key, network.digest)
    except RemoteProtocolError as fault:
        require(fault.peer == sender, "a message is blamed on whom it came from")
        return
    if isinstance(head(data)[6], list):
        require(data in _batched(), "a message of a batch is, byte for byte, as its sender made it")
        return
    address = AttemptId(network.digest, message.round, message.attempt)
    require(m.encode(identities[sender], address, message.body, message.tail) == data, "one message, one spelling")


@cache
def _batched() -> frozenset[bytes]:
    """What was sent under a signature that other messages share, which no input has made anew."""
    sent = (data for recording in recordings() for _, _, data in recording.messages)
    return frozenset(data for data in sent if isinstance(head(data)[6], list))


@cache
def _message_seeds() -> list[bytes]:
    kinds: dict[tuple[str, str], bytes] = {}
    for sender, _, data in recordings()[0].messages + recordings()[2].messages:
        kinds.setdefault((sender, body_type(data)), data)
    found = {body_type(data): data for data in kinds.values()}
    network = recordings()[0].network
    dealt = next(data for _, _, data in recordings()[3].messages if body_type(data) == "SealedKey")
    unseen = (m.Complaint("hospital-02"), m.Declined("spent"), m.DealKey((dealt,), make=False), m.DealtKey(dealt))
    for body in (*unseen, m.SealedKey("hospital-02", bytes(32), b"sealed")):  # no run above has them
        data = m.encode(network.consortium.identities[NODE], AttemptId(network.digest, 1, 1), body)
        found.setdefault(type(body).__name__, data)
    return list(found.values())


def _signed_message(data: bytes) -> None:
    """A body of any form, in an envelope that is right."""
    recording = recordings()[0]
    try:
        sender, *frame = msgspec.msgpack.decode(data)
        signed = _sign_frame([sender, *frame], recording, recording.network.consortium.identities[sender])
    except Exception:  # not a message at all
        return
    _message(signed)


def _signed_message_seeds() -> list[bytes]:
    frames = []
    for data in _message_seeds():
        sender = head(data)[4]
        frame = _frame(recordings()[0], recordings()[0].node[0], data)
        frames.append(msgspec.msgpack.encode([sender, *frame[1:]]))
    return frames


# --- the machines


def _node(data: bytes) -> None:
    """Whatever a malicious aggregator sends: typed errors only, and never both kinds of shares of one node."""
    script = _read_script(data, lambda recording: recording.node, AGGREGATOR)
    if script is None:
        return
    recording, moment, messages = script
    machine = again(moment.machine)
    revealed: list[tuple[int, int, m.Unmasking]] = []
    for _, message in messages:
        try:
            outputs = machine.receive(message)
        except (RemoteProtocolError, VerificationFailed):
            break
        _carry_out(recording, machine, outputs, revealed)
    for number, attempt, body in revealed:
        same = [other for n, a, other in revealed if (n, a) == (number, attempt)]
        names = [{name for name, _ in shares} for shares in (body.self_shares, body.pair_shares)]
        require(not names[0] & names[1], "never both kinds of shares of one node")
        require(all(other == body for other in same), "one answer to the unmasking of an attempt")
    require(
        len({(number) for number, _, _ in revealed}) == len({(n, a) for n, a, _ in revealed}), "one unmasking a round"
    )


def _carry_out(recording: Recording, machine: Any, outputs: Sequence[Any], revealed: list[Any]) -> None:
    network = recording.network
    for output in outputs:
        match output:
            case node.Send():
                key = network.consortium.identities[NODE].public_key
                sent = m.decode(
                    output.data, NODE, key, network.digest
                )  # a node sends nothing that its peer cannot read
                if isinstance(sent.body, m.Unmasking):
                    revealed.append((sent.round, sent.attempt, sent.body))
            case node.Train():
                _carry_out(recording, machine, machine.submit(output.round, np.zeros(network.size)), revealed)
            case node.Summed():
                require(output.total.shape == (network.size,), "a sum has the agreed size")


def _aggregator(data: bytes) -> None:
    """Whatever malicious nodes send: nothing raises, the study ends at its deadlines, and the transcript verifies."""
    script = _read_script(data, lambda recording: recording.aggregator, None)
    if script is None:
        return
    recording, moment, messages = script
    network, machine = recording.network, again(moment.machine)
    totals = machine._load_sum.__closure__[0].cell_contents.totals
    lines, now = list(moment.lines), machine.deadline - 1.0

    def carry_out(outputs: Sequence[Any]) -> None:
        for output in outputs:
            match output:
                case agg.Record():
                    lines.append(output.line)
                case agg.SumOpened():
                    totals[output.round] = output.total
                case agg.SendTo():
                    require(len(output.data) <= m.MESSAGE_LIMIT_BYTES, "no message is over the limit")

    for peer, message in messages:
        carry_out(machine.receive(peer, message, now))
    for _ in range(PATIENCE_TICKS):
        if machine.ended:
            break
        now = max(now, machine.deadline)
        carry_out(machine.tick(now))
    require(machine.ended, "the study ends at its deadlines")
    try:
        entries = read_transcript(b"".join(lines), network.consortium.identities[AGGREGATOR].public_key)
        verify_transcript(entries, network.agreement, network.digest, network.parties.public_keys)
    except SecGeoError as fault:
        require(False, f"the transcript of an honest aggregator verifies: {fault}")


# --- what a node seals for another


def _sealed(data: bytes) -> None:
    """Any plaintext, sealed as shares and as a contribution."""
    attempt, cohort, master = AttemptId(bytes(32), 1, 1), bytes(32), bytes(range(32))
    private, public = sealing.private_key(master, attempt), sealing.public_key_bytes(master, attempt)
    shares = sealing.seal(public, data, sealing.shares_info(attempt, cohort, "a", "b"))
    contribution = sealing.seal(public, data, sealing.contribution_info(attempt, cohort, "a", "b"))
    digest = sealing.contribution_digest(data, attempt, "a", "b")
    seeds = m.SealedSeeds("b", cohort, shares, contribution, None, None, digest)
    try:
        opened = open_shares(private, attempt, cohort, "a", "b", seeds)
        require(
            msgspec.msgpack.decode(msgspec.msgpack.encode(opened), type=type(opened)) == opened, "shares are shares"
        )
    except sealing.SealBroken:
        pass
    try:
        opened_contribution = open_contribution(private, attempt, cohort, "a", "b", seeds)
        require(opened_contribution == data, "a contribution is opened as it was sealed")
    except sealing.SealBroken:
        pass


def _sealed_seeds() -> list[bytes]:
    share = (1).to_bytes(m.SHARE_BYTES, "big")
    little = share[::-1]
    parts = ([share, share, bytes(32)], [share, little, None], [little, little, None], [None, None, bytes(32)])
    return [bytes(32), *(msgspec.msgpack.encode(part) for part in parts)]


TARGETS = {
    "message": Target(_message, _message_seeds),
    "message-signed": Target(_signed_message, _signed_message_seeds, mutate.msgpack),
    "node": Target(_node, lambda: _scripts(lambda recording: recording.node), mutate.msgpack),
    "aggregator": Target(_aggregator, _aggregator_scripts, mutate.msgpack),
    "sealed": Target(_sealed, _sealed_seeds, mutate.msgpack),
}
