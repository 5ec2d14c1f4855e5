"""A `hubconf.py` beside the timm folder, by which torch.hub loads it."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.config import Views
from pretrain.models.timm_network import Network

_TEXT = '''"""torch.hub.load(FOLDER, "backbone", source="local")"""

from pathlib import Path

dependencies = ["torch", "timm"]


def backbone(pretrained: bool = True, **options):
    """The backbone, as a timm model: images [n, 3, height, width] to class tokens [n, dim]."""
    import timm

    return timm.create_model(f"local-dir:{Path(__file__).resolve().parent}", pretrained=pretrained, **options)
'''


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `hubconf.py`."""
    (directory / "hubconf.py").write_text(_TEXT)
