"""A whole consortium in memory, for the tests of every package: real keys and signatures, no files and no scrypt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509

from keys import certificates
from keys.authority import Authority
from keys.enrolment import make_request, read_request
from keys.identity import Identity
from keys.roster import Roster, RosterEntry, load_root, make_roster, read_roster

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
"""The clock of the tests; all certificates are valid for a year around it."""

AGGREGATOR = "aggregator"


@dataclass(frozen=True)
class Consortium:
    """An authority and the parties it enrolled. `identities` are the hospitals by name, and "aggregator"."""

    authority: Authority
    root: x509.Certificate
    identities: Mapping[str, Identity]
    document: bytes
    signature: bytes
    roster: Roster


def make_consortium(hospital_ids: Sequence[str], now: datetime = NOW) -> Consortium:
    """Enrol the hospitals and one aggregator, and sign their roster."""
    authority = Authority.create("Test authority", now - timedelta(days=30))
    identities = {name: Identity.generate(name, "hospital") for name in hospital_ids}
    identities[AGGREGATOR] = Identity.generate(AGGREGATOR, "aggregator")
    entries = [enrol(authority, identity, now) for identity in identities.values()]
    document, signature = make_roster(authority, "Test consortium", 1, 1, entries)
    root = load_root(authority.root_pem, authority.fingerprint)
    roster = read_roster(document, signature, root, now=now)
    return Consortium(authority, root, identities, document, signature, roster)


def enrol(authority: Authority, identity: Identity, now: datetime = NOW) -> RosterEntry:
    """Enrol one party by way of its request, and install its certificate."""
    request = read_request(make_request(identity))
    certificate = authority.issue(request, now - timedelta(days=1), now + timedelta(days=365))
    identity.install_certificate(certificates.to_pem(certificate))
    return RosterEntry.enrolled(request, certificate)
