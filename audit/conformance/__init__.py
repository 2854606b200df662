"""White-box tests that a trainer does what its ledger will say: noise, sensitivity, sampling, bookkeeping, side channels.

A lower bound on epsilon (`audit.training`) catches bugs that cost much privacy. These tests catch the ones that cost little in one run, and
say what is wrong. They watch the product's own trainer, on the hospital's records, through `audit.watch`:

    noise         what the optimiser adds to the sum, against N(0, (noise_multiplier max_grad_norm)^2), on every parameter, in every step,
                  and in many directions; of nobody, of many, and of a few sampled in turn
    fresh noise   values that come twice; every step against every other, parameters against each other, and the hospital against itself
                  when started again (`audit.independence`)
    sensitivity   the data with and without one unit: how far the clipped sum moves, for the units with the largest gradients, one of the
                  rarest class, a record of extreme features, gradients far above the clip norm, and one that is not finite; in several
                  pieces, as large batches are. What the others add to the sum may not change at all. Most of it again after all rounds
    sampling      sizes of samples, how often each unit is in, and how often in two samples that are any number of steps apart
    side channels the noised sum replaced by noise: then nothing that leaves or stays, in any round, may differ between two sets of
                  records, of other sizes, values and labels
    bookkeeping   steps that touched records, changed parameters, were booked, and were reported, over the rounds of the study, as they
                  are counted in the training for side channels

Noise and samples are those of one training, round by round as a node makes them, of as many rounds as the study has; where these have
few steps, of some more rounds, and samples also of another start.

Which records belong to a unit is worked out here, from the agreement and the data, not taken from the trainer.
A test fails when what was seen has probability below `ALARM` under the promise, so that sound trainers are not accused by chance.
"""

from __future__ import annotations

from audit.conformance.collecting import collect
from audit.conformance.evidence import ConformanceEvidence
from audit.conformance.verdicts import judge
from audit.conformance.whole import check_whole

__all__ = ["ConformanceEvidence", "check_whole", "collect", "judge"]
