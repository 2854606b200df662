"""The commands of the authority and of key holders: `secgeo authority`, `secgeo keys` and `secgeo agreement`.

All of them work on local files; nothing here opens a socket. Passphrases are typed or read from a 0600 file, never taken
from the command line or the environment.
"""

from __future__ import annotations

import getpass
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from keys import certificates
from keys.authority import Authority
from keys.enrolment import make_request, read_request, ungroup_digits
from keys.errors import ConfigError, KeyFileError
from keys.files import read_passphrase_file, read_public, write_public
from keys.identity import Identity
from keys.labels import Label
from keys.roster import Roster, RosterEntry, add_entry, load_root, make_roster, read_roster, revoke
from keys.signed import sign_document
from protocols.agreement import (
    Agreement,
    agreement_digest,
    fit_chunks,
    fit_ciphertexts,
    read_agreement,
    sparse_graph,
    write_agreement,
)
from protocols.packing import DEGREE, choose
from secgeo.console import emit, show
from secgeo.records import write_manifest
from secgeo.study import AGREEMENT, ANCHORS, ROOT, ROSTER

ANCHORS_LIMIT_BYTES = 1 << 30

authority_app = typer.Typer(no_args_is_help=True, help="The consortium's offline authority: enrol, revoke, sign.")
keys_app = typer.Typer(
    no_args_is_help=True, help="A site's own keys: create them, ask for enrolment, install the certificate."
)
agreement_app = typer.Typer(no_args_is_help=True, help="The study agreement: make it, sign it, read it.")

