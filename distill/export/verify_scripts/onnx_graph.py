"""Run as a script in a fresh process: features of a published directory by onnxruntime alone.

Usage: onnx_graph.py DIRECTORY PIXELS.npy FEATURES.npy
"""

import sys

import numpy as np
import onnxruntime

directory, pixels, features = sys.argv[1:]
session = onnxruntime.InferenceSession(f"{directory}/model.onnx", providers=["CPUExecutionProvider"])
np.save(features, session.run(["features"], {"pixels": np.load(pixels)})[0])
