"""Run as a script in a fresh process: features of a published directory by timm alone.

Usage: timm_folder.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import timm
import torch

directory, pixels, features = sys.argv[1:]
model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
with torch.inference_mode():
    images = torch.from_numpy(np.load(pixels))
    found = model(images)
    tokens = model.forward_features(images)
    if tokens.ndim == 3 and getattr(model, "num_prefix_tokens", 0):  # a Vision Transformer's
        patches = tokens[:, model.num_prefix_tokens :]
        found = torch.cat([found[:, None], patches], dim=1)
    np.save(features, found.numpy())
