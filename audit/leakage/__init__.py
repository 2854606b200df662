"""Leakage: membership inference and gradient inversion on everything of one hospital that others could see.

    update      its raw dB of one round, as an aggregator would see it without a secure sum
    upload      the same as it is uploaded: fixed point, masked or encrypted by the product's own code
    aggregate   the decoded sum with the other hospitals
    adapter     the change of the shared B over several rounds, as it is released
    gram        its Gram matrix of the anchors after one round

Each attack runs on "ours" and on "unprotected": no noise, no clipping, no masks, every record in every step, and steps a tenth as long,
since unclipped gradients are larger. Where an attack fails on the unprotected one, it is too weak to say anything about ours. An upload
of "ours" is of unprotected training, masked or encrypted, so that this alone has to hide it.

*Membership.* Trainings are repeated with real `LocalTrainer`s; whether a candidate is among the records is a coin flip each time. Some
candidates are the hospital's own records, those that the model at the start of the round expects least, since they give the most away;
some are canaries: strangers, with the label that the model finds least likely. The attacker knows the
model at the start of the round (local parameters too), every record, clipping, noise level and sampling rate, but not the flips, the
samples and the noise. To first order a candidate adds m to what is seen, its clipped gradients along a trajectory that the attacker
simulates; everything else is close to Gaussian, with a covariance S that follows from the same gradients and the noise. The score is the
log likelihood ratio m' S^-1 (seen - mean), as in LiRA (Carlini et al. 2022, arXiv 2112.03570), but with the whole vector in place of a
loss. The mean is taken over the other trainings, which are its shadow models. Several candidates per training are those of Steinke et
al. 2023 (arXiv 2305.08846).

*Inversion.* One step on one record. The attacker looks for features and label whose clipped gradient is the one seen (gradient matching:
Zhu et al. 2019, Geiping et al. 2020) by Levenberg-Marquardt, along the anchors' principal components and with their sizes as its prior,
and knows the model. The head starts at zero, where B has no gradient; so all attacks begin after a first round on other data.
In the aggregate each hospital took one step on a record of its own. The attacker colludes with all others but one, takes off what these
sent, and looks for the two records that are left, both at once. Who had which it cannot tell: the more similar one counts, for guesses
too. (With all others colluding the aggregate is the update.) What is released of B after that round is the aggregate over the sum of the
weights, which are public: the same attack, on the released B. Of the Gram matrix the attacker takes the change to first order in the
step, along the directions in which records that it draws move it, and whitens it by what noise that it draws does.

*Simplifications, all for the attacker.* Other hospitals hold the target's modality and train from its local parameters; their updates are
drawn from a pool made with records of `others` (without those: anchors with drawn labels), which the attacker knows. Consensus is from the
target's own Gram matrix. If patients are protected, each is one record. A hospital counts at most `CROWD` of its records.

*Libraries.* adversarial-robustness-toolbox 1.20 (2025, kept) attacks the outputs of classifiers: it sees no gradients, adapters or Gram
matrices, and has no LiRA. breaching 0.1.2 (2022) inverts gradients of images and text, needs hydra, torchvision and lpips, and is not
kept; privacy-meter on PyPI is of 2023, has its newer attacks in its repository only, and wants to train the models itself. Opacus has no
attacks. So the attacks are written here from their papers, on what is installed already: torch, scikit-learn and SciPy.
"""

from __future__ import annotations

from audit.leakage.collecting import collect
from audit.leakage.evidence import OBSERVATIONS, Inversion, LeakageEvidence, Membership
from audit.leakage.scores import Rate, auc, dp_line, rate_at, roc
from audit.leakage.verdicts import judge, recovered

__all__ = [
    "OBSERVATIONS",
    "Inversion",
    "LeakageEvidence",
    "Membership",
    "Rate",
    "auc",
    "collect",
    "dp_line",
    "judge",
    "rate_at",
    "recovered",
    "roc",
]
