"""What README and docs tell people to type works, word by word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(document: Path, kind: str) -> list[str]:
    return re.findall(rf"^```sh {kind}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "SECGEO": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_walk_through_works_word_by_word(tmp_path: Path) -> None:
    document = ROOT / "docs" / "by-hand.md"

    def run(script: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("\n".join(blocks(document, "setup")))
    terminals = [
        subprocess.Popen(["bash", "-ec", f"exec {script}"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
        for script in blocks(document, "terminal")
    ]
    try:
        assert len(terminals) == 5
        assert [process.wait(timeout=150) for process in terminals] == [0] * 5
    finally:
        for process in terminals:
            if process.poll() is None:
                process.kill()
    assert "every check holds" in run("\n".join(blocks(document, "finish")))


def commands(document: Path) -> set[tuple[str, ...]]:
    found = re.findall(r"\bsecgeo ([a-z]+)(?: ([a-z]+))?", document.read_text())
    groups = {"authority", "keys", "agreement"}
    known = {"authority", "keys", "agreement", "aggregator", "node", "demo", "verify"}
    return {(first, second) if first in groups and second else (first,) for first, second in found if first in known}


@pytest.mark.parametrize("name", ["README.md", "docs/by-hand.md"])
def test_every_command_in_the_documents_exists(name: str) -> None:
    for command in sorted(commands(ROOT / name)):
        done = subprocess.run(
            [sys.executable, "-m", "secgeo.cli", *command, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, command


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_test_that_the_threat_model_names_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"(?:`|::)(test_[a-z_]+[a-z])(?:\.\.\.)?`", (ROOT / "docs" / "threat-model.md").read_text())
    assert len(named) >= 10
    for name in named:
        assert f"def {name}" in sources, name
