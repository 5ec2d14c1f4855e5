"""Files beside the datasets that tasks read: class names, ground truth, prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from eval.protocols.config import TaskConfig
from infra.errors import UserError
from infra.hashing import hash_file, hash_json


def referenced_files(tasks: Sequence[TaskConfig], datasets: Collection[str]) -> dict[str, str]:
    """Hashes of the files that tasks read, by path: what they hold decides a report, too.

    Raises:
        UserError: one is missing.
    """
    found: dict[str, str] = {}
    for task in tasks:
        given: dict[str, Any] = task.model_dump(include={"class_names", "ground_truth", "pairs"}, exclude_none=True)
        also = [each.classes for each in getattr(task, "ood_datasets", []) if each.dataset in datasets]
        for path in [*given.values(), *(each for each in also if each is not None)]:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file; the task {task.protocol} reads it")
            found[path] = hash_file(Path(path))
        templates = getattr(task, "prompts", None)
        if templates is not None:
            found[f"prompts {templates}"] = hash_json(read_prompts(templates))
    return found


def read_prompts(name: str) -> list[str]:
    """Templates of a file in eval/prompts, or of one at a path: one a line, `{}` for the class."""
    file = Path(__file__).parents[1] / "prompts" / f"{name}.txt"
    path = file if file.is_file() else Path(name)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(each.stem for each in file.parent.glob("*.txt")))
        raise UserError(f"prompts: {name}: no such file; there are {known}, or give the path of a text file") from None
    if not lines or any(line.count("{}") != 1 for line in lines):
        raise UserError(f"prompts: {name}: every line needs {{}} once, in the place of the class")
    return lines
