"""Writes the data of the walk-through into the current folder: four hospitals with four kinds of data source, public anchors,
and the study's parameters. Replace every part of it by your own.

    hospital-a/records.csv       a table with a label column        hospital-c/records.npz   plain arrays
    hospital-b/records.parquet   the same as Parquet                hospital-d/loader.py     a Python function
    anchors/MODALITY.npy         public records, the same patients in every modality, float32
    study.toml                   everything the agreement needs but digests and certificates
"""

from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import tomli_w
from pyarrow import csv, parquet

from secgeo.datasets import demo_split
from secgeo.presets import preset

ROUNDS = 4
LOADER = '''"""A hospital's own code: whatever returns (features, labels) will do."""

import pathlib

import numpy as np


def load():
    with np.load(pathlib.Path(__file__).with_name("private.npz")) as archive:
        return archive["features"], archive["labels"]
'''


def main() -> None:
    """Write everything."""
    data, settings = demo_split("breast-cancer", nodes=4, seed=1), preset("breast-cancer", 4, ROUNDS)
    names = ["hospital-a", "hospital-b", "hospital-c", "hospital-d"]
    for name, node in zip(names, data.nodes, strict=True):
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        features, labels = node.records.features, node.records.labels
        columns = {f"measure_{i}": features[:, i] for i in range(features.shape[1])} | {"malignant": labels}
        match name:
            case "hospital-a":
                csv.write_csv(pyarrow.table(columns), folder / "records.csv")
            case "hospital-b":
                parquet.write_table(pyarrow.table(columns), folder / "records.parquet")
            case "hospital-c":
                np.savez(folder / "records.npz", features=features, labels=labels)
            case _:
                np.savez(folder / "private.npz", features=features, labels=labels)
                (folder / "loader.py").write_text(LOADER)
    Path("anchors").mkdir(exist_ok=True)
    for modality, view in data.anchors.items():
        np.save(Path("anchors") / f"{modality}.npy", view)
    sections = {
        key: msgspec.to_builtins(getattr(settings, key)) for key in ("privacy", "training", "precision", "model")
    }
    del sections["model"]["trunk_digest"]
    spec = {
        "study": {
            "id": "walk-through",
            "title": "Four hospitals, three views",
            "rounds": ROUNDS,
            "classes": data.classes,
        },
        "secure_sum": {"protocol": "masked", "minimum_cohort": 3, "threshold": 3},
        "deadlines": {"join_seconds": 120.0, "train_seconds": 120.0, "phase_seconds": 20.0},
        "modalities": [{"name": m.name, "tokeniser": m.tokeniser, "shape": list(m.shape)} for m in data.modalities],
        "members": [
            {
                "node_id": name,
                "modality": node.modality,
                "expected_batch_size": settings.privacy.sample_rate * len(node.records),
            }
            for name, node in zip(names, data.nodes, strict=True)
        ],
        **sections,
    }
    Path("study.toml").write_text(tomli_w.dumps(spec))


if __name__ == "__main__":
    main()
