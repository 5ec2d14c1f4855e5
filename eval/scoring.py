"""The scores of a backbone and its baselines by all tasks of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval import protocols, summary
from eval.bench import Bench
from eval.config import EvaluateConfig, file_name
from eval.evaluate import DONE
from eval.frozen import Extraction
from eval.overview import overview
from eval.scores import Outcome, Score, headline_rows
from eval.subject import Subject
from eval.tasks.config import Linear, TaskConfig
from eval.verdict import MODEL, SAME_IMAGES, gains, verdict
from infra import storage
from infra.errors import UserError
from infra.files import appearing
from pretrain.config import BackboneConfig, CheckpointBackbone, PixelDescriptor

_PIXELS = PixelDescriptor(side=32, frequencies=32, whiten=0.0)


def _are_same_images(bench: Bench) -> bool:
    """Whether the sets called train and test are one corpus."""
    train, test = (bench.inputs.get(f"dataset_{name}") for name in ("train", "test"))
    return train is not None and test is not None and train.id == test.id


def _subjects(config: EvaluateConfig) -> dict[str, BackboneConfig]:
    """What is scored: the model and, beside it, the baselines."""
    found: dict[str, BackboneConfig] = {MODEL: config.model}
    if config.baselines:
        if isinstance(config.model, CheckpointBackbone):
            found["untrained"] = config.model.model_copy(update={"untrained": True})
        found["pixels"] = _PIXELS
    return found


def score(config: EvaluateConfig, bench: Bench, directory: Path) -> Mapping[str, Any]:
    """Score the model and its baselines, write tables and pictures into a directory; return the headlines."""
    scores: list[Score] = []
    left_out = {name: f"no dataset {', '.join(missing)}" for name, missing in config.left_out().items()}
    (directory / DONE).mkdir(exist_ok=True)
    for name, backbone in _subjects(config).items():
        subject = Subject(name, backbone, _extraction(config), _features(config))
        for task in config.runnable():
            lack = protocols.lack(task, subject)
            if name == MODEL and lack is not None:
                left_out[task.protocol] = f"the backbone lacks {lack}"
            elif lack is None and (name == MODEL or protocols.of_baseline(task, backbone)):
                scores += _scored(task, subject, bench, directory)
        if not scores:
            protocol, reason = next(iter(left_out.items()))
            raise UserError(f"{protocol}: {reason}; there is nothing else to score")
        if name == MODEL and config.pictures:
            _draw(overview(subject, bench), directory)
    scores.sort(key=lambda score: [task.protocol for task in config.tasks].index(score.protocol))  # stable
    rows = [score.as_dict() for score in scores]
    gained = gains(headline_rows(rows), _answers(config, directory))
    said = SAME_IMAGES if _are_same_images(bench) else verdict(gained)
    told: dict[str, Any] = {"rows": rows, "left_out": left_out, "verdict": said}
    told |= {"gains": [each.as_dict() for each in gained], "leak_checks": dict(bench.leak_checks)}
    (directory / "report.json").write_text(json.dumps(told, indent=1))
    summary.write(config, told, directory)
    metrics: dict[str, dict[str, float]] = {}
    for row in headline_rows(told["rows"]):
        metrics.setdefault(row["protocol"], {})[row["subject"]] = row["value"]
    return metrics


def _extraction(config: EvaluateConfig) -> Extraction:
    blocks = [max(task.blocks) for task in config.runnable() if isinstance(task, Linear)]
    return Extraction(max(blocks, default=1), 1, config.seed, config.batch, config.workers)


def _features(config: EvaluateConfig) -> str:
    """Where features go: beside the report, so that other reports of a run find them."""
    below = config.features or storage.join(storage.parent(config.out), "features")
    return storage.join(below, "{id}")


def _scored(task: TaskConfig, subject: Subject, bench: Bench, directory: Path) -> list[Score]:
    """Scores of one task, new ones or those of an attempt that was interrupted; pictures go to the directory."""
    done = directory / DONE / f"{bench.settings.tasks.index(task)}-{subject.name}.json"
    if done.exists():
        return [Score(**row) for row in json.loads(done.read_text())]
    outcome: Outcome = protocols.run(task, subject, bench)
    _draw({f"{task.protocol} {name}": data for name, data in outcome.pictures.items()}, directory)
    if outcome.answers is not None:
        np.save(done.with_suffix(".npy"), outcome.answers)
        if subject.name == MODEL:
            np.save(directory / summary.answers_file(task.protocol), outcome.answers)
    with appearing(done, 0o644) as partial:
        partial.write_text(json.dumps([score.as_dict() for score in outcome.scores]))
    return outcome.scores


def _answers(config: EvaluateConfig, directory: Path) -> dict[tuple[str, str], np.ndarray]:
    """Which test images each subject had right, by protocol and subject, of the protocols that have such answers."""
    found = {}
    for number, task in enumerate(config.tasks):
        for path in (directory / DONE).glob(f"{number}-*.npy"):
            found[task.protocol, path.stem.partition("-")[2]] = np.load(path, allow_pickle=False)
    return found


def _draw(pictures: Mapping[str, bytes], directory: Path) -> None:
    for name, data in pictures.items():
        (directory / f"{file_name(name)}.png").write_bytes(data)
