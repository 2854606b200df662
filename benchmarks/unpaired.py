"""Does SecGeo learn one multimodal model from unpaired patients? Four methods, real data, several seeds.

    python benchmarks/unpaired.py --data mfeat --seeds 5 --json benchmarks/results/mfeat.json

Every hospital holds one modality of its own patients; anchors are paired, unlabelled and public. The simulation runs in
one process with the same `LocalTrainer`, fixed-point encoding and `apply_sum` as a real node. Masks are left out: they
cancel exactly, so the decoded sum is the one that the secure sum gives. Methods:

* `local`: DP training alone, no sums and no anchors. For the cross-modal numbers its embeddings get, after training, a
  linear map to the consensus of all final Gram matrices.
* `fedavg`: DP training with equally weighted sums of B, no alignment; the same linear map afterwards.
* `anchors`: no transformer and no DP. Per modality a ridge map from standardised raw features to the coordinates of the
  mean Gram matrix of the anchors' raw features, then logistic regression on private records. Its noise-free numbers
  stand in every row, so where DP methods win, they win against a method that pays nothing for privacy.
* `secgeo`: all of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from protocols.agreement import (
    Agreement,
    Anchors,
    Deadlines,
    Member,
    Modality,
    RosterPin,
    SecureSum,
    Study,
    check_rules,
)
from protocols.encoding import FixedPoint
from secgeo import geometry, metrics
from secgeo.datasets import DemoData, anchor_digest, demo_split
from secgeo.noise import NoiseSource
from secgeo.presets import preset
from secgeo.training import LocalTrainer
from secgeo.update import Layout, SharedState, apply_sum

ROUNDS = {"breast-cancer": 10, "mfeat": 10}
HOSPITALS = {"breast-cancer": 4, "mfeat": 3}
METHODS = ("local", "fedavg", "anchors", "secgeo")
MEASURES = ("accuracy", "cka", "recall_at_1", "mrr", "zero_shot")


def study_agreement(data: DemoData, epsilon: float, method: str) -> Agreement:
    """The agreement that this data set's preset makes, with alignment switched off for the baselines."""
    rounds = ROUNDS[data.name]
    sections = preset(data.name, len(data.nodes), rounds, epsilon)
    training, precision = sections.training, sections.precision
    if method in ("local", "fedavg"):
        training = msgspec.structs.replace(training, alignment_weight=0.0, coordinate_weight=0.0, warmup_steps=0)
        precision = msgspec.structs.replace(precision, rule="equal")
    threshold = (len(data.nodes) + 1) // 2 + 1
    agreement = Agreement(
        study=Study("unpaired", rounds, data.classes),
        roster=RosterPin(1, 1, "0" * 64, "0" * 64),
        secure_sum=SecureSum("masked", minimum_cohort=max(3, threshold), threshold=threshold),
        privacy=sections.privacy,
        training=training,
        precision=precision,
        model=sections.model,
        anchors=Anchors(len(data.rows["anchors"])),
        deadlines=Deadlines(),
        modalities=tuple(
            Modality(m.name, m.tokeniser, m.shape, anchor_digest(data.anchors[m.name])) for m in data.modalities
        ),
        members=tuple(
            Member(f"hospital-{i}", f"{i:064x}", node.modality, sections.privacy.sample_rate * len(node.records))
            for i, node in enumerate(data.nodes)
        ),
    )
    check_rules(agreement)
    return agreement


def train(data: DemoData, agreement: Agreement, method: str) -> tuple[list[LocalTrainer], np.ndarray]:
    """Trainers after all rounds, each with its final shared state loaded, and the anchors' shared coordinates."""
    layout, code = Layout.from_agreement(agreement), FixedPoint.from_agreement(agreement)
    trainers = [
        LocalTrainer(agreement, member, node.records, data.anchors[node.modality], noise=NoiseSource(), device="cpu")
        for member, node in zip(agreement.members, data.nodes, strict=True)
    ]
    states = [SharedState.initial(agreement)] * len(trainers)
    for _ in range(agreement.study.rounds):
        vectors = [trainer.train_round(state).vector(layout) for trainer, state in zip(trainers, states, strict=True)]
        encoded = [code.encode(vector) for vector in vectors]
        if method == "local":
            totals = [code.decode(values, 1) for values in encoded]
        else:
            totals = [code.decode(np.sum(encoded, axis=0, dtype=np.uint32), len(encoded))] * len(trainers)
        states = [apply_sum(state, layout, total, agreement) for state, total in zip(states, totals, strict=True)]
    for trainer, state in zip(trainers, states, strict=True):
        trainer.load_shared(state)
    if method == "secgeo":
        return trainers, states[0].coordinates
    kernel = geometry.nearest_centred_psd(np.mean([trainer.anchor_gram() for trainer in trainers], axis=0))
    return trainers, geometry.consensus_coordinates(kernel, agreement.training.coordinate_rank)


