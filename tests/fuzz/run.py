"""Fuzz the decoders of strangers' bytes: `python -m tests.fuzz.run TARGET --seconds 60`, or `--all` in place of a target.

Each target runs in a process of its own and gives one line of JSON. A target that breaks its property ends with exit code 1,
its input is kept, and the message says how to try it again: `python -m tests.fuzz.run TARGET --replay FILE`.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import targets

CONTEXT = multiprocessing.get_context("forkserver")

_START_SECONDS = 120
"""How long a target may take beside its fuzzing: imports, keys and seeds."""
_REPLAY_SECONDS = 60
_TAIL_LINES = 40

_STATUS = re.compile(r"^#\d+\s+(?:INITED|DONE)\s+cov: (\d+) .*?corp: (\d+)/", re.MULTILINE)
_EXECUTIONS = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)
_KEPT = re.compile(r"Test unit written to (\S+)")


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", nargs="?", help=", ".join(targets.TARGETS))
    parser.add_argument("--all", action="store_true", help="every target, as many at once as there are cores")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument(
        "--corpus", type=Path, default=Path("runs/fuzz"), help="where inputs are kept (default: runs/fuzz)"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the target on one input, without a fuzzer")
    arguments = parser.parse_args()
    if arguments.all == (arguments.target is not None):
        parser.error("give one target, or --all")
    try:
        names = list(targets.TARGETS) if arguments.all else [arguments.target]
        targets.find(names[0])
    except KeyError:
        parser.error(f"there is no target {arguments.target!r}; choose one of: {', '.join(targets.TARGETS)}")
    if arguments.replay is not None:
        faulthandler.dump_traceback_later(_REPLAY_SECONDS, exit=True)
        targets.find(names[0]).run(arguments.replay.read_bytes())
        print(f"{names[0]}: the property holds for {arguments.replay}")
        return 0
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; it has wheels for CPython 3.11 to 3.13 on Linux x86-64")
    os.environ |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONWARNINGS": "ignore"}
    CONTEXT.set_forkserver_preload(["tests.fuzz.child"])
    with ThreadPoolExecutor(os.cpu_count() if arguments.all else 1) as pool:
        held = list(pool.map(lambda name: fuzz(name, arguments.corpus, arguments.seconds), names))
    return 0 if all(held) else 1


def fuzz(name: str, corpus: Path, seconds: int) -> bool:
    """Fuzz one target, report, and say whether its property held."""
    inputs, failures = corpus / name, corpus / "failures" / f"{name}-"
    inputs.mkdir(parents=True, exist_ok=True)
    failures.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile() as printed:
        arguments = name, inputs, str(failures), seconds, Path(printed.name)
        process = CONTEXT.Process(target=child_main, args=arguments)
        process.start()
        process.join(seconds + _START_SECONDS)
        late = process.is_alive()
        process.kill()
        process.join()
        output = printed.read().decode(errors="replace") + late * "\nthe process did not end in time"
    code = process.exitcode or 0
    report(name, code, output, time.monotonic() - started)
    return code == 0


def child_main(*arguments: object) -> None:
    """In the process of the target, where everything is imported."""
    from tests.fuzz import child

    try:
        child.main(*arguments)  # type: ignore[arg-type]
    except Exception:
        traceback.print_exc()
    finally:
        ctypes.CDLL(None).exit(1)  # multiprocessing would leave without what libFuzzer does at exit: it keeps the input


def report(name: str, code: int, output: str, seconds: float) -> None:
    """Print a target's line, and what went wrong."""
    status = [(int(cov), int(size)) for cov, size in _STATUS.findall(output)]
    executions = _EXECUTIONS.search(output)
    line = {
        "target": name,
        "ok": code == 0,
        "executions": int(executions[1]) if executions else 0,
        "seconds": round(seconds, 1),
        "coverage": status[-1][0] if status else 0,
        "new_coverage": status[-1][0] - status[0][0] if status else 0,
        "corpus": status[-1][1] if status else 0,
    }
    print(json.dumps(line), flush=True)
    if code:
        kept = _KEPT.search(output)
        print("\n".join(output.splitlines()[-_TAIL_LINES:]), file=sys.stderr)
        how = (
            f"the input is kept; replay it: python -m tests.fuzz.run {name} --replay {kept[1]}"
            if kept
            else "no input was kept"
        )
        print(f"{name}: the property does not hold (exit {code}); {how}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
