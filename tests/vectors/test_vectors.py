"""Every vector against the packages and against the second implementation of `reference`; and the files are what would be written now."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vectors import codec, generate, product, reference, reference_operations
from tests.vectors.codec import read

GROUPS = {name: read(name)["cases"] for name in codec.FILES if name != "round"}
CASES = [
    pytest.param(case, id=f"{name}-{place}-{case['operation']}")
    for name, group in GROUPS.items()
    for place, case in enumerate(group)
]


@pytest.mark.parametrize("case", CASES)
def test_the_packages_give_every_vector(case: dict[str, Any]) -> None:
    if "error" not in case:
        assert generate.run(product.OPERATIONS, case["operation"], case["input"]) == case["output"]
        return
    with pytest.raises(generate.ERRORS) as caught:
        generate.run(product.OPERATIONS, case["operation"], case["input"])
    assert type(caught.value).__name__ == case["error"]


@pytest.mark.parametrize("case", CASES)
def test_the_formulas_give_every_vector(case: dict[str, Any]) -> None:
    if "error" not in case:
        assert generate.run(reference_operations.OPERATIONS, case["operation"], case["input"]) == case["output"]
        return
    with pytest.raises(reference.Refused):
        generate.run(reference_operations.OPERATIONS, case["operation"], case["input"])


def test_counter_mode_is_that_of_nist() -> None:
    """SP 800-38A, F.5.5: the key and the second plaintext and ciphertext of CTR-AES256."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    start = 4 * int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdff00"))
    stream = bytes(
        a ^ b
        for a, b in zip(
            bytes.fromhex("ae2d8a571e03ac9c9eb76fac45af8e51"),
            bytes.fromhex("f443e3ca4d62b59aca84e990cacaf5c5"),
            strict=True,
        )
    )
    assert product.OPERATIONS["keystream"](key, start, 4) == reference.keystream(key, start, 4) == stream


def test_the_files_are_what_the_packages_give() -> None:
    assert generate.differing() == [], "see the difference, then run `python -m tests.vectors.generate`"
