"""Writes the test vectors, or compares them with the packages as they are now.

    python -m tests.vectors.generate            write every file anew
    python -m tests.vectors.generate --check    exit 1 and name the files that differ

Every input follows from counters; only HPKE draws its own coins, so its ciphertexts are taken from the files that lie here, as
long as they open. See README.md for the form of the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from keys.errors import SecGeoError
from protocols.ciphertexts import FrameBroken
from protocols.sealing import SealBroken
from tests.vectors import cases, encrypted_cases, key_cases, product, tag_cases, whole_round
from tests.vectors.codec import FILES, FOLDER, from_json, read, text_of, to_json

ABOUT = {
    "encoding": "Fixed-point encoding, its sums, and packing. `encoding` is value_bits, fraction_bits, ring_bits, n_max.",
    "prg": "Masks: AES-256 in counter mode, read as little-endian words of 32 bits.",
    "key_schedule": "What is derived, committed to, signed and sealed. `attempt` is agreement digest, round, attempt.",
    "shamir": "Secret sharing over the field of 2^256 + 297 elements. Share i (from 0) is the polynomial at i + 1.",
    "tags": "The tags that make the sum verifiable, and whole uploads. Tags are 8 bytes, big-endian.",
    "graph": "Who shares masks with whom. `degree` is the agreed number of neighbours, 0 for all.",
    "encrypted": "Sums of ciphertexts: study key, masks of coefficients, packing, words. Words and primes are 8 bytes, big-endian.",
    "messages": "Signed messages: one of each type, and what is refused. `body` is the array on the wire, name first.",
}
ERRORS = (SecGeoError, SealBroken, FrameBroken, ValueError)


def run(operations: dict[str, Any], operation: str, given: Any) -> Any:
    """The output of a case as it stands in JSON, from an input as it stands there."""
    return to_json(operations[operation](**from_json(given)))


def builders() -> dict[str, Callable[[], Any]]:
    """What makes each file's content, as JSON values."""
    recorded = key_cases.Recorded()
    for name in FILES:
        recorded.learn(read(name))
    groups: dict[str, Callable[[], Iterable[cases.Case]]] = {
        "encoding": cases.encoding,
        "prg": cases.prg,
        "key_schedule": partial(key_cases.key_schedule, recorded),
        "shamir": cases.shamir,
        "tags": tag_cases.tags,
        "graph": tag_cases.graph,
        "messages": key_cases.messages,
        "encrypted": encrypted_cases.encrypted,
    }
    made = {name: partial(_group, name, group) for name, group in groups.items()}
    return made | {"round": partial(whole_round.document, recorded)}


def _group(name: str, group: Callable[[], Iterable[cases.Case]]) -> dict[str, Any]:
    return {"subject": name, "about": ABOUT[name], "cases": [_filled(case) for case in group()]}


def _filled(case: cases.Case) -> dict[str, Any]:
    given = to_json(case.input)
    entry = {"description": case.description, "operation": case.operation, "input": given}
    try:
        output = run(product.OPERATIONS, case.operation, given)
    except ERRORS as error:
        if type(error).__name__ != case.error:
            due = case.error or "an output"
            raise AssertionError(f"{case.description}: {type(error).__name__} where {due} is due") from error
        return entry | {"error": case.error} | ({"says": str(error)} if str(error) else {})
    if case.error:
        raise AssertionError(f"{case.description}: no {case.error}")
    return entry | {"output": output}


def differing() -> list[str]:
    """The files that are not what would be written now, each with the reason."""
    found = []
    for name, build in builders().items():
        path = FOLDER / f"{name}.json"
        try:
            text = text_of(build())
        except (*ERRORS, AssertionError) as error:
            found.append(f"{path.name} cannot be made any more: {error}")
            continue
        if not path.exists() or path.read_text("ascii") != text:
            found.append(f"{path.name} is not what the packages give now")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    if parser.parse_args(arguments).check:
        found = differing()
        print("\n".join(found) if found else "every file is what the packages give")
        return 1 if found else 0
    for name, document in {name: build() for name, build in builders().items()}.items():
        (FOLDER / f"{name}.json").write_text(text_of(document), "ascii")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
