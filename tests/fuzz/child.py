"""One target under atheris, in a process of its own that is forked from one which has imported everything: that takes seconds.

The packages are instrumented while they are imported, so nothing may import them before. libFuzzer ends the process with an
error, and writes the input down, when an exception leaves the target, when one input takes `TIMEOUT_SECONDS`, and when memory
runs out; an allocation far beyond that limit fails at once, as a `MemoryError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import resource
from pathlib import Path

import atheris

from tests.fuzz import mutate as mutate  # not to be instrumented

with contextlib.redirect_stderr(io.StringIO()):  # the name of each module
    with atheris.instrument_imports(include=["tests"]):
        from tests.fuzz import planted as planted
    with atheris.instrument_imports(include=["keys", "protocols", "secgeo", "audit"]):
        from tests.fuzz import targets

TIMEOUT_SECONDS = 5
MEMORY_LIMIT_BYTES = 2 << 30
"""What a target may take beyond what it needed for its seeds."""


def main(name: str, corpus: Path, failures: str, seconds: int, output: Path) -> None:
    """Fuzz one target; what is printed goes to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    target = targets.find(name)
    longest = 4096
    for seed in target.seeds():
        longest = max(longest, 2 * len(seed))
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        target.run(seed)  # what a target needs is made now, and not under the limits
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT_BYTES, used + MEMORY_LIMIT_BYTES))

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)  # noqa: S311 - no secret
        changed = target.mutate(data, rng) if rng.randrange(4) else atheris.Mutate(data, limit)
        return changed[:limit]

    options = {
        "max_total_time": seconds,
        "timeout": TIMEOUT_SECONDS,
        "rss_limit_mb": 0,
        "max_len": longest,
        "len_control": 0,
        "artifact_prefix": failures,
        "print_final_stats": 1,
        "seed": 1,
    }
    arguments = ["fuzz", str(corpus), *(f"-{option}={value}" for option, value in options.items())]
    atheris.Setup(arguments, target.run, custom_mutator=mutate)
    atheris.Fuzz()
