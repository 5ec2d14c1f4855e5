"""The scores of a backbone and its baselines by all tasks of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import EvaluateConfig, file_name
from eval.context import EvalContext
from eval.data.feature_store import Extraction
from eval.eval_model import EvalModel
from eval.evaluate import DONE
from eval.protocols import registry
from eval.protocols.config import Linear, TaskConfig
from eval.report import evaluation_page
from eval.report.backbone_pictures import draw_backbone_pictures
from eval.stats.scores import ProtocolResult, Score, select_headlines
from eval.stats.verdict import MODEL, SAME_IMAGES, compute_gains, describe_verdict
from infra.errors import UserError
from infra.storage import filesystem
from infra.storage.atomic import atomic_write
from pretrain.backbones.config import BackboneConfig, CheckpointBackboneConfig, PixelDescriptorConfig

_PIXELS = PixelDescriptorConfig(side=32, frequencies=32, whiten=0.0)


def _have_same_images(context: EvalContext) -> bool:
    """Whether the sets called train and test are one corpus."""
    train, test = (context.inputs.get(f"dataset_{name}") for name in ("train", "test"))
    return train is not None and test is not None and train.id == test.id


def _models(config: EvaluateConfig) -> dict[str, BackboneConfig]:
    """What is scored: the model and, beside it, the baselines."""
    found: dict[str, BackboneConfig] = {MODEL: config.model}
    if config.baselines:
        if isinstance(config.model, CheckpointBackboneConfig):
            found["untrained"] = config.model.model_copy(update={"untrained": True})
        found["pixels"] = _PIXELS
    return found


def score_all(config: EvaluateConfig, context: EvalContext, directory: Path) -> Mapping[str, Any]:
    """Score the model and its baselines, write tables and pictures into a directory; return the headlines."""
    scores: list[Score] = []
    left_out = {name: f"no dataset {', '.join(missing)}" for name, missing in config.left_out().items()}
    (directory / DONE).mkdir(exist_ok=True)
    for name, backbone in _models(config).items():
        model = EvalModel(name, backbone, _extraction(config), _features(config))
        for task in config.runnable():
            lack = registry.missing_capability(task, model)
            if name == MODEL and lack is not None:
                left_out[task.protocol] = f"the backbone lacks {lack}"
            elif lack is None and (name == MODEL or registry.applies_to_baseline(task, backbone)):
                scores += _score_task(task, model, context, directory)
        if not scores:
            protocol, reason = next(iter(left_out.items()))
            raise UserError(f"{protocol}: {reason}; there is nothing else to score")
        if name == MODEL and config.pictures:
            _draw(draw_backbone_pictures(model, context), directory)
    scores.sort(key=lambda score: [task.protocol for task in config.tasks].index(score.protocol))  # stable
    rows = [score.as_dict() for score in scores]
    gained = compute_gains(select_headlines(rows), _answers(config, directory))
    said = SAME_IMAGES if _have_same_images(context) else describe_verdict(gained)
    told: dict[str, Any] = {"rows": rows, "left_out": left_out, "verdict": said}
    told |= {"gains": [each.as_dict() for each in gained], "leak_checks": dict(context.leak_checks)}
    (directory / "report.json").write_text(json.dumps(told, indent=1))
    evaluation_page.write(config, told, directory)
    metrics: dict[str, dict[str, float]] = {}
    for row in select_headlines(told["rows"]):
        metrics.setdefault(row["protocol"], {})[row["model"]] = row["value"]
    return metrics


def _extraction(config: EvaluateConfig) -> Extraction:
    blocks = [max(task.blocks) for task in config.runnable() if isinstance(task, Linear)]
    return Extraction(max(blocks, default=1), 1, config.seed, config.batch, config.workers)


def _features(config: EvaluateConfig) -> str:
    """Where features go: beside the report, so that other reports of a run find them."""
    below = config.features or filesystem.join(filesystem.parent(config.out), "features")
    return filesystem.join(below, "{id}")


def _score_task(task: TaskConfig, model: EvalModel, context: EvalContext, directory: Path) -> list[Score]:
    """Scores of one task, new ones or those of an attempt that was interrupted; pictures go to the directory."""
    done = directory / DONE / f"{context.settings.tasks.index(task)}-{model.name}.json"
    if done.exists():
        return [Score(**row) for row in json.loads(done.read_text())]
    outcome: ProtocolResult = registry.run(task, model, context)
    _draw({f"{task.protocol} {name}": data for name, data in outcome.pictures.items()}, directory)
    if outcome.answers is not None:
        np.save(done.with_suffix(".npy"), outcome.answers)
        if model.name == MODEL:
            np.save(directory / evaluation_page.answers_file(task.protocol), outcome.answers)
    with atomic_write(done, 0o644) as partial:
        partial.write_text(json.dumps([score.as_dict() for score in outcome.scores]))
    return outcome.scores


def _answers(config: EvaluateConfig, directory: Path) -> dict[tuple[str, str], np.ndarray]:
    """Which test images each model had right, by protocol and model, of the protocols that have such answers."""
    found = {}
    for number, task in enumerate(config.tasks):
        for path in (directory / DONE).glob(f"{number}-*.npy"):
            found[task.protocol, path.stem.partition("-")[2]] = np.load(path, allow_pickle=False)
    return found


def _draw(pictures: Mapping[str, bytes], directory: Path) -> None:
    for name, data in pictures.items():
        (directory / f"{file_name(name)}.png").write_bytes(data)
