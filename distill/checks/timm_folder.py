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
    np.save(features, model(torch.from_numpy(np.load(pixels))).numpy())
