"""Counts that follow from the agreement, which evidence of training must have, and the refusal of others."""

from __future__ import annotations

import math

from keys.errors import VerificationFailed
from protocols.agreement import Agreement, Modality
from secgeo.model import IMAGE_SIDE, SIGNAL_POINTS
from secgeo.trunk import adapted_layers

DEVIATIONS = 8.0
"""A fair coin is called a forger's so seldom."""


def refuse(why: str, *wrong: bool) -> None:
    """Refuse evidence if anything is wrong.

    Raises:
        VerificationFailed: with this reason.
    """
    if any(wrong):
        raise VerificationFailed(why)


def unfair(heads: int, count: int) -> bool:
    """Whether so many of `count` coins are more than fair ones give."""
    return abs(heads - count / 2) > DEVIATIONS * math.sqrt(count) / 2


def private_shapes(agreement: Agreement, node_id: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the private parameters of this member's model (see `MultimodalNode.private_parameters`).

    Raises:
        VerificationFailed: there is no such member.
    """
    names = [member.modality for member in agreement.members if member.node_id == node_id]
    if not names:
        raise VerificationFailed(f"{node_id!r} is no member of the study")
    model, shapes = agreement.model, dict[str, tuple[int, ...]]()
    for layer in adapted_layers(model):
        name = layer.name.replace("block", "blocks.", 1)
        shapes[f"{name}.direction.weight"] = (layer.outputs, model.rank)
        shapes[f"{name}.magnitude.weight"] = (layer.outputs,)
    tokens = model.tokens * model.width
    shapes["tokeniser.projector.weight"] = (tokens, _features(agreement.modality(names[0])))
    shapes["tokeniser.projector.bias"] = (tokens,)
    shapes["head.weight"] = (agreement.study.classes, model.width)
    shapes["head.bias"] = (agreement.study.classes,)
    return shapes


def private_sizes(agreement: Agreement, node_id: str) -> dict[str, int]:
    """How many values each of these parameters has."""
    return {name: math.prod(shape) for name, shape in private_shapes(agreement, node_id).items()}


def _features(modality: Modality) -> int:
    """What the tokeniser makes of one record (see `secgeo.model`)."""
    channels, *rest = modality.shape
    if modality.tokeniser == "image":
        return channels * math.prod(min(side, IMAGE_SIDE) for side in rest)
    if modality.tokeniser == "signal":
        return channels * sum(min(points, SIGNAL_POINTS) for points in (rest[0], rest[0] // 2 + 1))
    return channels
