"""Run as a script in a fresh process: features of a published directory by torch alone.

Usage: exported_graph.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import torch

directory, pixels, features = sys.argv[1:]
graph = torch.export.load(f"{directory}/model.pt2").module()
with torch.inference_mode():
    np.save(features, graph(torch.from_numpy(np.load(pixels))).numpy())
