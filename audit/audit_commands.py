"""The commands of a privacy auditor: `secgeo audit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keys.enrolment import ungroup_digits
from keys.errors import ConfigError, VerificationFailed
from secgeo.console import emit, show

if TYPE_CHECKING:
    from audit.bundle import Verdict

audit_app = typer.Typer(
    no_args_is_help=True, help="Privacy audits: attack training, secure sum and records, and keep signed evidence."
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")]


@audit_app.command("run")
def audit_run(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|CONFIG", help="A study's folder of records, or a node's configuration.")
    ],
    out: Annotated[Path | None, typer.Option(help="New folder for the bundle; audits/DATE-TIME by default.")] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="fast: under two minutes on two cores, for every change of a model or an agreement. full: more of all."
        ),
    ] = "fast",
    plant: Annotated[
        str | None,
        typer.Option(help="Plant this bug into the training, to see the audit find it: `secgeo audit plants`."),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="For a demonstration's folder: whose training to audit; by default the first's.")
    ] = None,
    authority: Annotated[str | None, typer.Option(help="The authority's fingerprint, from a source you trust.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Key folder to sign with; else a key is made for this bundle.")
    ] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="The passphrase of --keys.")] = None,
    json: Json = False,
) -> None:
    """Audit a study. Leaves evidence, verdict, report and signature in one folder; exits 8 if a promise is broken or a part missing.

    Nothing is sent anywhere, but for a few harmless probes of the aggregator that a configuration names. No encrypted key is opened
    but that of --keys; of a site's key and passphrase files the audit sees whether they are sound, and keeps nothing of what is in
    them. A bundle of a hospital's own training is confidential: it holds statistics of its records.

    Examples:

      secgeo audit run runs/demo --authority "3f0a 91c2 ..." --out audits/demo

      secgeo audit run node.toml --profile full

      secgeo audit run runs/demo --plant half-noise
    """
    from audit.run import Request, run_audit
    from keys.identity import Identity
    from secgeo.admin import read_passphrase

    if profile not in ("fast", "full"):
        raise ConfigError("--profile is fast or full")
    folder = out or Path("audits") / f"{datetime.now():%Y%m%d-%H%M%S}"
    identity = None
    if keys is not None:
        identity = Identity.load(keys, read_passphrase(passphrase_file, prompt=str(keys), unencrypted=False))
    request = Request(
        source=source,
        out=folder,
        profile="full" if profile == "full" else "fast",
        plant=plant,
        node=node,
        authority=ungroup_digits(authority) if authority else None,
        identity=identity,
    )
    with _progress(quiet=json) as report:
        verdict = run_audit(request, report)
    _tell(verdict, json, out=str(folder))


@audit_app.command("verify")
def audit_verify(
    folder: Annotated[Path, typer.Argument(help="The folder that `secgeo audit run` left.")],
    auditor: Annotated[
        str | None, typer.Option(help="The auditor's public key in hexadecimal, from a source you trust.")
    ] = None,
    authority: Annotated[str | None, typer.Option(help="The authority's fingerprint, from a source you trust.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Draw the report anew into this file instead of comparing: for bundles of other versions."),
    ] = None,
    json: Json = False,
) -> None:
    """Check a bundle without trust in its auditor's program: the signature, then verdict and report computed again from the evidence.

    Exits 8 if a byte was changed, if verdict or report do not follow from the evidence, or if the verdict is that a promise was broken
    (with --json, only the last prints an object).

    Examples:

      secgeo audit verify audits/demo

      secgeo audit verify audits/demo --auditor "9b1c..." --authority "3f0a 91c2 ..." --json
    """
    from audit.bundle import verify
    from audit.report import render

    if report is not None and report.exists():
        raise ConfigError(f"{report} exists; give --report a new file")
    pinned = ungroup_digits(authority) if authority else None
    verdict, signed, notes = verify(folder, auditor, pinned, render, report)
    if not json:
        show(f"signed by {signed.name}: {signed.public_key}")
        for note in notes:
            show(f"note    {note}")
        compared = "signature, verdict and report" if report is None else "signature and verdict"
        show(f"{compared} hold: they follow from the evidence\n")
    _tell(verdict, json, auditor=signed.public_key, notes=notes)


@audit_app.command("plants")
def audit_plants(json: Json = False) -> None:
    """List the bugs that `secgeo audit run --plant` can plant."""
    from audit.plants import PLANTS

    if not emit(json, **{plant.name: plant.what for plant in PLANTS.values()}):
        for plant in PLANTS.values():
            show(f"{plant.name:26} {plant.what}")


def _line(text: str) -> None:
    """Print what may be a stranger's words: nothing that a terminal would take for an order."""
    show("".join(letter if letter.isprintable() else "?" for letter in text))


def _tell(verdict: Verdict, json: bool, **more: object) -> None:
    import msgspec

    if not emit(json, **msgspec.to_builtins(verdict), **more):
        for finding in verdict.of("broken"):
            _line(f"BROKEN  {finding.part}: {finding.name}: {finding.detail}")
        counts = ", ".join(f"{len(verdict.of(status))} {status}" for status in ("held", "broken", "not testable"))
        if verdict.missing:
            reasons = (
                f"{part} ({verdict.about.not_done.get(part, 'no evidence, or not all of it')})"
                for part in verdict.missing
            )
            _line(f"MISSING  {', '.join(reasons)}")
        broken = "PROMISES WERE BROKEN" if verdict.of("broken") else "INCOMPLETE"
        show(f"\n{'no promise was broken' if verdict.ok else broken}: {counts}")
        if "training data" in verdict.about.not_done:
            _line(f"training and leakage were NOT audited: {verdict.about.not_done['training data']}")
        if "out" in more:
            show(f"report: {more['out']}/report.html    check the bundle: secgeo audit verify {more['out']}")
    if not verdict.ok:
        raise typer.Exit(VerificationFailed.exit_code)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, str, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.fields[part]:13}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks = {}

        def report(part: str, doing: str, done: float) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(doing, total=1.0, part=part)
            progress.update(tasks[part], completed=done, description=doing)

        yield report
