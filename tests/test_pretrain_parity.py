"""One random state dict gives the same features as timm and transformers; official checkpoints load, both ways."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from distill.export.formats import timm_folder, transformers_folder
from distill.export.formats.compatibility import require_compatible
from infra.errors import UserError
from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import from_official, to_official
from pretrain.models.vit import VisionTransformer

DINOV2 = {"patch_size": 14, "image_size": 518}
NARROW = {"embed_dim": 48, "depth": 2, "num_heads": 3}
THEIR_SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL = {**NARROW, "patch_size": 4, "image_size": 32}
DINOV3 = {"pos_embed": "rope", "num_register_tokens": 4, "key_bias": False, "norm_eps": 1e-5}
SIZES = [(32, 32), (56, 56), (40, 24)]
DINOV2_SIZES = [(518, 518), (224, 224), (224, 140)]


def model(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(VisionTransformerConfig(**settings))
    spread = (
        2 / vit.config.embed_dim**0.5
    )  # far from the initial values, where special tokens and LayerScale hide errors
    for name, parameter in vit.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else spread)
        if name.endswith("qkv.bias") and not vit.config.key_bias:
            parameter.data.chunk(3)[1].zero_()
    return vit.eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def same(ours: VisionTransformer, pixels: Tensor, theirs: Tensor) -> None:
    """Class and patch tokens equal `theirs [B, 1 + registers + patches, dim]` to 1e-5."""
    with torch.inference_mode():
        out = ours([pixels])[0]
    torch.testing.assert_close(out.class_token, theirs[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.patch_tokens, theirs[:, 1 + ours.config.num_register_tokens :], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("vit_small_patch14_dinov2", DINOV2, (518, 518)),
        ("vit_small_patch14_dinov2", DINOV2, (224, 224)),
        ("vit_small_patch14_dinov2", DINOV2, (224, 140)),
        ("vit_small_patch14_reg4_dinov2", DINOV2 | {"num_register_tokens": 4}, (224, 224)),
        ("vit_small_patch16_dinov3_qkvb", DINOV3, (224, 224)),
        ("vit_small_patch16_dinov3_qkvb", DINOV3, (256, 256)),
        ("vit_small_patch16_dinov3_qkvb", DINOV3, (224, 128)),
    ],
)
def test_timm_by_its_own_loader_of_official_checkpoints(
    name: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    """timm converts the official key names itself, so this also proves that we write them."""
    ours = model(**settings)
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    convert = timm.models.eva.checkpoint_filter_fn
    if "dinov2" in name:
        convert = timm.models.vision_transformer.checkpoint_filter_fn
    theirs.load_state_dict(convert(to_official(ours.state_dict(), ours.config), theirs))
    pixels = images(*size)
    with torch.inference_mode():
        same(ours, pixels, theirs.forward_features(pixels))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_register_tokens": 4},
        {"ffn_layer": "swiglu", "layer_scale_init": None},
        {"pos_embed": "sincos", "init": "xavier", "layer_scale_init": None},
        DINOV3,
        DINOV3 | {"ffn_layer": "swiglu", "qkv_bias": False},
    ],
    ids=["dinov2", "registers", "swiglu", "mae", "dinov3", "dinov3-swiglu"],
)
def test_timm_by_the_published_format(settings: dict[str, Any], size: tuple[int, int]) -> None:
    ours = model(**SMALL, **settings)
    config = timm_folder.config_json(ours, Views())
    theirs = timm.create_model(config["architecture"], **config["model_args"]).eval()
    theirs.load_state_dict(timm_folder.state_dict(ours))
    pixels = images(*size)
    with torch.inference_mode():
        same(ours, pixels, theirs.forward_features(pixels))


def test_what_timm_has_not_is_not_published() -> None:
    with pytest.raises(UserError, match=r"model\.untie_cls_and_patch_norms True: timm has no such model"):
        require_compatible("timm", VisionTransformerConfig(**SMALL, untie_cls_and_patch_norms=True), [])


def transformers_agree(ours: VisionTransformer, theirs: Any, state: dict[str, Tensor], size: tuple[int, int]) -> None:
    theirs.load_state_dict(state)
    pixels = images(*size)
    with torch.inference_mode():
        same(ours, pixels, theirs.eval()(pixels).last_hidden_state)


@pytest.mark.parametrize("size", DINOV2_SIZES)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_transformers_dinov2(ffn: str, size: tuple[int, int]) -> None:
    from transformers import Dinov2Config, Dinov2Model

    ours = model(**NARROW, **DINOV2, ffn_layer=ffn, interpolation="plain")
    theirs = Dinov2Model(Dinov2Config(**THEIR_SIZE, image_size=518, patch_size=14, use_swiglu_ffn=ffn == "swiglu"))
    transformers_agree(ours, theirs, transformers_folder.state_dict(ours), size)


@pytest.mark.parametrize("size", DINOV2_SIZES)
def test_transformers_dinov2_with_registers(size: tuple[int, int]) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    ours = model(**NARROW, **DINOV2, num_register_tokens=4)
    config = Dinov2WithRegistersConfig(**THEIR_SIZE, image_size=518, patch_size=14, num_register_tokens=4)
    transformers_agree(ours, Dinov2WithRegistersModel(config), transformers_folder.state_dict(ours), size)


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (224, 128)])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_transformers_dinov3(ffn: str, size: tuple[int, int]) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    ours = model(**NARROW, **DINOV3, ffn_layer=ffn)
    config = DINOv3ViTConfig(
        **THEIR_SIZE,
        image_size=224,
        patch_size=16,
        num_register_tokens=4,
        use_gated_mlp=ffn == "swiglu",
        hidden_act="silu" if ffn == "swiglu" else "gelu",
        intermediate_size=ours.config.hidden,
    )
    transformers_agree(ours, DINOv3ViTModel(config), transformers_folder.state_dict(ours), size)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_register_tokens": 4}, {"register_tokens", "pos_embed", "blocks.1.mlp.fc1.weight", "blocks.0.ls1.gamma"}),
        ({"ffn_layer": "swiglu"}, {"cls_token", "blocks.1.mlp.w12.weight", "blocks.1.mlp.w3.bias"}),
        (
            DINOV3
            | {"ffn_layer": "swiglu", "untie_global_and_local_cls_norm": True, "untie_cls_and_patch_norms": True},
            {"storage_tokens", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "blocks.1.mlp.w1.weight",
             "blocks.1.mlp.w2.bias", "blocks.1.mlp.w3.weight", "cls_norm.weight", "local_cls_norm.bias"},
        ),
    ],
)  # fmt: skip
def test_official_names_go_both_ways(settings: dict[str, Any], expected: set[str]) -> None:
    ours = model(**SMALL, **settings)
    official = to_official(ours.state_dict(), ours.config)
    assert expected <= set(official)
    assert not any("reg_token." in name or name.startswith("reg_token") for name in official)
    back = from_official(official, ours.config)
    assert set(back) == set(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(back[name], value), name


def test_a_teacher_of_an_official_training_loads() -> None:
    ours = model(**SMALL)
    official = {
        re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): value
        for name, value in to_official(ours.state_dict(), ours.config).items()
    }
    trained = {f"backbone.{name}": value for name, value in official.items()} | {
        "dino_head.mlp.0.weight": torch.ones(1)
    }
    assert set(from_official(trained, ours.config)) == set(ours.state_dict())


def test_a_checkpoint_of_another_model_is_named() -> None:
    official = to_official(model(**SMALL).state_dict(), VisionTransformerConfig(**SMALL))
    with pytest.raises(UserError, match=r"cls_token is \[1, 1, 48\], the model settings ask for \[1, 1, 96\]"):
        from_official(official, VisionTransformerConfig(**SMALL | {"embed_dim": 96}))
    with pytest.raises(UserError, match="no place in the model settings"):
        from_official(official | {"unknown": torch.ones(1)}, VisionTransformerConfig(**SMALL))
    with pytest.raises(UserError, match="has no reg_token"):
        from_official(official, VisionTransformerConfig(**SMALL, num_register_tokens=4))


def test_published_sizes() -> None:
    """Parameters of backbones as the papers give them, in millions, without heads."""
    millions = {"tiny": 5.5, "small": 21.6, "base": 85.7, "large": 303, "giant": 1135, "so400m": 412, "7b": 6716}
    for size, expected in millions.items():
        settings: dict[str, Any] = {"size": size, "patch_size": 14 if size == "giant" else 16}
        if size in ("so400m", "7b"):
            settings |= {"pos_embed": "rope", "num_register_tokens": 4}
        with torch.device("meta"):
            vit = VisionTransformer(VisionTransformerConfig(**settings))
        assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(expected, rel=0.01), size
