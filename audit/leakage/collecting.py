"""Every attack, on unprotected training and on ours."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel

from audit.leakage.evidence import Inversion, LeakageEvidence, Membership, Profile, Protection
from audit.leakage.inversion import invert_all
from audit.leakage.membership import infer_membership
from audit.leakage.scene import SIZES, Scene, single_records
from audit.target import Target

Progress = Callable[[str, float], None]


def collect(target: Target, *, profile: Profile, progress: Progress, seed: int | None = None) -> LeakageEvidence:
    """Run every attack: as `fast` some 15 seconds for the breast-cancer demonstration, four times as long for mfeat.

    Args:
        target: what is attacked. Its `others` give canaries and the other hospitals; without them anchors do, with drawn labels.
        progress: called with what is being done and the fraction that is done.
        seed: of coin flips and choices; drawn if not given, so that nothing can be tuned to it.

    Raises:
        ConfigError: too few records, or fewer than three features.
    """
    started = time.monotonic()
    chosen = secrets.randbits(32) if seed is None else seed
    size = SIZES[profile]
    scene = Scene(single_records(target), size, np.random.Generator(np.random.PCG64(chosen)))
    membership: list[Membership] = []
    inversion: list[Inversion] = []
    with sdpa_kernel(SDPBackend.MATH):
        protections: tuple[Protection, ...] = ("unprotected", "ours")
        for index, protection in enumerate(protections):

            def report(done: float, at: float = 0.45 * index, what: str = protection) -> None:
                progress(f"membership inference, {what}", at + 0.45 * done)

            membership += infer_membership(scene, protection, report)
        progress("gradient inversion", 0.9)
        inversion += invert_all(scene)
    progress("done", 1.0)
    return LeakageEvidence(
        member=target.member.node_id,
        profile=profile,
        protocol=target.agreement.secure_sum.protocol,
        seed=chosen,
        settings=scene.settings(),
        seconds=round(time.monotonic() - started, 2),
        membership=membership,
        inversion=inversion,
    )