PassphraseFile = Annotated[
    Path | None, typer.Option(help="File (mode 0600) with the passphrase of the key folder; asked for when absent.")
]
Unencrypted = Annotated[
    bool, typer.Option("--unencrypted", help="Store the key without a passphrase. Only for throw-away keys.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Folder = Annotated[Path, typer.Argument(help="Folder of the keys.")]


def read_passphrase(path: Path | None, *, prompt: str, unencrypted: bool = False, new: bool = False) -> bytes | None:
    """The passphrase from a file or the terminal; None only if `unencrypted` says so.

    Raises:
        KeyFileError: no file, no terminal, an empty passphrase, or two that differ.
    """
    if unencrypted:
        return None
    if path is not None:
        return read_passphrase_file(path)
    if not sys.stdin.isatty():
        raise KeyFileError("there is no terminal to ask for the passphrase; give --passphrase-file FILE (mode 0600)")
    typed = getpass.getpass(f"Passphrase of {prompt}: ")
    if not typed:
        raise KeyFileError("the passphrase is empty; use --unencrypted if you mean to store this key in clear")
    if new and getpass.getpass("The same again: ") != typed:
        raise KeyFileError("the two passphrases differ")
    return typed.encode()


# --- keys


@keys_app.command("create")
def keys_create(
    node_id: Annotated[str, typer.Argument(help="Name in lower-case letters, digits and dashes.")],
    folder: Folder,
    role: Annotated[str, typer.Option(help="hospital or aggregator.")] = "hospital",
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    json: Json = False,
) -> None:
    """Create a site's keys and write its enrolment request beside them.

    Example: secgeo keys create st-olav keys/
    """
    if role not in ("hospital", "aggregator"):
        raise ConfigError("--role is hospital or aggregator")
    identity = Identity.generate(node_id, role)  # type: ignore[arg-type]
    identity.save(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted, new=True))
    request = make_request(identity)
    path = folder / f"{node_id}.request.json"
    write_public(path, request)
    fingerprint = read_request(request).fingerprint
    if emit(json, request=str(path), fingerprint=fingerprint):
        return
    show(f"keys are in {folder}; send {path} to the authority and read this fingerprint to them over the telephone:")
    show(f"  {fingerprint}")


@keys_app.command("fingerprint")
def keys_fingerprint(
    request: Annotated[Path, typer.Argument(help="An enrolment request.")],
    json: Json = False,
) -> None:
    """Show who made an enrolment request, and the fingerprint to compare out of band."""
    parsed = read_request(read_public(request))
    if not emit(json, node_id=parsed.node_id, role=parsed.role, fingerprint=parsed.fingerprint):
        show(f"{parsed.node_id} ({parsed.role})\n  {parsed.fingerprint}")


@keys_app.command("install")
def keys_install(
    folder: Folder,
    certificate: Annotated[Path, typer.Argument(help="PEM file from the authority.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
) -> None:
    """Check that a certificate belongs to these keys and install it.

    Example: secgeo keys install keys/ st-olav.pem
    """
    identity = Identity.load(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted))
    identity.install_certificate(read_public(certificate))
    identity.save_certificate(folder)
    show(f"the certificate of {identity.node_id} is installed in {folder}")


# --- authority


@authority_app.command("create")
def authority_create(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of the consortium.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    json: Json = False,
) -> None:
    """Create the authority's root key and an empty roster. Keep the folder offline.

    Example: secgeo authority create authority/ --name "Nordic imaging consortium"
    """
    authority = Authority.create(name)
    authority.save(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted, new=True))
    _write_roster(folder, *make_roster(authority, name, 1, 1, []))
    if not emit(json, fingerprint=authority.fingerprint):
        show("every site pins this fingerprint (authority_fingerprint in its configuration):")
        show(f"  {authority.fingerprint}")


@authority_app.command("enrol")
def authority_enrol(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="The site's enrolment request.")],
    fingerprint: Annotated[str, typer.Option(help="The fingerprint that the site read to you, all 64 digits.")],
    out: Annotated[Path, typer.Option(help="Where to write the certificate (PEM).")],
    days: Annotated[int, typer.Option(help="How long the certificate is valid.", min=1, max=3650)] = 365,
    replace: Annotated[bool, typer.Option(help="Rotation: give a listed site new keys and revoke the old.")] = False,
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
) -> None:
    """Certify a site whose fingerprint you have compared, and issue a new signed roster.

    Example: secgeo authority enrol authority/ st-olav.request.json --fingerprint "8c1f ..." --out st-olav.pem
    """
    parsed = read_request(read_public(request))
    if ungroup_digits(fingerprint) != ungroup_digits(parsed.fingerprint):
        raise KeyFileError(
            f"the fingerprint you compared is not that of {request}: somebody may have replaced the request; do not enrol it"
        )
    authority = Authority.load(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted))
    now = datetime.now(UTC)
    certificate = authority.issue(parsed, now - timedelta(minutes=5), now + timedelta(days=days))
    roster = _read_roster(folder, authority)
    _write_roster(folder, *add_entry(authority, roster, RosterEntry.enrolled(parsed, certificate), replace=replace))
    write_public(out, certificates.to_pem(certificate))
    show(f"{parsed.node_id} is enrolled until {now + timedelta(days=days):%Y-%m-%d}; give them {out}")


