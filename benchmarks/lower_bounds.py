"""How close an audit comes: the epsilon that it shows against the true one, by method and number of canaries.

    python benchmarks/lower_bounds.py --json --plot docs/images/audited-epsilon.png

Prints one JSON line per true epsilon, number of canaries and method: the mean of the lower bounds over seeds, the interval that holds
95 % of them, and how many were above the truth (at a confidence of 95 % one of twenty may be). The mechanism is Gaussian noise
without sampling, as strong as epsilon at delta 1e-5 says, on orthogonal canaries: what the best attack on it can show.

* `one_run_steinke` and `one_run_fdp` (a Gaussian curve): one run with so many canaries;
* `many_run` and `many_run_gdp`: as many runs as there are canaries, half of them with the one canary. What one run saves.

The lines `sampled` are of steps of noise on Poisson samples, as in training: the true epsilon is that of Google's PLD, which is a little
above it, and the attack is the likelihood ratio, the best there is; bounds by curves take that of the sampled mechanism.

How many canaries are guessed is fixed before any score is seen: the number that is best if the right guesses are as many as this
noise makes one expect.

The last lines (`published`) are what the papers' table says of such noise, beside what our bounds give in the same way: as many
right guesses as one expects, of the number of guesses that is best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from scipy import optimize, stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from audit.lower_bounds import (  # noqa: E402
    Poisson,
    gaussian_epsilon,
    gaussian_mu,
    guesses,
    many_run,
    many_run_fdp,
    many_run_gdp,
    one_run_fdp,
    one_run_steinke,
)

METHODS = {
    "one_run_steinke": "one run (Steinke et al. 2023)",
    "one_run_fdp": "one run, Gaussian curve (Mahloujifar et al. 2024)",
    "many_run": "as many runs, (epsilon, delta)",
    "many_run_gdp": "as many runs, Gaussian curve (Nasr et al. 2023)",
}
PUBLISHED = {
    # noise multiplier: (canaries, epsilon by Steinke et al., by Mahloujifar et al.) at delta 1e-5 and 95 % confidence
    4.0: (1_000_000, 0.61, 0.82),
    2.0: (100_000, 1.33, 1.59),
    1.0: (100_000, 2.61, 3.61),
    0.5: (100_000, 4.99, 8.16),
}
"""Mahloujifar, Melis and Chaudhuri, "Auditing f-differential privacy in one run", ICML 2025 (PMLR 267), table 1."""

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Row = dict[str, object]


def expected_accuracy(mu: float, share: float) -> float:
    """The share of right guesses if `share` of the canaries is guessed, half at the top and half at the bottom of all scores."""
    end = optimize.brentq(lambda t: stats.norm.sf(t) + stats.norm.sf(t - mu) - share, -10.0, 10.0 + mu)
    return float(stats.norm.sf(end - mu) / share)


def planned(bound: Callable[[int, int], float], mu: float, canaries: int) -> int:
    """How many to guess at the top and as many at the bottom, from the noise alone."""
    tops = {max(1, round(share * canaries / 2)) for share in SHARES}
    return max(sorted(tops), key=lambda top: bound(int(2 * top * expected_accuracy(mu, 2 * top / canaries)), 2 * top))


def audits(epsilon: float, canaries: int, method: str, seeds: int, delta: float, tick: Callable[[], None]) -> Row:
    """The bounds of one method over the seeds."""
    mu, found, began = gaussian_mu(epsilon, delta), [], time.perf_counter()

    def bound(correct: int, guessed: int) -> float:
        if method == "one_run_steinke":
            return one_run_steinke(correct, guessed, canaries, delta)
        return one_run_fdp(correct, guessed, canaries, delta).epsilon

    top = planned(bound, mu, canaries) if method.startswith("one_run") else 0
    for seed in range(seeds):
        random = np.random.default_rng([seed, canaries])
        members = random.random(canaries) < 0.5
        scores = random.normal(0.0, 1.0 / mu, canaries) + members
        if top:
            found.append(bound(guesses(scores, members, top, top), 2 * top))
        elif method == "many_run":
            found.append(many_run(scores[members], scores[~members], delta))
        else:
            found.append(many_run_gdp(scores[members], scores[~members], delta).epsilon)
        tick()
    low, high = np.quantile(found, [0.025, 0.975])
    row: Row = {"part": "audit", "true_epsilon": epsilon, "delta": delta, "canaries": canaries, "method": method}
    row |= {"mean": round(float(np.mean(found)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    row |= {"above_the_truth": sum(one > epsilon for one in found), "audits": seeds}
    return row | ({"guesses": 2 * top} if top else {}) | {"seconds": round(time.perf_counter() - began, 3)}


SAMPLED = ((0.1, 20, 1.0), (0.2, 60, 2.49))
"""Sample rate, steps and noise multiplier; the second about as in a study."""

SAMPLED_METHODS = {
    "one_run_steinke": "one run (Steinke et al. 2023)",
    "one_run_fdp": "one run, curve of sampled noise",
    "many_run": "as many runs, (epsilon, delta)",
    "many_run_fdp": "as many runs, curve of sampled noise",
}


def sampled_scores(
    random: np.random.Generator, mechanism: Poisson, noise: float, members: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Log-likelihood ratios [canaries] of orthogonal canaries: whether each is among those that are sampled."""
    rate, found = mechanism.sample_rate, np.zeros(len(members))
    for _ in range(mechanism.steps):
        seen = random.normal(0.0, noise, len(members)) + (random.random(len(members)) < rate) * members
        found += np.log1p(rate * np.expm1((2.0 * seen - 1.0) / (2.0 * noise**2)))
    return found


