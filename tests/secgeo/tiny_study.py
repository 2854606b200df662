"""A three-hospital study small enough for unit tests: one table, one image, one signal."""

import msgspec
import numpy as np
import torch

from protocols.agreement import (
    Agreement,
    Anchors,
    Deadlines,
    Member,
    Modality,
    Model,
    Precision,
    Privacy,
    RosterPin,
    SecureSum,
    Study,
    Training,
)
from secgeo.datasets import LabelledRecords, anchor_digest
from secgeo.model import MultimodalNode, build_model
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer
from secgeo.trunk import trunk_digest

KINDS = {"table": ("tabular", (5,)), "image": ("image", (1, 4, 4)), "signal": ("signal", (2, 16))}
ANCHORS = 12
CLASSES = 3
LATENT = np.random.Generator(np.random.PCG64(1)).normal(size=(4, 64))


def view(kind: str, latent: np.ndarray) -> np.ndarray:
    """One modality's view [n, *shape] of the same latent patients [n, 4]."""
    shape = KINDS[kind][1]
    size = int(np.prod(shape))
    start = {"table": 0, "image": 8, "signal": 24}[kind]
    return np.tanh(latent @ LATENT[:, start : start + size]).astype(np.float32).reshape(-1, *shape)


def patients(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=(count, 4))


def anchors(kind: str) -> np.ndarray:
    return view(kind, patients(ANCHORS, 99))


def records(kind: str, count: int = 24, seed: int = 5) -> LabelledRecords:
    latent = patients(count, seed)
    labels = np.digitize(latent[:, 0], [-0.4, 0.4]).astype(np.int64)
    return LabelledRecords(view(kind, latent), labels)


def agreement(batch_sizes: tuple[float, float, float] = (6.0, 6.0, 6.0), **sections: dict) -> Agreement:
    """The study; keyword arguments replace fields of a section, as in `privacy={"noise_multiplier": 0.0}`."""
    model = Model(
        seed=7, trunk_digest="0" * 64, width=16, layers=1, heads=2, tokens=2, feedforward=16, rank=2, alpha=2.0
    )
    values = {
        "study": Study("tiny", rounds=4, classes=CLASSES),
        "privacy": Privacy("record", 0.25, 1.0, 1.0, 1e-3, 10.0),
        "training": Training(3, learning_rate=0.1, local_learning_rate=0.1, warmup_steps=5, coordinate_rank=3),
        "precision": Precision(),
        "model": msgspec.structs.replace(model, trunk_digest=trunk_digest(model)),
    }
    for name, fields in sections.items():
        values[name] = msgspec.structs.replace(values[name], **fields)
    return Agreement(
        roster=RosterPin(1, 1, "0" * 64, "0" * 64),
        secure_sum=SecureSum("masked", 3, 3),
        anchors=Anchors(ANCHORS),
        deadlines=Deadlines(),
        modalities=tuple(Modality(n, kind, shape, anchor_digest(anchors(n))) for n, (kind, shape) in KINDS.items()),
        members=tuple(
            Member(f"hospital-{i}", f"{i:064x}", name, batch)
            for i, (name, batch) in enumerate(zip(KINDS, batch_sizes, strict=True))
        ),
        **values,
    )


def trainer(study: Agreement, index: int = 0, key: int = 1, count: int = 24, device: str = "cpu") -> LocalTrainer:
    member = study.members[index]
    kind = member.modality
    noise = NoiseSource(key.to_bytes(32, "big"))
    return LocalTrainer(study, member, records(kind, count), anchors(kind), noise=noise, device=device)


def trained(kind: str) -> MultimodalNode:
    """A model away from its start, where heads are zero; the same at every call."""
    model = build_model(agreement(), kind, anchors(kind))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.private_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model
