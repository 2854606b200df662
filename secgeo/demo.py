"""`secgeo demo`: a whole consortium on one machine, each role its own process, with the very commands that sites use.

The parent prepares the data (each hospital's own folder), runs the authority's and the sites' key commands, starts the
aggregator and the nodes, follows their JSON lines, and at the end collects the records, signs them and verifies them. Keys
and private data live in a temporary folder that only this user can read and that is removed at the end.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import tomli_w
from rich.console import Console
from rich.live import Live
from rich.table import Table

from keys.authority import Authority
from keys.errors import ConfigError, TransportError
from protocols.agreement import Protocol
from secgeo import metrics as held_out
from secgeo.datasets import DemoData, demo_split
from secgeo.plots import plot_curves
from secgeo.presets import Preset, preset
from secgeo.records import LEDGERS, RECEIPTS, write_manifest

WHAT_IT_SAW = {
    "masked": "The aggregator saw no single hospital's update.",
    "layered": "The aggregator saw no single hospital's update, nor their sum.",
    "homomorphic": "The aggregator saw no single hospital's update, nor their sum; a hospital that gave it the key would show it both.",
}
START_SECONDS = 60.0
STOP_SECONDS = 20.0


@dataclass(slots=True)
class Progress:
    """What the processes have said so far."""

    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def round(self, number: int) -> dict[str, Any]:
        """The entry of a round."""
        return self.rounds.setdefault(
            number, {"round": number, "survivors": 0, "bytes": 0, "seconds": 0.0, "nodes": {}}
        )

    def take(self, name: str, event: dict[str, Any]) -> None:
        """Note one event of one process."""
        kind = event.pop("event")
        self.states[name] = kind
        match kind:
            case "sum":
                self.round(event["round"]).update(
                    survivors=event["survivors"], bytes=event["bytes"], seconds=event["seconds"]
                )
            case "round" if name != "aggregator":
                self.round(event["round"])["nodes"][name] = {
                    key: event.get(key) for key in ("accuracy", "cka", "epsilon")
                }
            case "expelled" | "left" | "declined" | "round abandoned" | "attempt failed" | "refused" | "lost":
                self.notes.append(f"{name}: {kind} {event}")


def run_demo(*, protocol: str, data: str, nodes: int, rounds: int, seed: int, out: Path, quiet: bool) -> dict[str, Any]:
    """Run the demonstration and leave its records in `out`; gives what metrics.json holds.

    Raises:
        ConfigError: an unknown protocol or data set, or a folder that is in use.
        SecGeoError: a role failed; its own message is passed on.
    """
    if protocol not in get_args(Protocol):
        raise ConfigError(f"there is no protocol {protocol!r}; choose: {', '.join(get_args(Protocol))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder")
    started = time.monotonic()
    console = Console(stderr=quiet)
    split = demo_split(data, nodes, seed)
    settings = preset(data, nodes, rounds)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="secgeo-demo-") as scratch:
        site = _Site(Path(scratch), protocol, split, settings, nodes, rounds, seed, out.resolve())
        with console.status("preparing keys, certificates, roster and agreement"):
            site.prepare()
        console.print(
            f"study {site.study_id}: {nodes} hospitals, {rounds} rounds of {split.name}, agreement {site.digest[:16]}..."
        )
        progress = Progress()
        failures = site.run(progress, console)
        ended = time.monotonic()
        return site.finish(progress, failures, started, ended, console)


class _Site:
    """The temporary consortium: folders, configurations and processes."""

    def __init__(
        self,
        scratch: Path,
        protocol: str,
        split: DemoData,
        settings: Preset,
        nodes: int,
        rounds: int,
        seed: int,
        out: Path,
    ) -> None:
        self.protocol = protocol
        self.scratch, self.split, self.settings, self.rounds, self.seed, self.out = (
            scratch,
            split,
            settings,
            rounds,
            seed,
            out,
        )
        self.names = [f"hospital-{index + 1}-{node.modality}" for index, node in enumerate(split.nodes)]
        self.study_id = f"{split.name}-demo-{seed}"
        self.digest = self.fingerprint = ""
        self.passphrase = scratch / "passphrase"

    # --- set-up, by the same commands that sites use

    def prepare(self) -> None:
        descriptor = os.open(self.passphrase, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        authority = self.scratch / "authority"
        self.fingerprint = self._secgeo("authority", "create", authority, "--name", "Demo consortium", "--json")[
            "fingerprint"
        ]
        sites = [("aggregator", "aggregator"), *((name, "hospital") for name in self.names)]
        for name, role in sites:
            keys = self.scratch / name / "keys"
            made = self._secgeo("keys", "create", name, keys, "--role", role, "--json")
            pem = self.scratch / name / "certificate.pem"
            self._secgeo(
                "authority", "enrol", authority, made["request"], "--fingerprint", made["fingerprint"], "--out", pem
            )
            self._secgeo("keys", "install", keys, pem)
        self._write_data()
        (self.scratch / "study.toml").write_text(tomli_w.dumps(self._spec()))
        study = self.scratch / "study"
        made = self._secgeo(
            "agreement", "make", self.scratch / "study.toml",
            "--authority", authority, "--anchors", self.scratch / "anchors", "--out", study, "--json",
        )  # fmt: skip
        self.digest = made["agreement_digest"]

    def _secgeo(self, *arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "secgeo.cli", *map(str, arguments), "--passphrase-file", str(self.passphrase)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)  # noqa: S603
        if done.returncode != 0:
            raise ConfigError(f"`secgeo {' '.join(map(str, arguments[:2]))}` failed: {done.stderr.strip()}")
        last = done.stdout.strip().splitlines()[-1]
        result: dict[str, Any] = json.loads(last) if last.startswith("{") else {}
        return result

    def _write_data(self) -> None:
        (self.scratch / "anchors").mkdir()
        for name, view in self.split.anchors.items():
            np.save(self.scratch / "anchors" / f"{name}.npy", view, allow_pickle=False)
        for name, node in zip(self.names, self.split.nodes, strict=True):
            np.savez(self.scratch / name / "records.npz", features=node.records.features, labels=node.records.labels)
            view = self.split.test_views[node.modality]
            np.savez(self.scratch / name / "held-out.npz", features=view, labels=self.split.test_labels)

    def _spec(self) -> dict[str, Any]:
        sections = {
            name: msgspec.to_builtins(getattr(self.settings, name))
            for name in ("training", "privacy", "precision", "model")
        }
        del sections["model"]["trunk_digest"]
        n = len(self.names)
        rate = self.settings.privacy.sample_rate
        threshold = max(2 * n // 3, (n + 1) // 2 + 1)
        return {
            "study": {
                "id": self.study_id, "title": f"Demonstration on {self.split.name}",
                "rounds": self.rounds, "classes": self.split.classes,
            },
            "secure_sum": {
                "protocol": self.protocol, "minimum_cohort": max(3, threshold), "threshold": threshold,
                "value_bits": 26, "fraction_bits": 20, **({"chunk_values": 4096} if self.protocol == "masked" else {}),
            },
            "deadlines": {"join_seconds": 120.0, "train_seconds": 120.0, "phase_seconds": 20.0},
            "modalities": [{"name": m.name, "tokeniser": m.tokeniser, "shape": list(m.shape)} for m in self.split.modalities],
            "members": [
                {"node_id": name, "modality": node.modality, "expected_batch_size": rate * len(node.records)}
                for name, node in zip(self.names, self.split.nodes, strict=True)
            ],
            **sections,
        }  # fmt: skip

    # --- the running study

    def run(self, progress: Progress, console: Console) -> list[str]:
        """Start every process, follow it to its end, and give the failures."""
        study = {"folder": "../study", "agreement_digest": self.digest, "authority_fingerprint": self.fingerprint}
        common = {"keys": "keys", "passphrase_file": "../passphrase", "study": study}
        self._configure(
            "aggregator", common | {"listen_address": "tcp://127.0.0.1:*", "records": str(self.out), "state": "state"}
        )
        events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        processes: dict[str, subprocess.Popen[str]] = {}
        try:
            processes["aggregator"] = self._start("aggregator", "aggregator", events)
            address = self._wait_for_address(events, processes["aggregator"])
            policy: dict[str, Any] = {"max_epsilon": 16.0}
            if self.protocol == "homomorphic":
                policy |= {"protocols": [self.protocol], "min_colluders_tolerated": 0}
            for name in self.names:
                data = {"kind": "arrays", "path": "records.npz"}
                self._configure(
                    name,
                    common
                    | {
                        "aggregator_address": address,
                        "state": "state",
                        "data": data,
                        "policy": policy,
                        "embeddings": "embeddings.npy",
                    }
                    | {"evaluation": {"kind": "arrays", "path": "held-out.npz"}},
                )
                processes[name] = self._start("node", name, events)
            with _live(console, progress, self) as refresh:
                while any(process.poll() is None for process in processes.values()) or not events.empty():
                    try:
                        name, event = events.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    progress.take(name, event)
                    refresh()
                    if processes["aggregator"].poll() not in (None, 0):
                        break
            return [
                f"{name} exited with {process.poll()}: {self._last_error(name)}"
                for name, process in processes.items()
                if process.poll() != 0
            ]
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()
            for process in processes.values():
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _configure(self, name: str, settings: dict[str, Any]) -> None:
        (self.scratch / name / "config.toml").write_text(tomli_w.dumps(settings))

    def _start(self, role: str, name: str, events: queue.Queue[tuple[str, dict[str, Any]]]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "secgeo.cli", role, str(self.scratch / name / "config.toml"), "--json"]
        # One thread per node: hospitals do not share a machine, here they share its cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        errors = (self.scratch / name / "stderr").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)  # noqa: S603

        def follow() -> None:
            for line in process.stdout or ():
                if line.startswith("{"):
                    events.put((name, json.loads(line)))
            errors.close()

        threading.Thread(target=follow, daemon=True).start()
        return process

    def _wait_for_address(self, events: queue.Queue[tuple[str, dict[str, Any]]], process: subprocess.Popen[str]) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                _, event = events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event["event"] == "listening":
                return str(event["address"])
        raise TransportError(f"the aggregator did not start: {self._last_error('aggregator')}")

    def _last_error(self, name: str) -> str:
        text = (self.scratch / name / "stderr").read_text().strip().splitlines()
        return text[-1] if text else "no message"

    # --- records and verdict

    def finish(
        self, progress: Progress, failures: list[str], started: float, ended: float, console: Console
    ) -> dict[str, Any]:
        """Collect and sign the records, verify them, and say how it went."""
        from audit.records import verify_folder

        for kind, file in ((LEDGERS, "ledger.jsonl"), (RECEIPTS, "receipts.jsonl")):
            (self.out / kind).mkdir(exist_ok=True)
            for name in self.names:
                for path in (self.scratch / name / "state").glob(f"*/{file}"):
                    shutil.copy(path, self.out / kind / f"{name}.jsonl")
        rounds = [progress.rounds[number] for number in sorted(progress.rounds)]
        result: dict[str, Any] = {
            "study": self.study_id,
            "data": self.split.name,
            "protocol": self.protocol,
            "seed": self.seed,
            "agreement_digest": self.digest,
            "authority_fingerprint": self.fingerprint,
            "seconds": round(ended - started, 2),
            "privacy": {
                "epsilon": max((v["epsilon"] or 0.0 for r in rounds for v in r["nodes"].values()), default=None),
                "delta": self.settings.privacy.delta,
                "neighbouring_relation": "add-or-remove-one",
                "accountant": "opacus-rdp",
                "noise_multiplier": self.settings.privacy.noise_multiplier,
                "sample_rate": self.settings.privacy.sample_rate,
            },
            "rounds": rounds,
            "held_out": self._held_out(),
            "majority_class_accuracy": float(np.bincount(self.split.test_labels).max() / len(self.split.test_labels)),
            "notes": progress.notes,
            "failures": failures,
        }
        plot_curves(self.out / "curves.png", rounds, f"SecGeo: {self.split.name}, {len(self.names)} hospitals")
        _write_json(self.out / "split.json", self.split.split_record())
        result["ok"] = not failures and len(rounds) == self.rounds
        result["verdict"] = self._verdict(result)
        _write_json(self.out / "metrics.json", result)
        authority = Authority.load(self.scratch / "authority", self.passphrase.read_bytes().rstrip(b"\n"))
        write_manifest(self.out, authority.sign)
        report = verify_folder(self.out, authority_fingerprint=self.fingerprint, now=datetime.now(UTC))
        result["ok"], result["verified"], result["out"] = result["ok"] and report.ok, report.ok, str(self.out)
        console.print(f"\n{result['verdict']}", style="bold" if result["ok"] else "bold red")
        for line in (*failures, *progress.notes, *(f"{c.name}: {c.detail}" for c in report.checks if not c.ok)):
            console.print(f"  {line}", style="red", markup=False)
        verified = "every signature, chain, sum and budget in it checks" if report.ok else "its verification FAILED"
        console.print(f"records are in {self.out}: {verified}", soft_wrap=True)
        console.print(
            f"check them yourself: secgeo verify {self.out} --authority {self.fingerprint}",
            soft_wrap=True,
            highlight=False,
        )
        return result

    def _held_out(self) -> dict[str, Any]:
        """Debiased CKA between the modalities' embeddings of the same held-out patients, per pair of hospitals."""
        found = {n: np.load(p) for n in self.names if (p := self.scratch / n / "embeddings.npy").exists()}
        pairs: dict[str, float] = {}
        names = sorted(found)
        for index, first in enumerate(names):
            for second in names[index + 1 :]:
                if first.split("-", 2)[2] != second.split("-", 2)[2]:
                    pairs[f"{first} / {second}"] = round(held_out.held_out_cka(found[first], found[second]), 4)
        mean = round(float(np.mean(list(pairs.values()))), 4) if pairs else None
        return {"debiased_cka": pairs, "mean_debiased_cka": mean}

    def _verdict(self, result: dict[str, Any]) -> str:
        rounds: Sequence[dict[str, Any]] = result["rounds"]
        if not rounds:
            return "NOT DONE: no round was summed."
        accuracy = [v["accuracy"] for v in rounds[-1]["nodes"].values() if v["accuracy"] is not None]
        word = "DONE" if result["ok"] else "NOT DONE"
        privacy = result["privacy"]
        return (
            f"{word}: {len(rounds)} of {self.rounds} rounds summed among {len(self.names)} hospitals in {result['seconds']:.0f} s. "
            f"Mean own-modality accuracy {np.mean(accuracy):.3f} on {len(self.split.test_labels)} held-out patients "
            f"(always guessing the commonest class: {result['majority_class_accuracy']:.3f}); "
            f"debiased CKA between modalities {result['held_out']['mean_debiased_cka']}; "
            f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g} (add or remove one record, RDP). "
            f"{WHAT_IT_SAW[self.protocol]}"
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextmanager
def _live(console: Console, progress: Progress, site: _Site) -> Iterator[Any]:
    """A live table on a terminal; one plain line per finished round elsewhere."""
    if console.is_terminal:
        with Live(_table(progress, site), console=console, refresh_per_second=4) as live:
            yield lambda: live.update(_table(progress, site))
        return
    printed: set[int] = set()

    def lines() -> None:
        for number, entry in progress.rounds.items():
            if number not in printed and entry["survivors"] and len(entry["nodes"]) == len(site.names):
                printed.add(number)
                console.print(
                    "  ".join(f"{k} {v}" for k, v in zip(COLUMNS, _row(entry, site), strict=True)),
                    soft_wrap=True,
                    highlight=False,
                )

    yield lines


COLUMNS = ("round", "nodes", "KiB", "seconds", "epsilon", "accuracy", "CKA")


def _row(entry: dict[str, Any], site: _Site) -> list[str]:
    def spread(key: str) -> str:
        values = [v[key] for v in entry["nodes"].values() if v.get(key) is not None]
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "..."

    spent = [v["epsilon"] for v in entry["nodes"].values() if v.get("epsilon") is not None]
    return [
        f"{entry['round']}/{site.rounds}",
        f"{entry['survivors']}/{len(site.names)}",
        f"{entry['bytes'] / 1024:.0f}",
        f"{entry['seconds']:.2f}",
        f"{max(spent):.2f}" if spent else "...",
        spread("accuracy"),
        spread("cka"),
    ]


def _table(progress: Progress, site: _Site) -> Table:
    waiting = "  ".join(f"{name}: {state}" for name, state in sorted(progress.states.items()))
    table = Table(title=f"{site.study_id} at delta {site.settings.privacy.delta:g}", caption=waiting)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for number in sorted(progress.rounds):
        table.add_row(*_row(progress.rounds[number], site))
    return table
