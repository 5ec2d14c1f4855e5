"""Run as a script in a fresh process: features of a published directory by transformers alone.

Usage: transformers_folder.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import torch
import transformers

directory, pixels, features = sys.argv[1:]
images = torch.from_numpy(np.load(pixels))
folder = f"{directory}/transformers"
plain = transformers.AutoConfig.from_pretrained(folder).model_type == "vit"  # which has a pooler, and no backbone
model = transformers.AutoModel.from_pretrained(folder, **({"add_pooling_layer": False} if plain else {})).eval()
with torch.inference_mode():
    found = model(images)
    tokens, side = found.last_hidden_state, model.config.patch_size
    patches = (images.shape[-2] // side) * (images.shape[-1] // side)
    first = tokens[:, :1] if plain else found.pooler_output[:, None]
    np.save(features, torch.cat([first, tokens[:, -patches:]], dim=1).numpy())
    if not plain:
        # AutoBackbone asks the Hub about every name, folders too (transformers 5.23): so by its class.
        backbone = getattr(transformers, type(model).__name__.removesuffix("Model") + "Backbone")
        (grid,) = backbone.from_pretrained(folder).eval()(images).feature_maps
        assert grid.shape[:1] == images.shape[:1], grid.shape
