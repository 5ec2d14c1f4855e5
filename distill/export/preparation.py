"""How images are prepared, as an image processor of transformers."""

from __future__ import annotations

from typing import Any

from pretrain.data.config import Views

FILE = "preprocessor_config.json"


def image_processor_json(side: int, views: Views) -> dict[str, Any]:
    """Settings of BitImageProcessor by which images are prepared as Fovea does: the shorter side to 256/224 of the
    model's, then its middle."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side * 256 / 224) if side >= 64 else side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }
