"""Weights that others saved, read without running anything of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from infra.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def read_weights(path: str) -> Any:
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


def load_weights(model: nn.Module, path: str) -> None:
    """Load weights; a classifier among them is left out."""
    state = read_weights(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not weights of this model: {error}".splitlines()[0]) from None
    if missing:
        raise UserError(f"{path}: has no weights {', '.join(missing[:3])}; is it of another model?")
