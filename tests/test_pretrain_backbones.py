"""Frozen backbones of other origins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from infra.errors import UserError
from pretrain.backbones.config import (
    OfficialBackboneConfig,
    OpenClipBackboneConfig,
    PixelDescriptorConfig,
    TimmBackboneConfig,
    TorchHubBackboneConfig,
    TorchScriptBackboneConfig,
    TransformersBackboneConfig,
)
from pretrain.backbones.features import extract
from pretrain.backbones.identity import backbone_identity
from pretrain.backbones.preprocessing import center_crop
from pretrain.backbones.registry import load_backbone
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import to_official
from pretrain.models.vit import VisionTransformer
from tests.conftest import image_folder, ingest_folder, picture


def test_an_open_clip_checkpoint_embeds_as_open_clip_does(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    features = extract(load_backbone(clip), corpus, 2, "embed")
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.checkpoint)
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(picture(i)) for i in range(3)]), normalize=True)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_the_identity_of_a_clip_model_is_its_weights(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(Path(clip.checkpoint).read_bytes())
    first, second = (
        backbone_identity(each)[1]["backbone"].id for each in (clip, clip.model_copy(update={"checkpoint": str(copy)}))
    )
    assert first == second


def test_missing_and_foreign_weights_are_named(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        backbone_identity(clip.model_copy(update={"checkpoint": str(tmp_path / "nope.pt")}))
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of tiny-clip"):
        load_backbone(clip.model_copy(update={"checkpoint": str(tmp_path / "other.pt")}))


def test_plain_pixels_are_an_orthogonal_transform_of_the_image() -> None:
    backbone = load_backbone(PixelDescriptorConfig(side=16, frequencies=16, whiten=0.0))
    images = torch.from_numpy(np.stack([np.asarray(picture(i, (16, 16))) for i in range(2)]))
    ours = backbone.features(images)
    plain = (images.float() / 255 - 0.5).flatten(1)
    torch.testing.assert_close(ours @ ours.T, plain @ plain.T, rtol=1e-4, atol=1e-3)


def test_without_signs_a_negative_and_a_mirror_image_are_the_same() -> None:
    backbone = load_backbone(PixelDescriptorConfig(side=16, frequencies=16, whiten=1.0, signs=False))
    image = torch.from_numpy(np.asarray(picture(1, (16, 16))).copy())
    features = backbone.features(torch.stack([image, 255 - image, image.flip(1)]))
    torch.testing.assert_close(features[0], features[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features[0], features[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((100, 60), 64), ((30, 200), 32), ((20, 10), 32)])
def test_center_crops_have_the_asked_side(size: tuple[int, int], side: int) -> None:
    assert center_crop(picture(1, size), side).shape == (side, side, 3)


def test_an_official_checkpoint_is_a_backbone(tmp_path: Path) -> None:
    model = VisionTransformerConfig(
        embed_dim=32, depth=1, num_heads=2, patch_size=8, image_size=32, num_register_tokens=2
    )
    torch.manual_seed(0)
    vit = VisionTransformer(model).eval()
    torch.save({"teacher": to_official(vit.state_dict(), model)}, tmp_path / "teacher.pth")
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    config = OfficialBackboneConfig(
        checkpoint=str(tmp_path / "teacher.pth"), architecture=model, input_size=32, mean=(0, 0, 0), std=(1, 1, 1)
    )
    features = extract(load_backbone(config), corpus, 2, "embed")
    pixels = np.stack([center_crop(picture(i), 32) for i in range(3)])
    with torch.inference_mode():
        expected = vit([torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255])[0].class_token
    np.testing.assert_allclose(features, F.normalize(expected).numpy(), atol=1e-5)


def test_a_checkpoint_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_backbone(OfficialBackboneConfig(checkpoint=str(tmp_path / "x.pth")))
    torch.save([1, 2], tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"y\.pth: has no cls_token"):
        load_backbone(OfficialBackboneConfig(checkpoint=str(tmp_path / "y.pth")))


def test_a_timm_model_embeds_as_timm_does(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    model.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        expected = F.normalize(model(torch.stack([transform(picture(i)) for i in range(3)])))
    for file in ("model.safetensors", "model.pt"):
        config = TimmBackboneConfig(model="test_vit", checkpoint=str(tmp_path / file))
        np.testing.assert_allclose(extract(load_backbone(config), corpus, 2, "embed"), expected, atol=1e-5)
    with pytest.raises(UserError, match="no_such_model"):
        load_backbone(TimmBackboneConfig(model="no_such_model", checkpoint=str(tmp_path / "model.pt")))
    with pytest.raises(UserError, match="is it of another model"):
        load_backbone(TimmBackboneConfig(model="test_resnet", checkpoint=str(tmp_path / "model.pt")))


def test_a_transformers_folder_embeds_as_transformers_does(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    torch.manual_seed(0)
    settings = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(settings).eval()
    processor = ViTImageProcessor(size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    config = TransformersBackboneConfig(checkpoint=str(tmp_path / "model"))
    pixels = processor([picture(i) for i in range(3)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = F.normalize(model(pixels).pooler_output)
    np.testing.assert_allclose(extract(load_backbone(config), corpus, 2, "embed"), expected, atol=1e-5)
    before = backbone_identity(config)[1]["backbone"].id
    (tmp_path / "model" / "note.txt").write_text("changed")
    assert backbone_identity(config)[1]["backbone"].id != before
    with pytest.raises(UserError, match="no such folder"):
        load_backbone(TransformersBackboneConfig(checkpoint=str(tmp_path / "nowhere")))


def test_a_torchscript_module_embeds_normalized_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, stride=8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    config = TorchScriptBackboneConfig(checkpoint=str(tmp_path / "module.pt"), input_size=32)
    pixels = torch.stack([torch.from_numpy(np.array(center_crop(picture(i), 32))) for i in range(3)])
    normal = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(
        config.std
    ).view(3, 1, 1)
    with torch.inference_mode():
        expected = F.normalize(module(normal))
    np.testing.assert_allclose(extract(load_backbone(config), corpus, 2, "embed"), expected, atol=1e-5)
    (tmp_path / "module.pt").write_bytes(b"not a module")
    with pytest.raises(UserError, match="not a TorchScript module"):
        load_backbone(config)


def test_a_torch_hub_repository_embeds_by_its_own_code(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "hubconf.py").write_text(
        "import torch\n"
        "def tiny(pretrained=False):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, stride=8), torch.nn.Flatten())\n"
    )
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, stride=8), torch.nn.Flatten())
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    settings = {"repository": str(repository), "checkpoint": str(tmp_path / "weights.pth"), "input_size": 32}
    config = TorchHubBackboneConfig(model="tiny", **settings)
    same = load_backbone(TorchScriptBackboneConfig(checkpoint=str(tmp_path / "module.pt"), input_size=32))
    np.testing.assert_allclose(
        extract(load_backbone(config), corpus, 2, "embed"), extract(same, corpus, 2, "embed"), atol=1e-6
    )
    before = backbone_identity(config)[1]["code"].id
    (repository / "other.py").write_text("pass")
    assert backbone_identity(config)[1]["code"].id != before
    with pytest.raises(UserError, match="huge: Cannot find callable"):
        load_backbone(TorchHubBackboneConfig(model="huge", **settings))
    with pytest.raises(UserError, match=r"no folder with hubconf\.py"):
        load_backbone(TorchHubBackboneConfig(model="tiny", **{**settings, "repository": str(tmp_path)}))
