"""What privacy costs a training step: time and memory of a DP step of GeoLoRA against the same step without privacy.

    python benchmarks/dp_step.py --json
    python benchmarks/dp_step.py --json --device cuda --batch 1024

Prints one JSON line per model and way, then a summary. The ways to per-unit gradients, all of Opacus, on the same model and batch:

* `hooks`: two hooks a layer (`GradSampleModule`);
* `functorch`: vmap over the gradient of one record;
* `ghost`: norms first, then a second backward pass of the clipped loss (`GradSampleModuleFastGradientClipping`).

`secgeo` is a whole step of `secgeo.training.LocalTrainer`: one hook a layer, cryptographic noise and sampling. The floor, `plain`, is
the same batch through the same model with plain SGD. The gradient of the anchors, which costs both the same, is in neither.

Times are to the end of what the device was given. Each is set against that of the plain step of the same turn, and the ratio is the
median over turns: a host changes its speed, and the best of one way may be from another minute than that of the other (the ratio of
best times is beside it). A step is timed after another one of its own way, as in training; otherwise it would find caches as another
way left them. Memory is the peak that steps add in a process of its own, of the device if it is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/secgeo")]

from opacus import GradSampleModule  # noqa: E402
from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402
from tiny_study import CLASSES, agreement, anchors, trainer  # noqa: E402
from torch import nn  # noqa: E402

from secgeo.model import build_model  # noqa: E402
from secgeo.trunk import trunk_digest  # noqa: E402

MODELS = {
    "small": {"width": 64, "layers": 2, "heads": 4, "tokens": 4, "feedforward": 128, "rank": 8},
    "medium": {"width": 256, "layers": 4, "heads": 8, "tokens": 16, "feedforward": 1024, "rank": 8},
}
WAYS = ("plain", "hooks", "functorch", "ghost", "secgeo")
Step = Callable[[], object]


def make_step(model_name: str, way: str, device: str, batch: int) -> Step:
    """One training step of a fresh model on a batch of records."""
    sizes = MODELS[model_name]
    drafted = agreement(model=sizes | {"trunk_digest": "0" * 64}).model
    study = agreement(
        batch_sizes=(batch, batch, batch),
        model=sizes | {"trunk_digest": trunk_digest(msgspec.structs.replace(drafted))},
        privacy={"sample_rate": 1.0, "max_grad_norm": 0.1},
    )
    if way == "secgeo":
        return _finished(trainer(study, 1, count=batch, device=device).step, device)
    model = build_model(study, "image", anchors("image")).to(device).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 4, 4, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    groups = [{"params": model.shared_parameters(), "momentum": 0.0}, {"params": model.local_parameters()}]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)  # as the trainer's
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.1, "expected_batch_size": batch}

    def step_with(module: nn.Module, optimizer: torch.optim.Optimizer, loss_of: nn.Module) -> Step:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(module(x), y).backward()
            optimizer.step()

        return _finished(step, device)

    if way == "plain":
        return step_with(model, inner, nn.CrossEntropyLoss())
    if way == "ghost":
        hooked = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.1, use_ghost_clipping=True)
        optimizer = DPOptimizerFastGradientClipping(inner, **settings)
        return step_with(hooked, optimizer, DPLossFastGradientClipping(hooked, optimizer, nn.CrossEntropyLoss()))
    wrapped = GradSampleModule(model, force_functorch=way == "functorch")
    return step_with(wrapped, DPOptimizer(inner, **settings), nn.CrossEntropyLoss())


def _finished(step: Step, device: str) -> Step:
    """With the work of the device in it: a GPU is given work and not waited for."""
    if device == "cpu":
        return step

    def waited() -> None:
        step()
        torch.cuda.synchronize()

    return waited


def peak_bytes(model_name: str, way: str, device: str, batch: int) -> int:
    """The peak of a process of its own that takes steps, above what it had before."""
    command = [sys.executable, str(Path(__file__)), "--memory-of", model_name, way, "--device", device]
    command += ["--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return int(done.stdout.split()[-1])


def measure_memory(model_name: str, way: str, device: str, batch: int) -> int:
    step = make_step(model_name, way, device, batch)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, after all that was imported
    before = _status_bytes("VmRSS")
    for _ in range(3):
        step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="records of a step; a GPU wants more than the default")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines are the only form; given for the sake of scripts"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, batch = arguments.device, arguments.batch
    if arguments.memory_of:
        sys.stdout.write(f"{measure_memory(*arguments.memory_of, device, batch)}\n")
        return
    name = device if device == "cpu" else torch.cuda.get_device_name()
    summary: dict[str, object] = {"part": "summary", "batch": batch, "cores": os.cpu_count(), "device": name}
    for model_name in MODELS:
        steps: dict[str, Step] = {}
        for way in WAYS:
            steps[way] = make_step(model_name, way, device, batch)
            steps[way]()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way, step in steps.items():
                step()
                started = time.perf_counter()
                step()
                seconds[way].append(time.perf_counter() - started)
        memory = {way: peak_bytes(model_name, way, device, batch) for way in WAYS}
        for way in WAYS:
            ratios = [own / plain for own, plain in zip(seconds[way], seconds["plain"], strict=True)]
            row = {"part": model_name, "way": way, "seconds": min(seconds[way])}
            row |= {
                "over_plain": statistics.median(ratios),
                "over_plain_best": min(seconds[way]) / min(seconds["plain"]),
            }
            row |= {"memory_bytes": memory[way], "memory_over_plain": memory[way] / max(1, memory["plain"])}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if way != "plain":
                summary[f"{model_name}_{way}_over_plain"] = row["over_plain"]
                summary[f"{model_name}_{way}_memory_over_plain"] = row["memory_over_plain"]
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
