"""Weights that others saved, read without running anything of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from infra.errors import UserError


def read(path: str) -> Any:
    """What a `.safetensors` file or a file of torch holds, on the CPU.

    Raises:
        UserError: it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything in the readers; none runs code of it
        raise UserError(f"{path}: not a readable checkpoint: {error}".splitlines()[0]) from None
