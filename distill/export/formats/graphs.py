"""The backbone as a graph that needs no model code: ONNX, and torch.export's. Batch and size stay free."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.config import Views
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer

ONNX, EXPORTED = "model.onnx", "model.pt2"
_MOST = 1024  # patches a side


def write_onnx(backbone: Network, views: Views, directory: Path) -> None:
    """Write `model.onnx`: `pixels [n, 3, height, width]`, normalized, to `features [n, dim]`."""
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["features"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_graph(backbone, directory), dynamo=True, verbose=False, **names)
    assert program is not None
    program.model.metadata_props.clear()
    for node in program.model.graph.all_nodes():  # where each came from: paths of this machine
        node.metadata_props.clear()
        node.doc_string = None
    program.save(directory / ONNX)


def write_exported(backbone: Network, views: Views, directory: Path) -> None:
    """Write `model.pt2`, which `torch.export.load` reads."""
    torch.export.save(_graph(backbone, directory), directory / EXPORTED)


class _ClassTokens(nn.Module):
    """Of our own Vision Transformer: timm's rotary models freeze the size."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone([pixels])[0].class_token


def _model(backbone: Network, directory: Path) -> nn.Module:
    import timm

    if isinstance(backbone, VisionTransformer) and backbone.config.pos_embed == "rope":
        return _ClassTokens(backbone).eval()
    return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()


def _graph(backbone: Network, directory: Path) -> torch.export.ExportedProgram:
    """timm's model of the folder, whose code is made to be exported; sides are multiples of the patch."""
    model = _model(backbone, directory)
    patch, side = backbone.patch_size, backbone.image_size
    shape: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    example = torch.zeros(2, 3, side, side)
    if not isinstance(backbone, TimmNetwork) or backbone.any_size:
        rows, columns = (torch.export.Dim(name, min=2, max=_MOST) for name in ("rows", "columns"))
        shape |= {2: patch * rows, 3: patch * columns}
        side = max(side, 2 * patch)
        example = torch.zeros(2, 3, side, side + patch)  # of different sides, or they would count as one
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=(shape,))
    for node in program.graph.nodes:  # where each came from: paths of this machine, and numbers of this process
        for name in ("stack_trace", "from_node", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(name, None)
    bounds = sorted(program.range_constraints.items(), key=lambda pair: str(pair[0]))  # they come from a set
    program.range_constraints.clear()
    program.range_constraints.update(bounds)
    return program
