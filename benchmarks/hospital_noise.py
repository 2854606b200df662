"""What it costs to hide whole hospitals: noise shared out inside the secure sum, against the central and the local mechanism.

    python benchmarks/hospital_noise.py --seeds 5 --json benchmarks/results/hospital-noise.json

Twelve hospitals on the UCI digits, ten rounds, each also under record-level DP (epsilon 8). All methods have the same budget for the
hospital (delta 1e-5; one hospital's updates zero) and the same bound on an update's norm, and differ in who adds the noise:

* `none`: nobody; the hospital as a whole is not protected.
* `central`: a trusted centre, once, to the sum. The best there is, if there were such a centre.
* `shared`: every hospital its share; at least eight of twelve stay and one of them may collude, so that seven are counted on. All stay.
* `shared, 4 drop out`: in every noised round another four are missing; what was counted on is left.
* `local`: every hospital enough noise to stand alone, as without a secure sum.

Like `unpaired.py` it runs the real trainer, encoding and `apply_sum` in one process; `noise` is the standard deviation of the noise on a
value of the sum, measured, over that of `central`; `error` is the relative L2 error that it makes in the mean update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from unpaired import study_agreement  # noqa: E402

from audit.plan import plan_hospital  # noqa: E402
from protocols.agreement import Agreement, HospitalPrivacy, check_rules  # noqa: E402
from protocols.encoding import FixedPoint  # noqa: E402
from secgeo import metrics  # noqa: E402
from secgeo.datasets import DemoData, demo_split  # noqa: E402
from secgeo.hospital_noise import discrete_gaussian, private_values, to_grid  # noqa: E402
from secgeo.noise import NoiseSource  # noqa: E402
from secgeo.training import LocalTrainer  # noqa: E402
from secgeo.update import Layout, SharedState, apply_sum  # noqa: E402

HOSPITALS, MINIMUM, DELTA, NORM = 12, 8, 1e-5, 0.1
METHODS = ("none", "central", "shared", "shared, 4 drop out", "local")
MEASURES = ("accuracy", "noise", "error")
replace = msgspec.structs.replace


def agreed(data: DemoData, epsilon: float) -> Agreement:
    """The agreement of `unpaired.py` with noise for the hospital; its threshold, 7 of 12, tolerates one colluder."""
    plain = study_agreement(data, 8.0, "secgeo")
    noise = plan_hospital(epsilon, DELTA, plain.study.rounds, MINIMUM - 1).noise_multiplier
    study = replace(
        plain,
        secure_sum=replace(plain.secure_sum, minimum_cohort=MINIMUM),
        hospital_privacy=HospitalPrivacy(noise, NORM, DELTA, epsilon),
    )
    check_rules(study)
    return study


def run(data: DemoData, epsilon: float, method: str) -> dict[str, float]:
    """One study; gives accuracy over hospitals, and noise and error over its noised rounds."""
    study = agreed(data, epsilon)
    layout, code, share = Layout.from_agreement(study), FixedPoint.from_agreement(study), study.noise_share
    assert share is not None
    private, central = private_values(layout), share.std * math.sqrt(share.contributors)
    alone = {"shared": share.std, "shared, 4 drop out": share.std, "local": central}.get(method)

    def noise(std: float) -> np.ndarray:
        return discrete_gaussian(int(private.sum()), std / share.step) * share.step

    trainers = [
        LocalTrainer(study, member, node.records, data.anchors[node.modality], noise=NoiseSource(), device="cpu")
        for member, node in zip(study.members, data.nodes, strict=True)
    ]
    state, noises, errors = SharedState.initial(study), [], []
    for number in range(study.study.rounds):
        absent = {(4 * number + index) % HOSPITALS for index in range(4)} if number and "drop out" in method else set()
        clear = [t.train_round(state).vector(layout) for index, t in enumerate(trainers) if index not in absent]
        sent = [vector.copy() for vector in clear]
        for vector in sent if number and method != "none" else []:
            vector[private] = to_grid(vector[private], share) * share.step
        bounded = np.sum(sent, axis=0)[private]
        for vector in sent if number and alone else []:
            vector[private] += noise(alone)
        total = code.decode(np.sum([code.encode(vector) for vector in sent], axis=0, dtype=np.uint32), len(sent))
        if number and method == "central":
            total[private] += noise(central)
        if number:
            true = np.sum(clear, axis=0)[private]
            noises.append(np.std(total[private] - bounded) / central)
            errors.append(np.linalg.norm(total[private] - true) / np.linalg.norm(true))
        state = apply_sum(state, layout, total, study)
    for trainer in trainers:
        trainer.load_shared(state)
    own = [t.evaluate(data.test_views[n.modality], data.test_labels) for t, n in zip(trainers, data.nodes, strict=True)]
    return {"accuracy": float(np.mean(own)), "noise": float(np.mean(noises)), "error": float(np.mean(errors))}


def markdown(runs: list[dict[str, object]], epsilons: list[float]) -> str:
    """A table of means and 95% intervals over seeds."""
    lines = ["| hospital epsilon | noise | " + " | ".join(MEASURES) + " |", "|---" * (2 + len(MEASURES)) + "|"]
    for epsilon, method in itertools.product(epsilons, METHODS):
        chosen = [run for run in runs if run["epsilon"] == epsilon and run["method"] == method]
        cells = []
        for measure in MEASURES:
            result = metrics.interval([float(str(run[measure])) for run in chosen])
            cells.append(f"{result.mean:.3f} ± {result.half_width:.3f}")
        lines.append(f"| {epsilon:g} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of splits; seeds 0, 1, ...")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 50.0])
    parser.add_argument("--json", type=Path, help="where to write every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, object]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("mfeat", total=options.seeds * len(options.epsilons) * len(METHODS))
        for seed in range(options.seeds):
            data = demo_split("mfeat", HOSPITALS, seed)
            for epsilon, method in itertools.product(options.epsilons, METHODS):
                runs.append({"seed": seed, "epsilon": epsilon, "method": method, **run(data, epsilon, method)})
                progress.advance(task)
    if options.json:
        settings = {"hospitals": HOSPITALS, "minimum_cohort": MINIMUM, "delta": DELTA, "max_update_norm": NORM}
        options.json.write_text(json.dumps({"settings": settings, "runs": runs}) + "\n")
    print(markdown(runs, options.epsilons))


if __name__ == "__main__":
    main()
