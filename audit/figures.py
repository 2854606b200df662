"""The report's figures, as SVG text: the same evidence gives the same bytes. Colours are Okabe and Ito's, told apart by everybody."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from audit.bundle import Evidence
from audit.conformance import ConformanceEvidence
from audit.leakage import OBSERVATIONS, LeakageEvidence, Membership, dp_line, roc
from audit.ledgers import BudgetReport
from audit.protocol import ProtocolEvidence
from audit.training import CanaryScores, TrainingEvidence, bounds
from protocols.agreement import Agreement
from secgeo.accountant import epsilon_after

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#777777", "#D55E00"
STYLE: Any = {
    "svg.hashsalt": "secgeo",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH, HEIGHT = 7.2, 2.8
PANELS_IN_A_ROW = 3

Draw = Callable[[Sequence[Any]], None]


class Figure:
    """One drawing: its title, what it shows in words, and the SVG. Rows are of at most `PANELS_IN_A_ROW`, each `height` inches high."""

    def __init__(self, title: str, says: str, panels: int, draw: Draw, height: float = HEIGHT) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        self.title, self.says = title, says
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the user's own settings are
            matplotlib.rcParams.update(STYLE)
            rows = math.ceil(panels / PANELS_IN_A_ROW)
            columns = math.ceil(panels / rows)
            drawing, axes = plt.subplots(
                rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False
            )
            for axis in axes.flat[panels:]:
                axis.set_axis_off()
            draw(list(axes.flat[:panels]))
            text = io.StringIO()
            drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(drawing)
        self.svg = text.getvalue()


def figures(evidence: Evidence) -> dict[str, list[Figure]]:
    """The figures of each part of the report."""
    drawn: dict[str, list[Figure]] = {"records": [], "training": [], "leakage": [], "protocol": []}
    if evidence.records is not None and evidence.records.budgets:
        drawn["records"].append(_budgets(evidence.records))
    if evidence.training is not None and evidence.training.attacks:
        drawn["training"] += [_bounds(evidence.training), _scores(evidence.training.attacks[0])]
    if evidence.conformance is not None and evidence.conformance.noise:
        drawn["training"].append(_conformance(evidence.conformance))
    if evidence.leakage is not None:
        drawn["leakage"] += [_rocs(evidence.leakage, evidence.study.agreement), _inversions(evidence.leakage)]
    if evidence.protocol is not None and evidence.protocol.series:
        drawn["protocol"].append(_uniformity(evidence.protocol))
    return drawn


def _budgets(report: BudgetReport) -> Figure:
    def draw(axes: Sequence[Axes]) -> None:
        names = list(report.budgets)
        places = np.arange(len(names))[::-1]
        for index, (label, colour) in enumerate((("claimed", GREY), ("rdp", BLUE), ("prv", GREEN), ("pld", ORANGE))):
            widths = [
                (claimed if label == "claimed" else answer.epsilon[label]) or 0.0
                for claimed, answer in report.budgets.values()
            ]
            title = label if label == "claimed" else f"recomputed by {label.upper()}"
            axes[0].barh(places + 0.3 - 0.2 * index, widths, 0.18, color=colour, label=title)
        axes[0].set_yticks(places, names)
        axes[0].set_ylim(-0.6, len(names) - 0.4)
        axes[0].set_xlabel("epsilon")
        axes[0].figure.legend(frameon=False, ncols=4, loc="outside upper center")

    return Figure(
        "Privacy budgets",
        "What each hospital claims, beside what its booked events give by three accountants.",
        1,
        draw,
        1.0 + 0.4 * len(report.budgets),
    )


def _bounds(evidence: TrainingEvidence) -> Figure:
    def draw(axes: Sequence[Axes]) -> None:
        names = [f"{len(attack.scores)} {attack.canaries}\n{attack.view}" for attack in evidence.attacks]
        found = [bounds(attack) for attack in evidence.attacks]
        kinds = (
            ("steinke", "one run, any mechanism", GREY),
            ("one_run", "one run, f-DP", BLUE),
            ("many_run", "each canary a run", ORANGE),
        )
        places = np.arange(len(names))[::-1]
        for index, (kind, label, colour) in enumerate(kinds):
            axes[0].barh(
                places + 0.25 - 0.25 * index, [getattr(b, kind) for b in found], 0.22, color=colour, label=label
            )
        claimed = evidence.attacks[0].claim.epsilon
        if claimed is not None:
            axes[0].axvline(claimed, color=RED, linestyle="--", label=f"claimed: {claimed:.2f}")
        axes[0].set_yticks(places, names)
        axes[0].set_xlabel(f"epsilon at delta {evidence.attacks[0].claim.delta:g}: lower bounds at 95 % confidence")
        axes[0].figure.legend(frameon=False, ncols=2, loc="outside upper center")

    return Figure(
        "Audited epsilon",
        "How much privacy loss the attacks prove. Every bar must end before the dashed line, what the ledger claims.",
        1,
        draw,
        1.2 + 0.55 * len(evidence.attacks),
    )


def _scores(attack: CanaryScores) -> Figure:
    def draw(axes: Sequence[Axes]) -> None:
        scores, included = np.array(attack.scores), np.array(attack.included)
        low, high = (float(value) for value in np.quantile(scores, [0.001, 0.999]))
        edges = np.linspace(low, high, 60).tolist()
        for chosen, label, colour in ((included, "in", BLUE), (~included, "left out", ORANGE)):
            axes[0].hist(np.clip(scores[chosen], low, high), edges, alpha=0.6, color=colour, label=label)
        axes[0].set_xlabel("score (log-likelihood ratio of in against out)")
        axes[0].set_ylabel("canaries")
        axes[0].legend(frameon=False)

    return Figure(
        f"Scores of {attack.canaries} canaries ({attack.view})",
        "Canaries that were in and ones that were left out. The further apart the two hills, the larger epsilon must be.",
        1,
        draw,
    )


def _conformance(evidence: ConformanceEvidence) -> Figure:
    def draw(axes: Sequence[Axes]) -> None:
        scales = [math.sqrt(parameter.mean_square) for parameter in evidence.noise]
        error = [2.6 / math.sqrt(2 * parameter.count) for parameter in evidence.noise]
        axes[0].errorbar(scales, np.arange(len(scales))[::-1], xerr=error, fmt="o", color=BLUE, markersize=3)
        axes[0].axvline(1.0, color=RED, linestyle="--")
        axes[0].set_yticks(np.arange(len(scales))[::-1], [parameter.name for parameter in evidence.noise], fontsize=6)
        axes[0].set_xlabel("noise over the agreed noise, with 99 % intervals")
        sampling = evidence.sampling
        sizes = np.array(sampling.sizes)
        at = np.arange(sizes.min(), sizes.max() + 1)
        axes[1].hist(
            sizes, (np.arange(sizes.min(), sizes.max() + 2) - 0.5).tolist(), color=BLUE, alpha=0.6, label="seen"
        )
        axes[1].plot(
            at, len(sizes) * stats.binom.pmf(at, sampling.units, evidence.sample_rate), color=RED, label="coins"
        )
        axes[1].set_xlabel("units in a sample")
        axes[1].legend(frameon=False)

    return Figure(
        "Noise and sampling",
        "Left: noise on each parameter; left of 1 is too little, but one interval in a hundred misses 1 by chance. "
        "Right: sizes of samples against independent coins.",
        2,
        draw,
        1.2 + 0.18 * len(evidence.noise),
    )


def _rocs(evidence: LeakageEvidence, agreement: Agreement) -> Figure:
    kinds = list(dict.fromkeys(row.observation for row in evidence.membership))

    def curve(axis: Axes, rows: list[Membership], colour: str, label: str) -> None:
        for row, style in zip(rows, ("-", ":"), strict=False):
            false, true = roc(row.members, row.others)
            axis.plot(
                np.maximum(false, 1e-3), np.maximum(true, 1e-3), style, color=colour, label=f"{label}, {row.candidates}"
            )

    def draw(axes: Sequence[Axes]) -> None:
        line = np.logspace(-3, 0, 60)
        *panels, key = axes
        for axis, kind in zip(panels, kinds, strict=True):
            rows = [row for row in evidence.membership if row.observation == kind]
            curve(axis, [row for row in rows if row.protection == "unprotected"], ORANGE, "unprotected")
            curve(axis, [row for row in rows if row.protection == "ours"], BLUE, "ours")
            axis.plot(line, line, color=GREY, linewidth=0.8, label="guessing")
            epsilon = epsilon_after(agreement.privacy, rows[0].steps, agreement.privacy.delta)
            if math.isfinite(epsilon) and kind != "upload":
                allowed = [dp_line(epsilon, agreement.privacy.delta, float(rate)) for rate in line]
                axis.plot(line, allowed, "--", color=RED, linewidth=0.8, label="most that DP allows")
            _log_rates(axis)
            axis.set_title(kind)
        key.set_axis_off()
        lines = {label: line for axis in panels for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        key.legend(lines.values(), lines, frameon=False, loc="center left")
        key.figure.supxlabel("false positives", fontsize=9)
        key.figure.supylabel("true positives", fontsize=9)

    return Figure(
        "Membership inference",
        "How many members an attacker finds (up) against how many others it accuses (right), both on a log scale. Ours should follow the "
        "line of guessing, and must stay below the dashed line. Rates below 0.001, and those of nobody, are drawn at 0.001.",
        len(kinds) + 1,
        draw,
    )


def _log_rates(axis: Axes) -> None:
    """Both axes from 0.001 to 1, on a log scale, with plain numbers: mathematics is not parsed, so that no name is taken for it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(FixedLocator([0.001, 0.01, 0.1, 1.0]))
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _inversions(evidence: LeakageEvidence) -> Figure:
    def draw(axes: Sequence[Axes]) -> None:
        rows = sorted(evidence.inversion, key=lambda row: OBSERVATIONS.index(row.observation))
        labels, places = [f"{row.observation}\n{row.protection}" for row in rows], np.arange(len(rows))
        for place, row in zip(places, rows, strict=True):
            matrix = np.array(row.similarity)
            guesses = matrix[~np.eye(len(matrix), dtype=bool)]
            axes[0].scatter(np.full(len(guesses), place) + 0.15, guesses, s=3, color=GREY, alpha=0.3)
            axes[0].scatter(np.full(len(matrix), place) - 0.15, np.diag(matrix), s=12, color=BLUE)
        axes[0].set_xticks(places, labels, fontsize=8)
        axes[0].set_ylabel("correlation with the record")

    return Figure(
        "Reconstruction of records",
        "Blue: each reconstruction with its own record. Grey: with other records, what a guess reaches. Unprotected training is given "
        "away; ours should look like guesses.",
        1,
        draw,
    )


def _uniformity(evidence: ProtocolEvidence) -> Figure:
    series = evidence.series[:4]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, one in zip(axes, series, strict=True):
            mean = sum(one.top) / len(one.top)
            axis.bar(range(len(one.top)), np.array(one.top) / mean, 1.0, color=BLUE)
            axis.axhline(1.0, color=RED, linestyle="--", linewidth=0.8)
            axis.set_title(one.name, fontsize=8)
            axis.set_xlabel("top byte")
        axes[0].set_ylabel("share, over that of chance")

    return Figure(
        "What the aggregator sees of an upload",
        "How often each value of the top byte occurs. Flat means that it says nothing about the update in it.",
        len(series),
        draw,
    )
