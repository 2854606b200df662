"""Opening a study: every check that must pass before this site trains or sums, in one place and in a fixed order.

1. the authority's root certificate has the pinned fingerprint;
2. the roster is signed by it, valid today, and every certificate in it chains to it;
3. the agreement has the pinned digest and the authority's signature, and keeps every rule of `protocols.agreement`;
4. agreement and roster belong together: same authority, no roster older than the agreement's, every member present,
   unrevoked, a hospital, and with the certificate that the agreement names.

Whatever fails refuses the study. Used by the node, the aggregator and the offline verifier alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.certificates import check_root
from keys.errors import ConfigError, KeyFileError, VerificationFailed
from keys.files import read_public
from keys.identity import Identity
from keys.labels import Label
from keys.roster import Roster, load_root, read_roster
from keys.signed import verify_document
from protocols.agreement import Agreement, agreement_digest, read_agreement
from protocols.attempt_node import Parties
from secgeo.config import StudyFiles

AGREEMENT, ROSTER, ROOT, ANCHORS = "agreement.toml", "roster.json", "authority.pem", "anchors"
DOCUMENTS = (AGREEMENT, f"{AGREEMENT}.sig", ROSTER, f"{ROSTER}.sig", ROOT)


@dataclass(frozen=True, slots=True)
class OpenStudy:
    """A study whose documents have all been checked."""

    agreement: Agreement
    agreement_digest: bytes
    roster: Roster
    root: x509.Certificate
    documents: dict[str, bytes]

    @property
    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        """The identity key of every member."""
        return {member.node_id: self.roster.entry(member.node_id).public_key for member in self.agreement.members}

    @property
    def parties(self) -> Parties:
        """What the state machines need to know of everybody."""
        return Parties(self.agreement, self.agreement_digest, self.public_keys)

    def check_identity(self, identity: Identity, role: str) -> None:
        """Check that our own keys are those that the roster names.

        Raises:
            KeyFileError: another role, another certificate, or not in the roster at all.
        """
        entry = self.roster.entry(identity.node_id)
        if entry.role != role or identity.role != role:
            raise KeyFileError(f"{identity.node_id} is enrolled as {entry.role}, but is started as {role}")
        if (
            entry.certificate_fingerprint != identity.certificate_fingerprint
            or entry.curve_public != identity.curve_public
        ):
            raise KeyFileError(f"the roster has other keys for {identity.node_id} than this key folder; enrol again")


def open_study(files: StudyFiles, base: Path, *, now: datetime) -> OpenStudy:
    """Read and check the documents in `files.folder`.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: the first check that fails, and what to do.
    """
    folder = base / files.folder
    documents = {name: read_public(folder / name) for name in DOCUMENTS}
    root = load_root(documents[ROOT], files.authority_fingerprint)
    digest = agreement_digest(documents[AGREEMENT])
    if digest.hex() != files.agreement_digest:
        raise VerificationFailed(
            f"the agreement in {folder} has digest {digest.hex()}, but {files.agreement_digest} is pinned;"
            " compare it with the authority before you change the pin"
        )
    return check_documents(documents, root, now=now)


def check_documents(documents: dict[str, bytes], root: x509.Certificate, *, now: datetime) -> OpenStudy:
    """Checks 2 to 4, given a root certificate that is already trusted.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: the first check that fails, and what to do.
    """
    verify_document(check_root(root), Label.AGREEMENT, documents[AGREEMENT], documents[f"{AGREEMENT}.sig"])
    agreement = read_agreement(documents[AGREEMENT])
    pin = agreement.roster
    roster = read_roster(documents[ROSTER], documents[f"{ROSTER}.sig"], root, now=now, minimum=(pin.epoch, pin.version))
    if (roster.epoch, roster.version) == (pin.epoch, pin.version) and roster.digest.hex() != pin.digest:
        raise VerificationFailed("the roster has the version that the agreement names, but other contents")
    for member in agreement.members:
        entry = roster.entry(member.node_id)
        if entry.role != "hospital":
            raise ConfigError(f"{member.node_id} is enrolled as {entry.role} and cannot be a member of a study")
        if entry.certificate_fingerprint != member.certificate_fingerprint:
            raise KeyFileError(
                f"{member.node_id} has another certificate in the roster than in the agreement; the authority must sign a new agreement"
            )
    return OpenStudy(agreement, agreement_digest(documents[AGREEMENT]), roster, root, documents)