def sampled(
    settings: tuple[float, int, float], canaries: int, method: str, seeds: int, delta: float, tick: Callable[[], None]
) -> Row:
    """The bounds of one method over the seeds, on sampled noise."""
    rate, steps, noise = settings
    mechanism, found, began = Poisson(rate, steps), [], time.perf_counter()
    truth = mechanism.epsilon(noise, delta)

    def bound(correct: int, guessed: int) -> float:
        if method == "one_run_steinke":
            return one_run_steinke(correct, guessed, canaries, delta)
        return one_run_fdp(correct, guessed, canaries, delta, family=mechanism).epsilon

    top = 0
    if method.startswith("one_run"):  # from scores of other seeds
        random = np.random.default_rng([canaries])
        members = random.random(canaries) < 0.5
        scores = sampled_scores(random, mechanism, noise, members)
        tops = {max(1, round(share * canaries / 2)) for share in SHARES}
        top = max(
            sorted(tops), key=lambda top: one_run_steinke(guesses(scores, members, top, top), 2 * top, canaries, delta)
        )
    for seed in range(seeds):
        random = np.random.default_rng([seed, canaries, steps])
        members = random.random(canaries) < 0.5
        scores = sampled_scores(random, mechanism, noise, members)
        if top:
            found.append(bound(guesses(scores, members, top, top), 2 * top))
        elif method == "many_run":
            found.append(many_run(scores[members], scores[~members], delta))
        else:
            found.append(many_run_fdp(scores[members], scores[~members], delta, family=mechanism).epsilon)
        tick()
    low, high = np.quantile(found, [0.025, 0.975])
    row: Row = {"part": "sampled", "sample_rate": rate, "steps": steps, "noise_multiplier": noise, "delta": delta}
    row |= {"true_epsilon": round(truth, 4), "canaries": canaries, "method": method}
    row |= {"mean": round(float(np.mean(found)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    row |= {"above_the_truth": sum(one > truth for one in found), "audits": seeds}
    return row | ({"guesses": 2 * top} if top else {}) | {"seconds": round(time.perf_counter() - began, 3)}


def published(noise_multiplier: float, delta: float) -> Row:
    """A row of the papers' table, and ours. Guesses and right guesses are the papers' way: no run, and no price for the choice."""
    canaries, steinke, fdp = PUBLISHED[noise_multiplier]
    mu, shown = 1.0 / noise_multiplier, {"one_run_steinke": 0.0, "one_run_fdp": 0.0}
    for share in np.geomspace(1e-4, 0.5, 25):
        guessed = 2 * round(share * canaries / 2)
        correct = round(guessed * expected_accuracy(mu, guessed / canaries))
        shown["one_run_steinke"] = max(shown["one_run_steinke"], one_run_steinke(correct, guessed, canaries, delta))
        shown["one_run_fdp"] = max(shown["one_run_fdp"], one_run_fdp(correct, guessed, canaries, delta).epsilon)
    row: Row = {"part": "published", "true_epsilon": round(gaussian_epsilon(mu, delta), 4), "delta": delta}
    row |= {"noise_multiplier": noise_multiplier, "canaries": canaries}
    row |= {method: round(epsilon, 4) for method, epsilon in shown.items()}
    return row | {"published_steinke": steinke, "published_fdp": fdp}


SAYS = {"audit": "true ", "sampled": "sampled, true "}


def draw(rows: list[Row], path: Path) -> None:
    """One panel per true epsilon, and one for the papers' table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    papers = [row for row in rows if row["part"] == "published"]
    kinds = sorted({(str(row["part"]), float(str(row["true_epsilon"]))) for row in rows if row["part"] != "published"})
    count = len(kinds) + 1
    figure, panels = plt.subplots(1, count, figsize=(3.0 * count, 3.9), layout="constrained", squeeze=False)
    for panel, (part, truth) in zip(panels[0], kinds, strict=False):
        methods = METHODS if part == "audit" else SAMPLED_METHODS
        for method, style in zip(methods, ("o-", "s-", "o:", "s:"), strict=True):
            mine = [
                row for row in rows if (row["part"], row["true_epsilon"], row.get("method")) == (part, truth, method)
            ]
            columns = {
                key: np.array([row[key] for row in mine], dtype=float) for key in ("canaries", "mean", "low", "high")
            }
            color = "C0" if style[0] == "s" else "C1"
            panel.plot(
                columns["canaries"], columns["mean"], style, color=color, label=METHODS.get(method), markersize=4
            )
            if style[1] == "-":
                panel.fill_between(columns["canaries"], columns["low"], columns["high"], color=color, alpha=0.15, lw=0)
        panel.axhline(truth, color="black", linestyle="--", linewidth=1, label="true epsilon")
        panel.set(
            xscale="log",
            ylim=(0, 1.12 * truth),
            xlabel="canaries, or runs",
            title=f"{'' if part == 'audit' else 'sampled: '}true epsilon {truth:.3g}",
        )
    panels[0][0].set_ylabel("epsilon shown at 95 % confidence")
    last, true = panels[0][-1], [float(str(row["true_epsilon"])) for row in papers]
    for method, paper, style, color in (
        ("one_run_steinke", "published_steinke", "o", "C1"),
        ("one_run_fdp", "published_fdp", "s", "C0"),
    ):
        last.plot(true, [row[method] for row in papers], style + "-", color=color, markersize=4)
        last.plot(true, [row[paper] for row in papers], style, color=color, markerfacecolor="none", markersize=9)
    last.plot(true, true, color="black", linestyle="--", linewidth=1)
    last.set(xlabel="true epsilon", title="large, empty: as published", ylim=(0, 1.05 * max(true)))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="the true ones")
    parser.add_argument("--canaries", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines are the only form; given for the sake of scripts"
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    cells = [(e, m, method) for e in arguments.epsilon for m in arguments.canaries for method in METHODS]
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("audits", total=len(cells) * arguments.seeds)
        for epsilon, canaries, method in cells:
            rows.append(
                audits(epsilon, canaries, method, arguments.seeds, arguments.delta, lambda: progress.advance(task))
            )
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sampled noise", total=len(SAMPLED) * 3 * len(SAMPLED_METHODS) * arguments.seeds)
        for settings in SAMPLED:
            for canaries in (1000, 10_000, 100_000):
                for method in SAMPLED_METHODS:
                    rows.append(
                        sampled(
                            settings, canaries, method, arguments.seeds, arguments.delta, lambda: progress.advance(task)
                        )
                    )
                    sys.stdout.write(json.dumps(rows[-1]) + "\n")
                    sys.stdout.flush()
    for noise_multiplier in PUBLISHED:
        rows.append(published(noise_multiplier, arguments.delta))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
