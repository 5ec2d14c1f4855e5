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
from distill.formats import official_weights
from distill.formats.catalogue import FORMATS
from distill.formats.material import Material
from infra.corpora import Corpus
from infra.errors import UserError
from pretrain.backbones import Normaliser, center_crop
from pretrain.data.images import first_images
from pretrain.models.official import from_official
from pretrain.models.vit import VisionTransformer

_IMAGES = 16


def pixels_of(images: Corpus, material: Material) -> Tensor:
    """The first images of a corpus, preprocessed and normalised, float32 `[n, 3, side, side]`."""
    side, views = material.backbone.image_size, material.views
    crops = [center_crop(image, side) for image in first_images(images, _IMAGES)]
    return Normaliser(views.mean, views.std)(torch.from_numpy(np.stack(crops)))


def difference(name: FormatName, directory: Path, material: Material, pixels: Tensor) -> float:
    """Largest absolute difference of any feature between Fovea and a format.

    Raises:
        UserError: it cannot be loaded.
    """
    wanted = FORMATS[name]
    if wanted.check is None:
        found = _by_official_names(directory, material, pixels)
    else:
        found = _by_script(wanted.check, directory, pixels, wanted.words)
    return float(np.abs(wanted.features(material, pixels) - found).max())


def _by_script(script: str, directory: Path, pixels: Tensor, words: Sequence[str]) -> np.ndarray:
    file = Path(__file__).parent / "checks" / script
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "pixels.npy"), Path(scratch, "features.npy")
        np.save(inputs, pixels.numpy())
        command = [sys.executable, "-IB", str(file), str(directory.resolve()), str(inputs), str(outputs), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"publish: {file.stem}: cannot load the backbone: {''.join(reason)}")
        return np.load(outputs)


def _by_official_names(directory: Path, material: Material, pixels: Tensor) -> np.ndarray:
    """Features of the weights under official names, read back: the official code is not to be had here."""
    assert isinstance(material.backbone, VisionTransformer)
    config = material.backbone.config
    state = torch.load(directory / official_weights.FILE, weights_only=True)
    again = VisionTransformer(config).eval()
    again.load_state_dict(from_official(state, config))
    with torch.inference_mode():
        return again([pixels])[0].class_token.numpy()
