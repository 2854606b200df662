"""The report: one HTML file with nothing outside of it, for a data-protection officer to read and an expert to check."""

from __future__ import annotations

import math
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from audit.bundle import Evidence, Verdict
from audit.figures import figures
from audit.plants import PLANTS
from secgeo.accountant import epsilon_after

PARTS = {
    "records": (
        "Records and budgets",
        "Are the study's records signed, complete and unchanged, and is every hospital's privacy budget what its booked events give?",
    ),
    "training": (
        "Training",
        "Does the training do what is booked: every {unit}'s gradient clipped, noise of the agreed size, samples drawn by lot, every "
        "step counted? And can an attacker who planted canaries prove more privacy loss than is claimed?",
    ),
    "leakage": (
        "Leakage",
        "What do others learn from what leaves the hospital? The same attacks are run on unprotected training; where they fail there, they "
        "say nothing about ours.",
    ),
    "protocol": (
        "Secure sum",
        "Does the secure sum hold against an aggregator and members that lie? Attacks are played against the real code, on a study of the "
        "audit's own.",
    ),
}

LIMITS = {
    "records": (
        "Records show who signed what, and that claims follow from what was booked. They cannot show that a hospital drew the noise that "
        "it booked.",
    ),
    "training": (
        "A lower bound that stays below the claim proves nothing: a stronger attack may exist. A bound above the claim does prove a bug.",
        "White-box tests watch the program that is installed where the audit runs, on the processor. They say nothing of a hospital that "
        "runs another one, or runs it on a GPU; nor of what a node does around its training, such as noise for the whole hospital.",
        "Bounds in one run with f-DP hold for DP-SGD of the agreed sample rate and steps; those for any mechanism are the weaker ones.",
        "Bounds in which each canary counts as a run of its own take the noise on different parameters for independent, which is tested "
        "beside.",
    ),
    "leakage": (
        "Attacks are of today. Differential privacy bounds those of tomorrow too; the dashed line in each plot is that bound.",
        "With a large epsilon that bound is weak, and what stays below it may still be more than one would like. Read the numbers.",
        "Small data sets give few scores, and rates of false positives below one in their number cannot be seen.",
    ),
    "protocol": (
        "Attacks are played against a study of the audit's own: the installed code under the agreement's parameters, with keys made for it "
        "and few members, in memory and, in profile full, over CURVE sockets on this machine; each finding says which.",
        "A running deployment is not attacked: whoever plays false there is put out, and a round is lost with it. What is looked at of it: "
        "its door (nine knocks of a stranger), certificates, key files, agreement, policy, and what its aggregator has signed so far.",
        "What is not testable here names the tests of the code that play it.",
    ),
}

WORDS = {
    "epsilon": "How much more likely any outcome can become through one {unit}: at most e to the epsilon times. Smaller is better.",
    "delta": "The probability with which epsilon may fail; it should be well below one over the number of {unit}s.",
    "canary": "A made-up {unit} that is put into the training by the toss of a coin, to see whether an attacker can tell.",
    "add or remove one": "What is compared: the same data with and without one {unit}, which is what this agreement protects.",
    "TPR, FPR": "Of those who were in the data, the share an attacker finds; of those who were not, the share it wrongly accuses.",
    "RDP, PRV, PLD": "Three independent ways to compute epsilon from what was booked.",
}
"""`{unit}` is the agreement's: a record, or a patient."""


def claim(evidence: Evidence) -> str:
    """The privacy that is claimed, in a sentence: the weakest claim in the records, or what the agreement's rounds come to."""
    study, privacy = evidence.study.agreement, evidence.study.agreement.privacy
    if evidence.records is not None and evidence.records.budgets:
        who, delta = "by the hospitals", max(answer.delta for _, answer in evidence.records.budgets.values())
        epsilon = max(math.inf if claimed is None else claimed for claimed, _ in evidence.records.budgets.values())
    else:
        who, delta = f"for {study.study.rounds} rounds", privacy.delta
        epsilon = epsilon_after(privacy, (study.study.rounds - 1) * study.training.steps_per_round, delta)
    told = "infinite epsilon (no privacy)" if math.isinf(epsilon) else f"epsilon at most {epsilon:.2f}"
    return f"Claimed {who}: {told} at delta {delta:g}, where one {privacy.unit} is added or removed."


def render(verdict: Verdict, evidence: Evidence) -> str:
    """The page, from verdict and evidence alone: the same give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unit = evidence.study.agreement.privacy.unit
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
    return environment.get_template("report.html.j2").render(
        verdict=verdict,
        about=verdict.about,
        agreement=evidence.study.agreement,
        claim=claim(evidence),
        parts={part: (title, question.format(unit=unit)) for part, (title, question) in PARTS.items()},
        limits=LIMITS,
        words={word: meaning.format(unit=unit) for word, meaning in WORDS.items()},
        figures=figures(evidence),
        plant=PLANTS.get(verdict.about.plant or ""),
    )