def compare(
    data: DemoData,
    own_accuracy: list[float],
    held_out: list[np.ndarray],
    shared: list[np.ndarray],
    private: list[np.ndarray],
) -> dict[str, float]:
    """The five measures: own accuracy over hospitals, the others over ordered pairs of modalities."""
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    values["accuracy"] = own_accuracy
    for i, j in itertools.permutations(range(len(data.nodes)), 2):
        if data.nodes[i].modality == data.nodes[j].modality:
            continue
        found = metrics.retrieval(shared[i], shared[j])
        values["cka"].append(metrics.held_out_cka(held_out[i], held_out[j]))
        values["recall_at_1"].append(found.recall_at_1)
        values["mrr"].append(found.mean_reciprocal_rank)
        labels = data.nodes[i].records.labels
        values["zero_shot"].append(metrics.zero_shot(private[i], labels, shared[j], data.test_labels))
    return {name: float(np.mean(list_)) for name, list_ in values.items()}


def run_model(data: DemoData, epsilon: float, method: str) -> dict[str, float]:
    """One run of a trained method, measured on the test set."""
    started = time.monotonic()
    agreement = study_agreement(data, epsilon, method)
    trainers, coordinates = train(data, agreement, method)
    own, held_out, shared, private = [], [], [], []
    for trainer, node in zip(trainers, data.nodes, strict=True):
        test = data.test_views[node.modality]
        to_shared = metrics.fit_anchor_map(trainer.embed(data.anchors[node.modality]), coordinates)
        own.append(trainer.evaluate(test, data.test_labels))
        held_out.append(trainer.embed(test))
        shared.append(to_shared(held_out[-1]))
        private.append(to_shared(trainer.embed(node.records.features)))
    result = compare(data, own, held_out, shared, private)
    return {**result, "epsilon": trainers[0].epsilon(), "seconds": time.monotonic() - started}


def run_anchors(data: DemoData) -> dict[str, float]:
    """The anchors-only linear pipeline, without DP."""
    from sklearn.linear_model import LogisticRegression

    started = time.monotonic()

    def standardise(name: str, records: np.ndarray) -> np.ndarray:
        anchors = data.anchors[name].reshape(len(data.anchors[name]), -1).astype(np.float64)
        deviation = anchors.std(axis=0)
        scaled = (records.reshape(len(records), -1) - anchors.mean(axis=0)) / np.where(deviation > 1e-6, deviation, 1.0)
        return np.clip(scaled, -8.0, 8.0)

    views = {m.name: standardise(m.name, data.anchors[m.name]) for m in data.modalities}
    kernel = np.mean([geometry.normalise(geometry.centre(geometry.gram(view))) for view in views.values()], axis=0)
    rank = preset(data.name, len(data.nodes), ROUNDS[data.name], math.inf).training.coordinate_rank
    coordinates = geometry.consensus_coordinates(geometry.nearest_centred_psd(kernel), rank)
    own, shared, private = [], [], []
    for node in data.nodes:
        to_shared = metrics.fit_anchor_map(views[node.modality], coordinates)
        shared.append(to_shared(standardise(node.modality, data.test_views[node.modality])))
        private.append(to_shared(standardise(node.modality, node.records.features)))
        probe = LogisticRegression(max_iter=1000).fit(private[-1], node.records.labels)
        own.append(metrics.accuracy(probe.predict(shared[-1]), data.test_labels))
    result = compare(data, own, shared, shared, private)
    return {**result, "epsilon": math.inf, "seconds": time.monotonic() - started}


def markdown(runs: list[dict[str, object]], epsilons: list[float]) -> str:
    """A table of means and 95% intervals over seeds."""
    lines = ["| budget | method | " + " | ".join(MEASURES) + " |", "|---" * (2 + len(MEASURES)) + "|"]
    for epsilon, method in itertools.product(epsilons, METHODS):
        chosen = [run for run in runs if run["budget"] == str(epsilon) and run["method"] == method]
        cells = []
        for measure in MEASURES:
            result = metrics.interval([float(str(run[measure])) for run in chosen])
            cells.append(f"{result.mean:.3f} ± {result.half_width:.3f}")
        lines.append(f"| {epsilon:g} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(ROUNDS), required=True)
    parser.add_argument("--seeds", type=int, default=5, help="number of splits; seeds 0, 1, ...")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[3.0, 8.0, math.inf])
    parser.add_argument("--json", type=Path, help="where to write every run and split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, runs, splits = Console(stderr=True), [], []
    with Progress(console=console) as progress:
        task = progress.add_task(options.data, total=options.seeds * len(options.epsilons) * len(METHODS))
        for seed in range(options.seeds):
            data = demo_split(options.data, HOSPITALS[options.data], seed)
            splits.append(data.split_record())
            linear = run_anchors(data)
            for epsilon, method in itertools.product(options.epsilons, METHODS):
                result = linear if method == "anchors" else run_model(data, epsilon, method)
                runs.append({"seed": seed, "budget": str(epsilon), "method": method, **result})
                progress.advance(task)
    if options.json:
        agreement = study_agreement(data, 8.0, "secgeo")
        settings = {
            name: msgspec.to_builtins(getattr(agreement, name))
            for name in ("model", "training", "privacy", "precision")
        }
        finite = [{k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in run.items()} for run in runs]
        document = {"data": options.data, "settings_at_epsilon_8": settings, "runs": finite, "splits": splits}
        options.json.write_text(json.dumps(document, allow_nan=False, indent=None) + "\n")
    print(markdown(runs, options.epsilons))


if __name__ == "__main__":
    main()
