"""Patch tokens of backbones of every origin, against their own libraries; names and fetched weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

import pretrain
from infra.errors import UserError
from pretrain.backbones import spec, weight_files
from pretrain.backbones.base import Backbone, TokenBackbone, require_tokens
from pretrain.backbones.config import (
    CheckpointBackboneConfig,
    OpenClipBackboneConfig,
    PixelDescriptorConfig,
    TimmBackboneConfig,
    TorchHubBackboneConfig,
    TransformersBackboneConfig,
)
from pretrain.backbones.registry import load_backbone
from tests.conftest import SyntheticCorpora, picture
from tests.test_pretrain_training import config


def images(side: int, width: int | None = None) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture(i, (width or side, side))) for i in range(2)]))


def normalize_pixels(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def tokened(backbone: Backbone) -> TokenBackbone:
    return require_tokens(backbone, "test")


def test_a_checkpoints_layers_are_its_own(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    trained = pretrain.run(config(synthetic.seed, tmp_path / "teacher", schedule={"steps": 1, "global_batch_size": 8}))
    backbone = tokened(load_backbone(CheckpointBackboneConfig(url=trained.url)))
    vectors, layers = backbone.layers(backbone.get_normalized_layers(images(32, 48)), 5)
    assert [each.patch_tokens.shape for each in layers] == [(2, 4, 6, 32)] * 2  # two blocks are all there are
    torch.testing.assert_close(vectors, layers[-1].class_token)
    torch.testing.assert_close(vectors, backbone.features(images(32, 48)))
    assert (backbone.side, backbone.patch, backbone.any_size) == (32, 8, True)


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "test_resnet", "test_convnext"])
def test_timms_layers_are_timms(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = tokened(load_backbone(TimmBackboneConfig(model=name, checkpoint=str(tmp_path / "model.safetensors"))))
    pixels = images(backbone.side)
    vectors, layers = backbone.layers(backbone.get_normalized_layers(pixels), 1)
    data = timm.data.resolve_model_data_config(model)
    with torch.inference_mode():
        batch = normalize_pixels(pixels, data["mean"], data["std"])
        torch.testing.assert_close(vectors, model(batch), atol=1e-5, rtol=1e-4)
        found = model.forward_features(batch)
    if name.startswith("test_vit"):
        prefix = model.num_prefix_tokens
        torch.testing.assert_close(layers[-1].class_token, found[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layers[-1].patch_tokens.flatten(1, 2), found[:, prefix:], atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(layers[-1].patch_tokens.permute(0, 3, 1, 2), found, atol=1e-5, rtol=1e-4)
    assert layers[-1].patch_tokens.shape[1] == backbone.side // backbone.patch
    if backbone.any_size:
        wide = images(backbone.side, 2 * backbone.side)
        grid = backbone.layers(backbone.get_normalized_layers(wide), 1)[1][-1].patch_tokens.shape[1:3]
        assert grid == (backbone.side // backbone.patch, 2 * backbone.side // backbone.patch)


def test_open_clips_layers_are_open_clips(clip: OpenClipBackboneConfig) -> None:
    backbone = tokened(load_backbone(clip))
    pixels = images(32)
    vectors, layers = backbone.layers(backbone.get_normalized_layers(pixels), 1)
    model, _, _ = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.checkpoint)
    batch = normalize_pixels(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.inference_mode():
        torch.testing.assert_close(vectors, model.eval().encode_image(batch), atol=1e-5, rtol=1e-4)
    assert layers[-1].patch_tokens.shape == (2, 4, 4, 64)
    assert not backbone.any_size


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "vit", "clip", "siglip", "convnext"])
def test_layers_of_transformers_are_its_hidden_states(family: str, tmp_path: Path) -> None:
    import transformers as hf

    torch.manual_seed(0)
    if family in ("clip", "siglip"):
        from tests.transformers_pairs import saved

        model = saved(family, tmp_path / "model")[0].vision_model
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        made = {
            "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**small, image_size=32, patch_size=8)),
            "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(**small, image_size=32, patch_size=8, num_register_tokens=3)
            ),
            "vit": lambda: hf.ViTModel(hf.ViTConfig(**small, image_size=32, patch_size=8)),
            "convnext": lambda: hf.ConvNextModel(
                hf.ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], image_size=32, patch_size=4)
            ),
        }
        model = made[family]().eval()
        model.save_pretrained(tmp_path / "model")
        hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    backbone = tokened(load_backbone(TransformersBackboneConfig(checkpoint=str(tmp_path / "model"))))
    batch = backbone.get_normalized_layers(images(32))
    vectors, layers = backbone.layers(batch, 2)
    with torch.inference_mode():
        out = model.eval()(pixel_values=batch, output_hidden_states=True)
    torch.testing.assert_close(vectors, out.pooler_output.flatten(1), atol=1e-5, rtol=1e-4)
    if family == "convnext":
        torch.testing.assert_close(layers[-1].patch_tokens.permute(0, 3, 1, 2), out.last_hidden_state)
        return
    prefix = {"dinov2_with_registers": 4, "siglip": 0}.get(family, 1)
    assert layers[-1].patch_tokens.shape == (2, 4, 4, 16)
    expected = out.last_hidden_state[:, prefix:]
    if family == "clip":
        with torch.inference_mode():
            expected = model.post_layernorm(expected)  # transformers norms the class token alone
    torch.testing.assert_close(layers[-1].patch_tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)


HUB = """
import torch

