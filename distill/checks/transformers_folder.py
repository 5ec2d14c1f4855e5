"""Run as a script in a fresh process: features of a published directory by transformers alone.

Usage: transformers_folder.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import torch
import transformers

directory, pixels, features = sys.argv[1:]
images = torch.from_numpy(np.load(pixels))
model = transformers.AutoModel.from_pretrained(f"{directory}/transformers").eval()
# AutoBackbone asks the Hub about every name, folders too (transformers 5.23): so by its class.
backbone = getattr(transformers, type(model).__name__.removesuffix("Model") + "Backbone")
with torch.inference_mode():
    np.save(features, model(images).pooler_output.numpy())
    (grid,) = backbone.from_pretrained(f"{directory}/transformers").eval()(images).feature_maps
assert grid.shape[:1] == images.shape[:1], grid.shape
