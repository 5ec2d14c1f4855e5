"""Whether a published format gives the features it was made from: loaded in a process of its own, without Fovea."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.config import FormatName
from distill.export.formats import official_weights
from distill.export.formats.registry import FORMATS
from distill.export.formats.source import PublishSource
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.preprocessing import Normalizer, center_crop
from pretrain.data.images import first_images
from pretrain.models.official import from_official
from pretrain.models.vit import VisionTransformer

_IMAGES = 16


def sample_pixels(images: Corpus, material: PublishSource) -> Tensor:
    """The first images of a corpus, preprocessed and normalized, float32 `[n, 3, side, side]`."""
    side, views = material.backbone.image_size, material.views
    crops = [center_crop(image, side) for image in first_images(images, _IMAGES)]
    return Normalizer(views.mean, views.std)(torch.from_numpy(np.stack(crops)))


def max_difference(name: FormatName, directory: Path, material: PublishSource, pixels: Tensor) -> float:
    """Largest absolute difference of any feature between Fovea and a format.

    Raises:
        UserError: it cannot be loaded.
    """
    wanted = FORMATS[name]
    if wanted.check is None:
        found = _load_official_names(directory, material, pixels)
    else:
        found = _run_verify_script(wanted.check, directory, pixels, wanted.words)
    return float(np.abs(wanted.features(material, pixels) - found).max())


def _run_verify_script(script: str, directory: Path, pixels: Tensor, words: Sequence[str]) -> np.ndarray:
    file = Path(__file__).parent / "verify_scripts" / script
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "pixels.npy"), Path(scratch, "features.npy")
        np.save(inputs, pixels.numpy())
        command = [sys.executable, "-IB", str(file), str(directory.resolve()), str(inputs), str(outputs), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"publish: {file.stem}: cannot load the backbone: {''.join(reason)}")
        return np.load(outputs)


def _load_official_names(directory: Path, material: PublishSource, pixels: Tensor) -> np.ndarray:
    """Features of the weights under official names, read back: the official code is not to be had here."""
    assert isinstance(material.backbone, VisionTransformer)
    config = material.backbone.config
    state = torch.load(directory / official_weights.FILE, weights_only=True)
    again = VisionTransformer(config).eval()
    again.load_state_dict(from_official(state, config))
    with torch.inference_mode():
        return again([pixels])[0].class_token.numpy()
