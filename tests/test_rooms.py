"""The rules of the design that code can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("infra", "pretrain", "curation", "distill", "eval", "flows")
BEHIND_ONE_MODULE = {
    "deepspeed": {"pretrain/sharding/deepspeed_engine.py"},
    "faiss": {"infra/compute/vector_search.py"},
    "xformers": {"pretrain/models/attention.py"},
}


def imports() -> Iterator[tuple[str, str]]:
    """(file, imported module) for every import statement of the rooms."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((str(path.relative_to(ROOT)), alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield str(path.relative_to(ROOT)), node.module


def test_rooms_import_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_eval_is_never_imported_over_the_builtin() -> None:
    for path in (path for room in (*ROOMS, "tests", "benchmarks") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "eval" and not alias.asname for alias in node.names), path


@pytest.mark.parametrize("package", BEHIND_ONE_MODULE)
def test_heavy_packages_stand_behind_one_module(package: str) -> None:
    users = {file for file, module in imports() if module.split(".")[0] == package}
    assert users == BEHIND_ONE_MODULE[package]


def test_only_flows_imports_prefect() -> None:
    assert {file.split("/")[0] for file, module in imports() if module.split(".")[0] == "prefect"} == {"flows"}


def test_a_training_rank_pays_for_nothing_it_does_not_use() -> None:
    script = "import pretrain.train, sys; print(*sorted({'prefect', 'faiss', 'timm', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
