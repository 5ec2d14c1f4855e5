"""The model card: Markdown with the Hugging Face Hub's metadata block."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from distill.config import PublishSettings
from distill.export.formats.compatibility import family
from distill.export.formats.timm_folder import TRAINING_ONLY
from distill.export.provenance import Provenance
from infra.artifacts.lineage import Ancestor
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.models.config import TimmNetworkConfig
from pretrain.models.timm_network import Network

_TASK = "image-feature-extraction"
_LONGEST = 120  # characters
_SPECIAL = "\\`*_[]|"  # of Markdown


def model_card(
    release: PublishSettings,
    checkpoint: Checkpoint,
    backbone: Network,
    reports: Sequence[Mapping[str, Any]],
    lineage: Sequence[Ancestor],
    differences: Mapping[str, float],
) -> str:
    """The text of a backbone's README.md.

    Args:
        backbone: the checkpoint's, released.
        reports: what the reports of its evaluations hold: rows, verdict, what leak checks looked for.
        lineage: all that it was made from.
        differences: by format, between Fovea's features and those of a process without it.
    """
    template = resources.files("distill.export").joinpath("templates/card.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    model = checkpoint.model
    vit = None if isinstance(model, TimmNetworkConfig) else model
    return environment.from_string(template).render(
        metadata=_metadata(release, reports, differences),
        release=release,
        vit=vit,
        network=model.name if isinstance(model, TimmNetworkConfig) else None,
        dim=backbone.embed_dim,
        patch=backbone.patch_size,
        side=backbone.image_size,
        stage=checkpoint.artifact.manifest.stage,
        parameters=count_parameters(backbone),
        recipe=json.dumps(checkpoint.artifact.manifest.config, indent=1),
        training=checkpoint.artifact.metrics,
        rows=[row for report in reports for row in report["rows"]],
        verdicts=[report["verdict"] for report in reports if report.get("verdict")],
        leak_checks={name: text for report in reports for name, text in report.get("leak_checks", {}).items()},
        provenance=Provenance.from_checkpoint(checkpoint.artifact),
        lineage=lineage,
        differences=differences,
        transformers_class="" if vit is None else family(vit),
    )


def _metadata(release: PublishSettings, reports: Sequence[Mapping[str, Any]], differences: Mapping[str, float]) -> str:
    """The card's YAML for the Hub: license, library, tags, and the headline scores as `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    rows = [row for report in reports for row in report["rows"] if row["model"] == "model"]
    headlines = {row["protocol"]: row for row in reversed(rows)}  # the first row of each protocol
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type="custom",
            dataset_name="evaluation set",
            metric_type=row["metric"],
            metric_name=f"{row['protocol']}: {row['metric']}",
            metric_value=round(float(row["value"]), 5),
        )
        for row in reversed(headlines.values())
    ]
    data = ModelCardData(
        license=release.license,
        library_name=next((name for name in ("timm", "transformers") if name in differences), None),
        pipeline_tag=_TASK,
        tags=[_TASK, *(name for name in ("timm", "transformers", "open_clip", "onnx") if name in differences), "fovea"],
        model_name=release.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _cell(text: str, longest: int = _LONGEST) -> str:
    """Words from the web, as plain text in a cell of a Markdown table."""
    words = " ".join(text.split())[:longest]
    return "".join(f"\\{each}" if each in _SPECIAL else each for each in html.escape(words, quote=False))


def count_parameters(backbone: Network) -> int:
    """Numbers in a backbone, without what serves training only."""
    return sum(value.numel() for name, value in backbone.named_parameters() if not name.startswith(TRAINING_ONLY))
