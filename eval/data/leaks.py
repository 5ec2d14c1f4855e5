"""What a leak check looked for, in words: a count of leaks says little without it."""

from __future__ import annotations

from typing import Any

from infra.artifacts.artifact import Artifact, find

_SEEN_BY = {
    "pixels": "re-encoded and resized copies; crops, mirrored, turned and recolored ones are mostly missed",
}
_BY_OTHERS = "what that backbone was trained to find alike"


def describe_leak_check(selection: Artifact) -> str:
    """What the selection that marks leaks of a dataset compared, and what such a comparison sees."""
    step: dict[str, Any] = next(
        (each for each in selection.manifest.config.get("steps", []) if each.get("kind") == "decontaminate"), {}
    )
    source = selection.manifest.inputs.get("embeddings")
    embeddings = None if source is None else find(source.url)
    if not step or embeddings is None:
        return "images that a selection marks as seen in training"
    kind = str(embeddings.manifest.config.get("kind", ""))
    descriptor = "the pixel descriptor" if kind == "pixels" else f"a backbone of kind {kind}"
    return (
        f"test images with a cosine of {step['threshold']:g} or more to a training image by {descriptor}, which sees "
        f"{_SEEN_BY.get(kind, _BY_OTHERS)}"
    )
