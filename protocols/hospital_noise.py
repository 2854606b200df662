"""Noise that hospitals share out inside the secure sum, so that the sum itself hides any one of them (docs/privacy.md).

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021, arXiv 2102.06387). Every hospital bounds the L2 norm of
its update, brings it to the grid of the fixed-point encoding, and adds discrete Gaussian noise to it, whole steps of that grid.
Nobody sees a share alone; the sum has them all. Here are the numbers; `secgeo.hospital_noise` draws the noise. No randomness, no I/O.

Privacy is counted for the fewest shares that an agreement leaves: of the smallest cohort that may be summed, without the colluders it
tolerates, who know their own shares and can subtract them, and without one at least, for every member knows its own and sees the sum.
More survivors only add noise.
"""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta, Struct

LEAST_STD_STEPS = 4.0
"""A share's standard deviation in steps of the grid. Below, a sum of discrete Gaussians is not close enough to one."""

HEADROOM_STDS = 12.0
"""Between the largest honest value and the end of the encoding's range: noise goes beyond with probability below 2 exp(-72)."""

MOST_VALUES = 2**32
"""Values of an update, for the bound below. It enters by a term that vanishes from `LEAST_STD_STEPS` on."""

Finite = Annotated[float, Meta(gt=0.0, lt=1e12)]


class NoiseShare(Struct, frozen=True, forbid_unknown_fields=True):
    """What one hospital adds to its update in one round, and how many such shares are counted on.

    Attributes:
        max_update_norm: bound on the L2 norm of the update, before the noise.
        std: of the noise on each value.
        step: of the grid on which update and noise lie.
        contributors: honest hospitals whose shares are in the sum, at least.
    """

    max_update_norm: Finite
    std: Finite
    step: Finite
    contributors: Annotated[int, Meta(ge=1, le=256)]

    @property
    def concentrated(self) -> float:
        """rho: a sum with these shares is rho-zCDP if one hospital's update is exchanged for zero (Proposition 14 of the paper).

        rho = (max_update_norm / (sqrt(contributors) std) + tau sqrt(d))^2 / 2, where tau bounds how far a sum of discrete Gaussians
        is from a discrete Gaussian.
        """
        variance = (self.std / self.step) ** 2
        counted = range(1, self.contributors)
        tau = 10.0 * sum(math.exp(-2.0 * math.pi**2 * variance * k / (k + 1)) for k in counted)
        distance = self.max_update_norm / (math.sqrt(self.contributors) * self.std)
        return (distance + tau * math.sqrt(MOST_VALUES)) ** 2 / 2.0

    def fits(self, limit: float) -> bool:
        """Whether an encoding of values up to `limit` has room for noise that is never cut off."""
        return self.max_update_norm + HEADROOM_STDS * self.std <= limit

    @property
    def fine_enough(self) -> bool:
        """Whether the grid is fine enough for the noise."""
        return self.std >= LEAST_STD_STEPS * self.step


def noise_share(noise_multiplier: float, max_update_norm: float, contributors: int, step: float) -> NoiseShare:
    """The share by which `contributors` of them make noise of standard deviation noise_multiplier * max_update_norm."""
    return NoiseShare(max_update_norm, noise_multiplier * max_update_norm / math.sqrt(contributors), step, contributors)
