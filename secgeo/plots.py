"""The demonstration's curves: accuracy, alignment, epsilon and traffic over rounds, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curves(path: Path, rounds: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw one line per hospital (accuracy, CKA), the largest epsilon, and bytes per round.

    Args:
        path: where to write, .png or .svg.
        rounds: per round {"round", "bytes", "nodes": {name: {"accuracy", "cka", "epsilon"}}}; values may be missing.
        title: the figure's title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    numbers = [entry["round"] for entry in rounds]
    names = sorted({name for entry in rounds for name in entry["nodes"]})
    panels = [
        (axes[0, 0], "accuracy", "own-modality accuracy on held-out patients"),
        (axes[0, 1], "cka", "debiased CKA of own anchors with the consensus"),
        (axes[1, 0], "epsilon", "epsilon spent (add or remove one record)"),
    ]
    for axis, key, label in panels:
        for name in names:
            values = [entry["nodes"].get(name, {}).get(key) for entry in rounds]
            axis.plot(numbers, [float("nan") if v is None else v for v in values], marker="o", markersize=3, label=name)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    axes[1, 1].bar(numbers, [entry["bytes"] / 1024 for entry in rounds], color="tab:gray")
    axes[1, 1].set_title("received by the aggregator per round (KiB, all hospitals)", fontsize=10)
    axes[1, 1].set_xlabel("round")
    figure.savefig(path, dpi=120)
    plt.close(figure)
