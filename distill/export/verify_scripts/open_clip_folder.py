"""Run as a script in a fresh process: vectors of images and captions of a published directory by open_clip alone.

Usage: open_clip_folder.py DIRECTORY PIXELS.npy FEATURES.npy CAPTION...
"""

import sys

import numpy as np
import open_clip
import torch

directory, pixels, features, *captions = sys.argv[1:]
name = f"local-dir:{directory}/open_clip"
model, _, _ = open_clip.create_model_and_transforms(name)
tokens = open_clip.get_tokenizer(name)(captions)
model.eval()
with torch.inference_mode():
    images = model.encode_image(torch.from_numpy(np.load(pixels)), normalize=True)
    texts = model.encode_text(tokens, normalize=True)
np.save(features, torch.cat([images, texts]).numpy())
