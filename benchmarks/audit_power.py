"""Which audit of training finds which planted bug, at what cost; and whether a sound trainer is ever accused.

    python benchmarks/audit_power.py --seeds 3 --json benchmarks/results/audit-power.json

`--only BUG` (any number of times) measures these anew, and leaves what the file holds of the others; "(none)" is sound training.

The target is one hospital of the breast-cancer demonstration (80 records, 72 steps, epsilon 7.4 claimed at delta 1e-3). Every bug of
`audit.plants` is planted `--seeds` times, every time with another hospital's records; the same without a bug, twice as often. A cell
is in how many of them the audit says "broken". `canaries` are the lower bounds on epsilon of `--profile fast`, by what the attacker sees;
seconds are the medians of the white-box tests and of the canaries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from unpaired import study_agreement  # noqa: E402

from audit import conformance, training  # noqa: E402
from audit.plants import PLANTS  # noqa: E402
from audit.target import Target  # noqa: E402
from secgeo.datasets import LabelledRecords, demo_split  # noqa: E402

SOUND = "(none)"
WHITE_BOX = ("noise", "fresh noise", "sensitivity", "sampling", "bookkeeping", "side channels")
CANARIES = ("gradient canaries, white box", "gradient canaries, black box", "input canaries")


def hospital(seed: int) -> Target:
    """One hospital of the demonstration."""
    data = demo_split("breast-cancer", 4, seed)
    agreement, node = study_agreement(data, 8.0, "secgeo"), data.nodes[seed % 4]
    others = LabelledRecords(data.test_views[node.modality], data.test_labels)
    member = agreement.members[seed % 4]
    return Target(agreement, member, node.records, others, data.anchors[node.modality], "breast-cancer")


def audit(target: Target) -> dict[str, object]:
    """What each audit says, and how long the two kinds took."""
    started = time.monotonic()
    found = {finding.name: finding.status == "broken" for finding in conformance.judge(conformance.collect(target))}
    between = time.monotonic()
    attacks = training.collect(target)
    for attack, finding in zip(attacks.attacks, training.judge(attacks), strict=True):
        view = "gradient canaries, " + attack.view.split(",")[0] if attack.canaries == "Dirac" else "input canaries"
        found[view] = found.get(view, False) or finding.status == "broken"
    bounds = training.bounds(attacks.attacks[0])
    return {
        "found": found,
        "white_box_seconds": between - started,
        "canary_seconds": time.monotonic() - between,
        "epsilon_one_run": bounds.one_run,
        "epsilon_many_run": bounds.many_run,
        "epsilon_claimed": attacks.attacks[0].claim.epsilon,
    }


def markdown(runs: list[dict]) -> str:
    """The table: rows are bugs, columns are audits."""
    columns = (*WHITE_BOX, *CANARIES)
    lines = ["| planted | " + " | ".join(columns) + " | epsilon shown | seconds |", "|---" * (len(columns) + 3) + "|"]
    for plant in (SOUND, *PLANTS):
        own = [run for run in runs if run["plant"] == plant]
        if not own:
            continue
        cells = [sum(run["found"].get(column, False) for run in own) for column in columns]
        shown = statistics.mean(run["epsilon_many_run"] for run in own)
        cost = " + ".join(
            f"{statistics.median(run[f'{kind}_seconds'] for run in own):.0f}" for kind in ("white_box", "canary")
        )
        found = " | ".join(f"{cell}/{len(own)}" if cell else "" for cell in cells)
        lines.append(f"| {plant} | {found} | {shown:.1f} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="audits of each bug")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--only", action="append", choices=[SOUND, *PLANTS], help="measure this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plants = options.only or [SOUND, *PLANTS]
    kept = json.loads(options.json.read_text()) if options.only and options.json and options.json.exists() else []
    runs: list[dict] = [run for run in kept if run["plant"] not in plants]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("audits", total=options.seeds * (len(plants) + (SOUND in plants)))
        for plant in plants:
            for seed in range(options.seeds * (2 if plant == SOUND else 1)):
                target = hospital(seed)
                runs.append(
                    {"plant": plant, "seed": seed, **audit(PLANTS[plant].target(target) if plant in PLANTS else target)}
                )
                progress.advance(task)
                if options.json:
                    options.json.write_text(json.dumps(runs, indent=1) + "\n")
    sys.stdout.write(markdown(runs) + "\n")


if __name__ == "__main__":
    main()
