"""`secgeo demo` and `secgeo verify`, as a user runs them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from audit.records import verify_folder


def secgeo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "secgeo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("scratch")
    out = scratch / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        done = secgeo("demo", "--rounds", 2, "--seed", 5, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    left = [path.name for path in scratch.rglob("*") if path.suffix in (".key", ".npz") or "demo" in path.name]
    assert left == [], "keys and private data must be gone"
    return out, json.loads(done.stdout)


def accuracies(metrics: dict[str, Any]) -> float:
    """The mean of all hospitals' after the last round."""
    nodes = metrics["rounds"][-1]["nodes"].values()
    return sum(node["accuracy"] for node in nodes) / len(nodes)


def test_the_demo_says_what_happened(demo: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = demo
    assert metrics["ok"]
    assert metrics["verified"]
    assert metrics["verdict"].startswith("DONE: 2 of 2 rounds")
    assert [len(entry["nodes"]) for entry in metrics["rounds"]] == [4, 4]
    assert all(entry["survivors"] == 4 and entry["bytes"] > 0 for entry in metrics["rounds"])
    assert 0 < metrics["privacy"]["epsilon"] <= 8
    assert metrics["privacy"].keys() >= {"delta", "neighbouring_relation", "accountant"}
    kept = json.loads((out / "metrics.json").read_text())
    assert kept["rounds"] == metrics["rounds"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["layered", "homomorphic"])
def test_the_demo_with_sums_of_ciphertexts(tmp_path: Path, by: str, demo: tuple[Path, dict[str, Any]]) -> None:
    """The same job and nearly the same accuracy (noise is fresh), and records that verify; of the sums there are ciphertexts only."""
    out = tmp_path / "out"
    done = secgeo("demo", "--protocol", by, "--rounds", 2, "--seed", 5, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["ok"]
    assert metrics["verified"]
    assert metrics["protocol"] == by
    masked, here = (accuracies(metrics) for metrics in (demo[1], metrics))
    assert abs(masked - here) < 0.1
    assert "nor their sum" in metrics["verdict"]
    assert sorted(path.suffix for path in (out / "sums").iterdir()) == [".u64", ".u64"]
    assert secgeo("verify", out).returncode == 0


def test_patients_are_disjoint_and_the_split_is_written_down(demo: tuple[Path, dict[str, Any]]) -> None:
    split = json.loads((demo[0] / "split.json").read_text())
    parts = [split["anchors"], split["validation"], split["test"], *(node["rows"] for node in split["nodes"])]
    rows = [row for part in parts for row in part]
    assert len(rows) == len(set(rows)) == 569


def test_verify_accepts_the_records_and_pins_the_authority(demo: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = demo
    good = secgeo("verify", out, "--authority", metrics["authority_fingerprint"])
    assert good.returncode == 0, good.stdout
    assert "every check holds" in good.stdout
    assert secgeo("verify", out, "--authority", "0" * 64).returncode == 8
    unpinned = secgeo("verify", out)
    assert unpinned.returncode == 0
    assert "no authority was pinned" in unpinned.stdout


def test_no_byte_of_any_file_can_change_unseen(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """One changed byte in every file, at a random place; the transcript and a ledger more often."""
    out, metrics = demo
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    generator = random.Random(11)  # noqa: S311
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for _ in range(3 if path.suffix == ".jsonl" else 1):
            changed = bytearray(data)
            changed[generator.randrange(len(data))] ^= generator.choice([1, 0x20, 0x80])
            path.write_bytes(changed)
            report = verify_folder(copy, authority_fingerprint=metrics["authority_fingerprint"], now=datetime.now(UTC))
            assert not report.ok, path
        path.write_bytes(data)
    assert verify_folder(copy, authority_fingerprint=metrics["authority_fingerprint"], now=datetime.now(UTC)).ok


@pytest.mark.parametrize("change", ["missing", "added", "link"])
def test_files_cannot_go_or_come(demo: tuple[Path, dict[str, Any]], tmp_path: Path, change: str) -> None:
    out, metrics = demo
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    match change:
        case "missing":
            (copy / "split.json").unlink()
        case "added":
            (copy / "extra.txt").write_text("hello")
        case "link":
            (copy / "link").symlink_to("/etc/hostname")
    report = verify_folder(copy, authority_fingerprint=metrics["authority_fingerprint"], now=datetime.now(UTC))
    assert not report.ok


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--data", "nothing"], 3),
        (["--protocol", "plain"], 3),
        (["--nodes", "3"], 2),
        (["--rounds", "0"], 2),
        (["--colour", "red"], 2),
    ],
)
def test_wrong_options_say_so(tmp_path: Path, arguments: list[str], code: int) -> None:
    done = secgeo("demo", "--out", tmp_path / "out", *arguments)
    assert done.returncode == code
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    done = secgeo("demo", "--out", tmp_path)
    assert done.returncode == 3
    assert (tmp_path / "mine").read_text() == "keep"


def test_verify_of_nothing_fails_without_a_crash(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        done = secgeo("verify", folder, "--json")
        assert done.returncode == 8
        assert not json.loads(done.stdout)["ok"]
