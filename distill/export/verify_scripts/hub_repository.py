"""Run as a script in a fresh process: features of a published directory by torch.hub.

Usage: hub_repository.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import torch

directory, pixels, features = sys.argv[1:]
model = torch.hub.load(directory, "backbone", source="local").eval()
with torch.inference_mode():
    np.save(features, model(torch.from_numpy(np.load(pixels))).numpy())