class Tiny(torch.nn.Module):
    patch_size = 8

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, x):
        return self.proj(x).flatten(2).mean(-1)

    def get_intermediate_layers(self, x, n, reshape, return_class_token, norm):
        grid = self.proj(x)
        return [(grid, grid.flatten(2).mean(-1))] * n

def tiny(pretrained=False):
    return Tiny()
"""


def test_a_hub_model_with_dinov2s_interface_has_tokens(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(HUB)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 5, 8, stride=8)
    torch.save({f"proj.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "w.pth")
    name = f"torch_hub:{tmp_path}:tiny@{tmp_path / 'w.pth'}"
    settings = TorchHubBackboneConfig(**spec.parse_backbone(name), input_size=32)
    backbone = tokened(load_backbone(settings))
    vectors, layers = backbone.layers(backbone.get_normalized_layers(images(32)), 3)
    with torch.inference_mode():
        expected = layer(normalize_pixels(images(32), settings.mean, settings.std))
    torch.testing.assert_close(layers[0].patch_tokens.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors, expected.flatten(2).mean(-1), atol=1e-5, rtol=1e-4)
    assert len(layers) == 3


def test_the_side_is_what_the_processor_makes(tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    assert tokened(load_backbone(TransformersBackboneConfig(checkpoint=str(tmp_path)))).side == 28


def test_networks_of_few_stages_give_all_they_have(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = tokened(
        load_backbone(TimmBackboneConfig(model="test_resnet", checkpoint=str(tmp_path / "model.safetensors")))
    )
    assert len(backbone.layers(backbone.get_normalized_layers(images(backbone.side)), 99)[1]) == len(model.feature_info)
    assert len(tokened(load_backbone(clip)).layers(torch.zeros(1, 3, 32, 32), 99)[1]) == 1


def test_swin_merges_patches_and_still_has_tokens(tmp_path: Path) -> None:
    import transformers as hf

    settings = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    hf.SwinModel(settings).save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone = tokened(load_backbone(TransformersBackboneConfig(checkpoint=str(tmp_path))))
    _, layers = backbone.layers(backbone.get_normalized_layers(images(32)), 1)
    assert layers[-1].patch_tokens.shape == (2, 4, 4, 16)


def test_weights_in_a_file_are_prepared_for_as_the_models_tags_say(clip: OpenClipBackboneConfig) -> None:
    from pretrain.backbones.identity import backbone_identity

    siglip = weight_files.read_preprocessing(OpenClipBackboneConfig(model="ViT-B-16-SigLIP", checkpoint="w.pt"))
    assert (siglip["mean"], siglip["resize_mode"]) == ([0.5, 0.5, 0.5], "squash")
    assert weight_files.read_preprocessing(clip)["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert weight_files.read_preprocessing(OpenClipBackboneConfig(model="ViT-B-32", checkpoint="openai"))["quick_gelu"]
    assert backbone_identity(clip)[0]["preprocessing"] == weight_files.read_preprocessing(clip)


def test_tokens_before_the_norm_are_another_matter(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    trained = pretrain.run(config(synthetic.seed, tmp_path / "teacher", schedule={"steps": 1, "global_batch_size": 8}))
    backbone = tokened(load_backbone(CheckpointBackboneConfig(url=trained.url)))
    (vector, normed), (same, raw) = (backbone.layers(images(32), 1, norm=norm) for norm in (True, False))
    torch.testing.assert_close(vector, same)
    assert not torch.allclose(normed[0].patch_tokens, raw[0].patch_tokens)


def test_who_has_no_patch_tokens_is_told_so() -> None:
    with pytest.raises(UserError, match="segmentation: this backbone gives one vector an image"):
        require_tokens(load_backbone(PixelDescriptorConfig()), "segmentation")


def test_backbones_are_named_by_one_word(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    trained = pretrain.run(config(synthetic.seed, tmp_path / "teacher", schedule={"steps": 1, "global_batch_size": 8}))
    assert spec.parse_backbone(trained.url) == {"kind": "checkpoint", "url": trained.url}
    assert spec.parse_backbone("timm:resnet18") == {"kind": "timm", "model": "resnet18", "checkpoint": "pretrained"}
    assert spec.parse_backbone("timm:resnet18@w.pt")["checkpoint"] == "w.pt"
    assert spec.parse_backbone("open_clip:ViT-B-32/openai") == {
        "kind": "open_clip",
        "model": "ViT-B-32",
        "checkpoint": "openai",
    }
    assert spec.parse_backbone("torchscript:a:b.pt") == {"kind": "torchscript", "checkpoint": "a:b.pt"}
    for folder, content, kind in (("t", {"model_type": "vit"}, "transformers"), ("l", {"architecture": "x"}, "timm")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
        assert spec.parse_backbone(str(tmp_path / folder))["kind"] == kind
    (tmp_path / "t" / "config.json").write_text("[]")
    for word, message in (
        (str(tmp_path / "t"), "neither timm's nor"),
        ("open_clip:ViT-B-32", "say which weights"),
        ("torch_hub:x", "say which entry point"),
        (synthetic.seed, "no backbone by this name"),
    ):
        with pytest.raises(UserError, match=message):
            spec.parse_backbone(word)


def test_weights_that_are_named_come_from_their_library(
    clip: OpenClipBackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No network is used: the libraries' own fetching is replaced."""
    import huggingface_hub
    from open_clip import pretrained as tags

    asked: list[tuple[object, ...]] = []

    def fetch(*arguments: object, **options: object) -> str:
        asked.append(arguments)
        return str(tmp_path / "fetched")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(tags, "download_pretrained", fetch)
    assert (
        weight_files.resolve_weights(TimmBackboneConfig(model="vit_tiny_patch16_224", checkpoint="pretrained")).name
        == "fetched"
    )
    assert (
        weight_files.resolve_weights(TransformersBackboneConfig(checkpoint="facebook/dinov2-small")).name == "fetched"
    )
    assert weight_files.resolve_weights(OpenClipBackboneConfig(model="ViT-B-32", checkpoint="openai")).name == "fetched"
    assert asked[0][0].startswith("timm/vit_tiny_patch16_224")  # type: ignore[attr-defined]
    assert asked[1] == ("facebook/dinov2-small",)
    assert weight_files.resolve_weights(clip) == Path(clip.checkpoint)

    def fail(*arguments: object, **options: object) -> str:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    caplog.clear()
    with pytest.raises(UserError, match=r"its weights cannot be fetched \(no route\)"):
        weight_files.resolve_weights(TransformersBackboneConfig(checkpoint="facebook/dinov2-small"))
    assert not caplog.records
    with pytest.raises(UserError, match="timm publishes no weights for it"):
        weight_files.resolve_weights(TimmBackboneConfig(model="test_no_such", checkpoint="pretrained"))
