"""The Vision Transformer: packed equals separate, timm says the same, backends agree."""

from __future__ import annotations

import pytest
import timm
import torch

from distill import timm_format
from infra.errors import UserError
from pretrain.data.config import Views
from pretrain.models.attention import attention
from pretrain.models.blocks import _subset
from pretrain.models.config import HeadConfig, VisionTransformerConfig
from pretrain.models.heads import PrototypeHead
from pretrain.models.vit import VisionTransformer

CONFIG = VisionTransformerConfig(dim=48, depth=3, heads=3, patch_size=4, image_size=32, layer_scale=0.5)


def model(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(CONFIG.model_copy(update=changes))
    for parameter in vit.parameters():  # far from the initial values, where special tokens and LayerScale hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    return vit.eval()


def images(n: int, side: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("registers", [0, 4])
def test_crops_packed_together_give_what_they_give_alone(registers: int) -> None:
    vit = model(registers=registers)
    groups = [images(3, 32), images(5, 16), images(2, 24)]
    masks = [torch.rand(3, 64) < 0.3, None, None]
    together = vit(groups, masks)
    alone = [vit([group], [mask])[0] for group, mask in zip(groups, masks, strict=True)]
    loss_together = sum(out.class_token.square().sum() + out.patch_tokens.square().sum() for out in together)
    gradient_together = torch.autograd.grad(loss_together, vit.parameters(), allow_unused=True)
    loss_alone = sum(out.class_token.square().sum() + out.patch_tokens.square().sum() for out in alone)
    gradient_alone = torch.autograd.grad(loss_alone, vit.parameters(), allow_unused=True)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.class_token, b.class_token)
        torch.testing.assert_close(a.patch_tokens, b.patch_tokens)
    for a, b in zip(gradient_together, gradient_alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("side", [32, 48])
def test_timm_gives_the_same_features(registers: int, side: int) -> None:
    ours = model(registers=registers)
    config = timm_format.config_json(ours, Views())
    theirs = timm.create_model(config["architecture"], **config["model_args"]).eval()
    theirs.load_state_dict(timm_format.state_dict(ours))
    pixels = images(4, side)
    with torch.inference_mode():
        features = theirs.forward_features(pixels)
        out = ours([pixels])[0]
        torch.testing.assert_close(out.class_token, theirs(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.patch_tokens, features[:, 1 + registers :], rtol=0, atol=1e-5)


def test_attention_backends_agree() -> None:
    qkv = torch.randn(2 * 5 + 3 * 7, 3, 4, 8)
    shapes = [(2, 5), (3, 7)]
    torch.testing.assert_close(attention("sdpa")(qkv, shapes), attention("reference")(qkv, shapes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_agrees_on_cuda() -> None:
    pytest.importorskip("xformers")
    qkv = torch.randn(31, 3, 4, 32, device="cuda", dtype=torch.float16)
    shapes = [(2, 5), (3, 7)]
    torch.testing.assert_close(
        attention("xformers")(qkv, shapes), attention("reference")(qkv, shapes), rtol=1e-2, atol=1e-2
    )


def test_a_missing_backend_is_named_when_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    with pytest.raises(UserError, match="xformers is not installed"):
        VisionTransformer(CONFIG.model_copy(update={"attention": "xformers"}))


def test_the_student_cannot_see_masked_patches() -> None:
    vit = model()
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 10] = True
    first = images(2, 32)
    second = first.clone()
    second[:, :, 4:8, 8:12] = 0  # patch 10 of a grid of 8
    torch.testing.assert_close(vit([first], [mask])[0].class_token, vit([second], [mask])[0].class_token)
    assert not torch.allclose(vit([first])[0].class_token, vit([second])[0].class_token)


def test_stochastic_depth_skips_the_asked_share_and_keeps_the_mean() -> None:
    rows, kept, factors = _subset([(10, 5), (4, 3)], 0.3, torch.device("cpu"))
    assert kept == [(7, 5), (2, 3)]
    assert len(rows.unique()) == len(rows) == 7 * 5 + 2 * 3
    assert factors[0].item() == pytest.approx(10 / 7)
    assert factors[-1].item() == pytest.approx(4 / 2)
    vit = model(drop_path=0.5).train()
    assert not torch.allclose(vit([images(4, 32)])[0].class_token, vit([images(4, 32)])[0].class_token)
    vit.eval()
    torch.testing.assert_close(vit([images(4, 32)])[0].class_token, vit([images(4, 32)])[0].class_token)


def test_head_logits_are_cosines_at_first() -> None:
    head = PrototypeHead(16, HeadConfig(hidden=32, bottleneck=8, prototypes=20))
    logits = head(torch.randn(50, 16))
    assert logits.shape == (50, 20)
    assert logits.abs().max() <= 1 + 1e-5
