"""Where weights lie that are named instead of given: fetched once by their own library, into its own cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.notices import print_notice
from pretrain.backbones.config import PRETRAINED, OpenClipBackboneConfig, TimmBackboneConfig, TransformersBackboneConfig

if TYPE_CHECKING:
    from pretrain.backbones.config import OfficialBackboneConfig, TorchHubBackboneConfig, TorchScriptBackboneConfig


def resolve_weights(
    config: OfficialBackboneConfig
    | OpenClipBackboneConfig
    | TimmBackboneConfig
    | TransformersBackboneConfig
    | TorchHubBackboneConfig
    | TorchScriptBackboneConfig,
) -> Path:
    """The file or folder of a backbone's weights on this machine.

    Raises:
        UserError: they are named, and neither cached nor to be had.
    """
    given = Path(config.checkpoint)
    if given.exists():
        return given
    if isinstance(config, TimmBackboneConfig) and config.checkpoint == PRETRAINED:
        return _fetch(config.model, lambda: _fetch_timm(config.model))
    if isinstance(config, OpenClipBackboneConfig) and _tag(config) is not None:
        return _fetch(config.model, lambda: _fetch_open_clip(config))
    if isinstance(config, TransformersBackboneConfig) and _is_repository(config.checkpoint):
        return _fetch(config.checkpoint, lambda: _fetch_transformers(config.checkpoint))
    return given


def _fetch(name: str, fetch: Any) -> Path:
    print_notice(f"{name}: fetching its weights, unless they are cached")
    try:
        with _without_retries_shown():
            return Path(fetch())
    except UserError:
        raise
    except Exception as error:  # of networks, caches and servers, each library has its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name}: its weights cannot be fetched ({reason[0]}); fetch them elsewhere and give their path"
        ) from None


@contextmanager
def _without_retries_shown() -> Iterator[None]:
    """Hide the warnings of each attempt to reach the Hub: what failed in the end is said once."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _fetch_timm(name: str) -> str:
    import timm
    from huggingface_hub import hf_hub_download

    settings = timm.models.get_pretrained_cfg(name)
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise UserError(f"{name}: timm publishes no weights for it; timm.list_pretrained() has the names")
    if not settings.hf_hub_id:
        return str(timm.models.download_cached_file(settings.url))
    return hf_hub_download(settings.hf_hub_id, "model.safetensors")


def _tag(config: OpenClipBackboneConfig) -> dict[str, Any] | None:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(config.model, config.checkpoint) or None


def read_preprocessing(config: OpenClipBackboneConfig) -> dict[str, Any]:
    """How open_clip prepares images for a model: as its tag says; for weights in a file as all tags of the model say,
    where they agree, else as its configuration does."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    own = (open_clip.get_model_config(config.model) or {}).get("vision_cfg", {})
    default = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    default |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    tags = [config.checkpoint] if _tag(config) is not None else list_pretrained_tags_by_model(config.model)
    said = [
        {name: get_pretrained_cfg(config.model, tag).get(name, value) for name, value in default.items()}
        for tag in tags
    ]
    agreed = said[0] if said and all(each == said[0] for each in said) else default
    agreed |= {name: own[f"image_{name}"] for name in default if f"image_{name}" in own}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in agreed.items()} | {
        "quick_gelu": bool((_tag(config) or {}).get("quick_gelu", False))
    }


def _fetch_open_clip(config: OpenClipBackboneConfig) -> str:
    from open_clip.pretrained import download_pretrained

    return download_pretrained(_tag(config))


def _is_repository(name: str) -> bool:
    """Whether this can be `OWNER/NAME` of a model hub, and is not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _fetch_transformers(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
