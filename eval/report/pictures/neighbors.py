"""Images and the ones that a backbone takes for most alike."""

from __future__ import annotations

import numpy as np

from eval.report.pictures.sheet import sheet, spread, tile
from infra.compute.vector_search import knn_search
from infra.corpus.corpus import Corpus
from pretrain.data.images import read_image

_SHOWN = 7
RIGHT, WRONG, ASKED = "#5b8c5a", "#c2703d", "#2f6f8f"


def neighbor_sheet(train: Corpus, test: Corpus, bank: np.ndarray, queries: np.ndarray, count: int) -> bytes:
    """Test images, each before its nearest training images: green frames have its class, orange ones another."""
    rows = spread(len(test), count)
    _, found = knn_search(queries[rows], bank, min(_SHOWN, len(bank)))
    lines = []
    for row, near in zip(rows.tolist(), found.tolist(), strict=True):
        line = [tile(read_image(test, row), ASKED)]
        for other in near:
            same = train.labels[other] == test.labels[row]
            line.append(tile(read_image(train, other), RIGHT if same else WRONG))
        lines.append(line)
    return sheet(lines)