@authority_app.command("revoke")
def authority_revoke(
    folder: Folder,
    node_id: Annotated[str, typer.Argument(help="Whose certificate to revoke.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
) -> None:
    """Revoke a site's certificate for good and issue a new roster epoch."""
    authority = Authority.load(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted))
    _write_roster(folder, *revoke(authority, _read_roster(folder, authority), node_id))
    show(f"{node_id} is revoked; give every site the new {ROSTER} and {ROSTER}.sig")


@authority_app.command("roster")
def authority_roster(folder: Folder, json: Json = False) -> None:
    """List who is enrolled."""
    root = read_public(folder / "root.pem")
    fingerprint = certificates.fingerprint(certificates.from_pem(root))
    roster = _read_public_roster(folder, load_root(root, fingerprint))
    rows = [
        {
            "node_id": e.node_id,
            "role": e.role,
            "certificate": e.certificate_fingerprint,
            "unusable": roster.unusable.get(e.node_id),
        }
        for e in roster.listed
    ]
    listed = {"consortium": roster.consortium, "epoch": roster.epoch, "version": roster.version, "entries": rows}
    if not emit(json, authority_fingerprint=fingerprint, **listed):
        show(f"{roster.consortium}, epoch {roster.epoch}, version {roster.version}\n  fingerprint {fingerprint}")
        for row in rows:
            show(f"  {row['node_id']:24} {row['role']:11} {row['unusable'] or 'in use'}")


@authority_app.command("archive")
def authority_archive(
    folder: Folder,
    records: Annotated[Path, typer.Argument(help="A finished study's folder of records, ledgers included.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
) -> None:
    """Sign the digests of all files in a folder of records, so that any later change of one byte shows.

    Example: secgeo authority archive authority/ records/
    """
    authority = Authority.load(folder, read_passphrase(passphrase_file, prompt=str(folder), unencrypted=unencrypted))
    write_manifest(records, authority.sign)
    show(f"{records} is signed; check it with: secgeo verify {records} --authority {authority.fingerprint}")


def _read_roster(folder: Path, authority: Authority) -> Roster:
    return _read_public_roster(folder, authority.root)


def _read_public_roster(folder: Path, root: Any) -> Roster:
    return read_roster(read_public(folder / ROSTER), read_public(folder / f"{ROSTER}.sig"), root, now=datetime.now(UTC))


def _write_roster(folder: Path, document: bytes, signature: bytes) -> None:
    # The signature first: a crash in between leaves a pair that is refused, never one that passes for whole.
    write_public(folder / f"{ROSTER}.sig", signature)
    write_public(folder / ROSTER, document)


# --- agreement


@agreement_app.command("make")
def agreement_make(
    spec: Annotated[Path, typer.Argument(help="TOML with the study's parameters, without digests and certificates.")],
    authority: Annotated[
        Path, typer.Option(help="The authority's folder: its key signs, its roster gives the certificates.")
    ],
    anchors: Annotated[
        Path, typer.Option(help="Folder with the public anchors: MODALITY.npy (float32) for each modality.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the signed study documents, to be given to every site.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    json: Json = False,
) -> None:
    """Fill in every digest, check every rule, sign, and write the folder that all sites receive.

    Example: secgeo agreement make study.toml --authority authority/ --anchors anchors/ --out study/
    """
    signer = Authority.load(authority, read_passphrase(passphrase_file, prompt=str(authority), unencrypted=unencrypted))
    roster = _read_roster(authority, signer)
    parameters = _read_spec(spec)
    views = read_anchors(anchors, parameters)
    agreement = complete(parameters, roster, signer.fingerprint, views)
    document = write_agreement(agreement)
    read_agreement(document)
    (out / ANCHORS).mkdir(parents=True, exist_ok=True)
    for name in views:
        write_public(out / ANCHORS / f"{name}.npy", read_public(anchors / f"{name}.npy", ANCHORS_LIMIT_BYTES))
    write_public(out / ROOT, signer.root_pem)
    for name in (ROSTER, f"{ROSTER}.sig"):
        write_public(out / name, read_public(authority / name))
    write_public(out / f"{AGREEMENT}.sig", sign_document(signer.sign, Label.AGREEMENT, document))
    write_public(out / AGREEMENT, document)
    digest = agreement_digest(document).hex()
    if not emit(json, agreement_digest=digest, authority_fingerprint=signer.fingerprint):
        show(f"the study documents are in {out}; every site pins these two in its configuration:")
        show(f'  agreement_digest = "{digest}"\n  authority_fingerprint = "{signer.fingerprint}"')


@agreement_app.command("show")
def agreement_show(path: Annotated[Path, typer.Argument(help="agreement.toml")], json: Json = False) -> None:
    """Check an agreement's rules and show its digest and what it promises. The signature is checked by nodes and `verify`."""
    document = read_public(path)
    agreement = read_agreement(document)
    digest = agreement_digest(document).hex()
    if emit(json, agreement_digest=digest, agreement=msgspec.to_builtins(agreement)):
        return
    privacy, ring = agreement.privacy, agreement.secure_sum
    show(
        f"study {agreement.study.id}: {len(agreement.members)} members, {agreement.study.rounds} rounds\n  digest {digest}"
    )
    colluders = agreement.colluders_tolerated
    private = (
        f"private although {colluders} members collude" if colluders else "private unless a single member colludes"
    )
    show(
        f"  {ring.protocol} sum, threshold {ring.threshold}, at least {ring.minimum_cohort} contributors, "
        f"{private} with a malicious aggregator"
    )
    if ring.encrypted:
        packing = choose(ring.value_bits, len(agreement.members))
        show(
            f"  BFV: degree {DEGREE}, one prime of {packing.parameters.prime_bits} bits ({packing.parameters.security_bits}-bit class), "
            f"t = 2^{ring.plain_bits}, {packing.block_values} values a ciphertext"
        )
    if ring.neighbours:
        show(f"  each shares masks with {ring.neighbours} others; {ring.share_threshold} of them recover a secret")
    most = f" (at most {privacy.records_per_patient} records each)" if privacy.records_per_patient else ""
    show(
        f"  DP-SGD per {privacy.unit}{most}: noise multiplier {privacy.noise_multiplier}, sample rate {privacy.sample_rate}, "
        f"{agreement.total_steps} steps, epsilon at most {privacy.epsilon_budget} at delta {privacy.delta}"
    )
    hospital, share = agreement.hospital_privacy, agreement.noise_share
    if hospital and share:
        show(
            f"  noise for the whole hospital: multiplier {hospital.noise_multiplier}, updates of norm {hospital.max_update_norm}, "
            f"{share.contributors} shares counted on, epsilon at most {hospital.epsilon_budget} at delta {hospital.delta}"
        )


def complete(spec: dict[str, Any], roster: Roster, fingerprint: str, anchors: dict[str, np.ndarray]) -> Agreement:
    """Fill a spec's roster pin, certificates, trunk digest and anchor digests in, and the graph of masks if it names none.

    Raises:
        ConfigError: a modality has no anchors or anchors of another shape, views differ in length, or the result breaks a rule.
        KeyFileError: a member is not enrolled.
    """
    from secgeo.datasets import anchor_digest
    from secgeo.trunk import trunk_digest

    spec = msgspec.to_builtins(spec)
    spec["roster"] = {
        "epoch": roster.epoch,
        "version": roster.version,
        "digest": roster.digest.hex(),
        "authority_fingerprint": fingerprint,
    }
    for modality in spec.get("modalities", ()):
        view = anchors.get(modality.get("name"))
        if view is None:
            raise ConfigError(f"there are no anchors of {modality.get('name')!r}")
        if list(view.shape[1:]) != list(modality.get("shape", ())):
            raise ConfigError(
                f"anchors of {modality['name']} have shape {list(view.shape[1:])} per record, the study says {modality.get('shape')}"
            )
        modality["anchor_digest"] = anchor_digest(view)
        spec["anchors"] = {"count": len(view)}
    if len({len(view) for view in anchors.values()}) > 1:
        raise ConfigError("all anchor views must show the same anchors in the same order; their lengths differ")
    for member in spec.get("members", ()):
        member["certificate_fingerprint"] = roster.entry(str(member.get("node_id"))).certificate_fingerprint
    ring = spec.get("secure_sum", {})
    if not ring.keys() & {"neighbours", "share_threshold"}:
        masked = ring.get("protocol") != "homomorphic"
        ring["neighbours"], ring["share_threshold"] = sparse_graph(len(spec.get("members", ()))) if masked else (0, 0)
    if ring.get("protocol") in ("layered", "homomorphic"):
        fit_ciphertexts(ring, len(spec.get("members", ())))
    else:
        fit_chunks(ring, len(spec.get("members", ())))
    try:
        model = spec.setdefault("model", {}) | {"trunk_digest": "0" * 64}
        draft = msgspec.convert(spec | {"model": model}, Agreement, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the study's parameters: {error}") from None
    return msgspec.structs.replace(
        draft, model=msgspec.structs.replace(draft.model, trunk_digest=trunk_digest(draft.model))
    )


def read_anchors(folder: Path, spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """The public anchors of every modality in a spec ([a, ...] float32 each), from `folder`/MODALITY.npy.

    Raises:
        ConfigError: a file is missing or is not a plain float32 array.
    """
    views: dict[str, np.ndarray] = {}
    for modality in spec.get("modalities", ()):
        path = folder / f"{modality.get('name')}.npy"
        try:
            views[modality.get("name")] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ConfigError(f"{path} is missing or is not an NPY file of plain numbers") from None
        if views[modality.get("name")].dtype != np.float32:
            raise ConfigError(f"{path} must hold float32 values")
    return views


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
