"""The command line: `secgeo authority|keys|agreement|aggregator|node|demo|verify|budget|audit`.

Exit codes: 0 ok, 2 usage, 3 configuration, 4 keys, 5 network, 6 a peer misbehaved, 7 budget exhausted, 8 verification failed.
Heavy imports happen inside the commands that need them: the aggregator and `verify` never import torch.
"""

from __future__ import annotations

import json as jsonlib
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from audit.audit_commands import audit_app
from audit.budget_commands import budget_app
from keys.enrolment import ungroup_digits
from keys.errors import ConfigError, SecGeoError, VerificationFailed
from secgeo.admin import Json, PassphraseFile, agreement_app, authority_app, keys_app, read_passphrase
from secgeo.console import emit, show

app = typer.Typer(
    name="secgeo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Hospitals train one multimodal model together over a secure sum, under differential privacy.",
    epilog="Exit codes: 0 ok, 2 usage, 3 configuration, 4 keys, 5 network, 6 peer misbehaved, 7 budget exhausted, 8 verification failed.",
)
app.add_typer(authority_app, name="authority")
app.add_typer(keys_app, name="keys")
app.add_typer(agreement_app, name="agreement")
app.add_typer(budget_app, name="budget")
app.add_typer(audit_app, name="audit")

Config = Annotated[Path, typer.Argument(help="TOML configuration file; paths in it are relative to it.")]


def _reporter(json: bool):  # type: ignore[no-untyped-def]
    def report(event: str, fields: dict[str, object]) -> None:
        if not emit(json, event=event, **fields):
            show(
                f"{datetime.now():%H:%M:%S}  {event:14} " + "  ".join(f"{key}={value}" for key, value in fields.items())
            )
            sys.stdout.flush()

    return report


@app.command()
def aggregator(config: Config, passphrase_file: PassphraseFile = None, json: Json = False) -> None:
    """Run the aggregator of one study: one listening port, public records, no patient data.

    Example: secgeo aggregator aggregator.toml
    """
    from secgeo.aggregator import run_aggregator
    from secgeo.config import AggregatorConfig, read_config

    settings = read_config(config, AggregatorConfig)
    base = config.parent
    chosen = passphrase_file or (base / settings.passphrase_file if settings.passphrase_file else None)
    passphrase = read_passphrase(chosen, prompt=settings.keys, unencrypted=settings.unencrypted_keys)
    run_aggregator(settings, base, passphrase, _reporter(json))


@app.command()
def node(config: Config, passphrase_file: PassphraseFile = None, json: Json = False) -> None:
    """Run a hospital's node: check everything, then train and sum until the study ends.

    Example: secgeo node node.toml
    """
    from secgeo.config import NodeConfig, read_config
    from secgeo.node import run_node

    settings = read_config(config, NodeConfig)
    base = config.parent
    chosen = passphrase_file or (base / settings.passphrase_file if settings.passphrase_file else None)
    passphrase = read_passphrase(chosen, prompt=settings.keys, unencrypted=settings.unencrypted_keys)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that the ledger is closed
    run_node(settings, base, passphrase, _reporter(json))


@app.command()
def demo(
    protocol: Annotated[str, typer.Option(help="Secure-sum protocol: masked, layered or homomorphic.")] = "masked",
    data: Annotated[
        str, typer.Option(help="breast-cancer (three views of nuclei) or mfeat (six views of digits).")
    ] = "breast-cancer",
    nodes: Annotated[int, typer.Option(help="Hospitals, 4 or more.", min=4, max=16)] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1, max=1000)] = 10,
    seed: Annotated[int, typer.Option(help="Fixes who gets which patients.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the records; runs/demo-DATE-TIME by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a whole consortium on this machine: authority, aggregator and hospitals, each its own process, on real data.

    Examples:

      secgeo demo

      secgeo demo --data mfeat --nodes 6 --out runs/digits

      secgeo demo --protocol layered

      secgeo demo --json | jq .verdict
    """
    from secgeo.demo import run_demo

    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    metrics = run_demo(protocol=protocol, data=data, nodes=nodes, rounds=rounds, seed=seed, out=folder, quiet=json)
    emit(json, **metrics)
    if not metrics["ok"]:
        raise VerificationFailed(f"the demonstration did not end well: {metrics['verdict']}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A study's folder of records.")],
    authority: Annotated[str | None, typer.Option(help="The authority's fingerprint, from a source you trust.")] = None,
    at: Annotated[
        datetime | None, typer.Option(help="Check certificates against this moment (UTC) instead of now.")
    ] = None,
    json: Json = False,
) -> None:
    """Verify a folder of records offline: signatures, chains, sums, ledgers, epsilon. Exits 8 on any change of one byte.

    Example: secgeo verify runs/demo --authority "3f0a 91c2 ..."
    """
    from audit.records import verify_folder

    now = (at or datetime.now(UTC)).replace(tzinfo=UTC)
    pinned = ungroup_digits(authority) if authority else None
    report = verify_folder(folder, authority_fingerprint=pinned, now=now)
    if not emit(json, **report.to_json()):
        for check in report.checks:
            show(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {check.detail}")
        for warning in report.warnings:
            show(f"note    {warning}")
        show("every check holds" if report.ok else "verification FAILED")
    if not report.ok:
        raise typer.Exit(VerificationFailed.exit_code)


def main() -> None:
    """Run the command line; errors of SecGeo become one line on standard error and their exit code."""
    try:
        app()
    except SecGeoError as error:
        kind = type(error).__name__
        sys.stderr.write(
            (jsonlib.dumps({"error": kind, "message": str(error)}) if "--json" in sys.argv else f"secgeo: {error}")
            + "\n"
        )
        sys.exit(error.exit_code)
    except RecursionError:
        sys.stderr.write("secgeo: the input is nested too deeply\n")
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
