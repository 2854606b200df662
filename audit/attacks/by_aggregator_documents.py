"""What a malicious aggregator, or whoever hands out documents, tries with them: broken bytes, wrong agreements, rosters and roots."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import product

import msgspec

from audit.attacks.broken import BROKEN
from audit.attacks.play import Play
from audit.attacks.stage import World, attack
from keys.authority import Authority
from keys.enrolment import make_request, read_request
from keys.errors import RemoteProtocolError, SecGeoError
from keys.identity import Identity
from keys.labels import Label
from keys.roster import RosterEntry, add_entry, load_root, make_roster, read_roster, revoke
from keys.signed import sign_document, verify_document
from protocols import messages as m
from protocols import transcript as t
from protocols.agreement import (
    RosterPin,
    read_agreement,
    write_agreement,
)
from protocols.messages import AGGREGATOR
from protocols.policy import LocalPolicy, check_policy
from secgeo.study import AGREEMENT, ROSTER, check_documents


@attack(
    "aggregator",
    "decoders",
    f"hospitals get broken messages: {', '.join(BROKEN)}",
    "a hospital crashes, hangs or obeys",
    carried=False,
)
def _broken_messages_of_the_aggregator(world: World) -> Play:
    """Every kind to a fresh machine of one hospital."""
    network, name = world.network(), world.names[0]
    play = Play(network)
    genuine = play.sign(AGGREGATOR, (1, 0), m.RoundOpen(0))
    for kind, spoil in BROKEN.items():
        play.took_place = True
        try:
            answer = network.new_node(name).receive(spoil(genuine))
        except RemoteProtocolError as fault:
            network.faults.setdefault(name, fault)
            play.gives(fault.peer != AGGREGATOR, f"{kind}: {name} blamed {fault.peer}")
        except Exception as error:  # whatever it is, it is evidence
            play.crashes.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{name} answered {len(answer)} messages to {kind}")
    play.must_refuse = [name]
    return play


@attack(
    "aggregator",
    "decoders",
    "an agreement, a roster, a certificate, an enrolment request and a transcript line are broken in the same ways",
    "one of them is taken, or its decoder raises anything but a typed error",
    carried=False,
)
def _broken_documents(world: World) -> Play:
    play, network = Play(world.network()), world.network()
    identity, authority = network.identities[world.names[0]], Authority.create("Audit")
    request, now = make_request(identity), authority.root.not_valid_after_utc - timedelta(days=1)
    roster, signature = make_roster(authority, "Audit", 1, 1, [_enrol(authority, identity)])
    writer = t.TranscriptWriter(identity)
    line = writer.append(t.StudyClosed(rounds_completed=0, reason="audit"))
    agreement = write_agreement(world.agreement)
    signed = sign_document(authority.sign, Label.AGREEMENT, agreement)

    def decode_agreement(data: bytes) -> None:
        read_agreement(data)
        verify_document(authority.public_key, Label.AGREEMENT, data, signed)

    decoders: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "agreement": (agreement, decode_agreement),
        "roster": (roster, lambda data: read_roster(data, signature, authority.root, now=now)),
        "certificate": (authority.root_pem, lambda data: load_root(data, authority.fingerprint)),
        "request": (request, read_request),
        "transcript": (line, lambda data: t.read_line(data, identity.public_key)),
    }
    play.took_place = True
    for (document, (genuine, decode)), (kind, spoil) in product(decoders.items(), BROKEN.items()):
        try:
            decode(spoil(genuine))
        except SecGeoError:
            continue
        except Exception as error:  # whatever it is, it is evidence
            play.crashes.append(f"{document}, {kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{document}: {kind} was taken")
    return play


@attack(
    "aggregator",
    "documents",
    "a site gets wrong documents: signed by another authority, of weaker rules, an old roster, one in which a member is revoked or has "
    "another certificate, another root; and an agreement below its policy",
    "one of them is taken",
    carried=False,
)
def _wrong_documents(world: World) -> Play:
    play = Play(world.network())
    members, victim = world.names, world.names[-1]
    authority, other = Authority.create("Audit"), Authority.create("Audit")
    now = authority.root.not_valid_after_utc - timedelta(days=1)
    entries = {name: _enrol(authority, play.network.identities[name]) for name in [*members, AGGREGATOR]}
    older, older_signature = make_roster(authority, "Audit", 1, 1, entries.values())
    roster, signature = make_roster(authority, "Audit", 2, 2, entries.values())
    read = read_roster(roster, signature, authority.root, now=now)
    agreement = msgspec.structs.replace(
        world.agreement,
        roster=RosterPin(2, 2, read.digest.hex(), authority.fingerprint),
        members=tuple(
            msgspec.structs.replace(member, certificate_fingerprint=entries[member.node_id].certificate_fingerprint)
            for member in world.agreement.members
        ),
    )
    text = write_agreement(agreement)
    weak = text.replace(f"threshold = {agreement.secure_sum.threshold}".encode(), b"threshold = 2", 1)
    revoked, revoked_signature = revoke(authority, read, victim)
    anew = _enrol(authority, Identity.generate(victim, "hospital"))
    changed, changed_signature = add_entry(authority, read, anew, replace=True)
    genuine = {
        AGREEMENT: text,
        f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, text),
        ROSTER: roster,
        f"{ROSTER}.sig": signature,
    }
    wrong: dict[str, dict[str, bytes]] = {
        "an agreement of another authority": {f"{AGREEMENT}.sig": sign_document(other.sign, Label.AGREEMENT, text)},
        "an agreement of weaker rules": {
            AGREEMENT: weak,
            f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, weak),
        },
        "a roster of another authority": {f"{ROSTER}.sig": other.sign_roster(roster)},
        "an old roster": {ROSTER: older, f"{ROSTER}.sig": older_signature},
        "a revoked member": {ROSTER: revoked, f"{ROSTER}.sig": revoked_signature},
        "another certificate": {ROSTER: changed, f"{ROSTER}.sig": changed_signature},
    }
    check_documents(
        genuine, authority.root, now=now
    )  # so that what is refused below is refused for what is wrong with it
    play.took_place = True
    strict = LocalPolicy(min_threshold=agreement.secure_sum.threshold + 1)
    tries: dict[str, Callable[[], object]] = {
        kind: lambda change=change: check_documents(genuine | change, authority.root, now=now)  # type: ignore[misc]
        for kind, change in wrong.items()
    }
    tries["another root"] = lambda: load_root(other.root_pem, authority.fingerprint)
    tries["an agreement below the policy"] = lambda: check_policy(agreement, strict, epsilon=0.0)
    for kind, take in tries.items():
        try:
            take()
        except SecGeoError:
            continue
        play.gives(True, f"{kind} was taken")
    return play


def _enrol(authority: Authority, identity: Identity) -> RosterEntry:
    request = read_request(make_request(identity))
    root = authority.root
    return RosterEntry.enrolled(request, authority.issue(request, root.not_valid_before_utc, root.not_valid_after_utc))
