"""Every target without a fuzzer: its seeds, simple changes of them, what was found before; and that the fuzzer finds things."""

import importlib.util
import json
import random
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from protocols import messages as m
from tests.fuzz import audits, mutate, targets
from tests.fuzz.world import again, recordings
from tests.protocols.network import body_type, head

CHANGES = {"key-file": 15, "records": 10, "audit-evidence": 30}
"""How often seeds are changed, for targets that take long."""

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.relative_to(targets.FINDINGS).as_posix() for path in targets.FINDINGS.glob("*/*"))


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_and_simple_changes_of_them_hold(name: str) -> None:
    target, rng = targets.find(name), random.Random(name)  # noqa: S311
    seeds = target.seeds()
    inputs = list(seeds)
    for number in range(CHANGES.get(name, 150)):
        change = target.mutate if number % 2 else mutate.flip
        inputs.append(change(rng.choice(seeds), rng))
    for data in [*inputs, b""]:
        target.run(data)


@pytest.mark.parametrize("path", KEPT)
def test_what_broke_a_property_once(path: str) -> None:
    targets.find(path.partition("/")[0]).run((targets.FINDINGS / path).read_bytes())


def test_the_seeds_hold_every_message_type() -> None:
    bodies = {kind.__name__ for kind in typing.get_args(m.AnyBody)}
    assert {body_type(data) for data in targets.find("message").seeds()} == bodies


def test_valid_seeds_are_accepted_and_not_refused_before_the_decoder() -> None:
    """The moments are real: each recorded message is taken by the copy as it was by the machine itself."""
    for recording in recordings():
        for moment in recording.node:
            machine, untouched = again(moment.machine), vars(moment.machine).copy()
            outputs = machine.receive(moment.data)
            assert vars(moment.machine) == untouched
            assert outputs or body_type(moment.data) in (
                "AttemptOpen",
                "SeedSet",
                "SumChunk",
                "AttemptFailed",
                "Credit",
            )
            assert head(moment.data)[4] == moment.sender
        for moment in recording.aggregator:
            outputs = again(moment.machine).receive(moment.sender, moment.data, 0.0)
            assert not [output for output in outputs if "expelled" in getattr(output, "event", "")]


def test_copies_of_a_moment_do_not_touch_each_other() -> None:
    moment = next(moment for moment in recordings()[0].node if body_type(moment.data) == "SeedSet")
    first, second = again(moment.machine), again(moment.machine)
    first.receive(moment.data)
    assert first._journal.entries != second._journal.entries
    second.receive(moment.data)
    assert first._journal.entries == second._journal.entries
    assert np.array_equal(first._vector, second._vector)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine")
def test_a_planted_bug_is_found_kept_and_replayed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "planted-key-error"]
    found = subprocess.run(
        [*command, "--seconds", "30", "--corpus", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    line = json.loads(found.stdout)
    assert not line["ok"]
    assert line["executions"] > 100
    kept = found.stderr.split("--replay ")[1].strip()
    assert Path(kept).read_bytes().startswith(b"bug!")
    assert "KeyError: 'planted'" in found.stderr
    again = subprocess.run([*command, "--replay", kept], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "KeyError: 'planted'" in again.stderr


def test_evidence_of_the_seeds_is_judged_and_not_refused_before() -> None:
    """So that what is changed in it reaches the judges."""
    kinds = [kind for name, kind in audits.PARTS.items() if name != "training"]
    seeds = targets.find("audit-evidence").seeds()
    assert len(seeds) == len(kinds)
    for data, kind in zip(seeds, kinds, strict=True):
        assert len(audits.verdict_on(mutate.msgspec.json.decode(data, type=kind)).findings) > 5


@pytest.mark.parametrize("size", [0, 1, 40])
def test_mutations_of_rubbish_are_bytes_too(size: int) -> None:
    rng = random.Random(size)  # noqa: S311
    for target in targets.TARGETS.values():
        assert isinstance(target.mutate(rng.randbytes(size), rng), bytes)


@pytest.mark.parametrize("change", [mutate.msgpack, mutate.json, mutate.json_lines, mutate.toml])
def test_structured_mutations_keep_the_form(change: mutate.Mutator) -> None:
    """Most of what they make is still a document, and another one than before."""
    seed = {
        mutate.msgpack: targets.find("node").seeds()[4],
        mutate.json: targets.find("request").seeds()[0],
        mutate.json_lines: targets.find("transcript").seeds()[1],
        mutate.toml: targets.find("agreement").seeds()[0],
    }[change]
    decode = {
        mutate.msgpack: mutate.msgspec.msgpack.decode,
        mutate.json: mutate.msgspec.json.decode,
        mutate.json_lines: lambda data: [mutate.msgspec.json.decode(line) for line in data.splitlines()],
        mutate.toml: mutate.msgspec.toml.decode,
    }[change]
    rng, formed, changed = random.Random(1), 0, 0  # noqa: S311
    for _ in range(100):
        data = change(seed, rng)
        changed += data != seed
        try:
            decode(data)
            formed += 1
        except ValueError:
            pass
    assert formed > 60
    assert changed > 80
