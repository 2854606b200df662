"""The registry of targets."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import audits, ciphertexts, documents, files, messages
from tests.fuzz.planted import PLANTED
from tests.fuzz.property import Target

TARGETS: dict[str, Target] = messages.TARGETS | ciphertexts.TARGETS | documents.TARGETS | files.TARGETS | audits.TARGETS

FINDINGS = Path(__file__).parent / "findings"
"""Every input that once broke a property, by target: regression tests."""


def find(name: str) -> Target:
    """The target of that name; the planted ones are no part of the registry, but can be run."""
    return (TARGETS | PLANTED)[name]
