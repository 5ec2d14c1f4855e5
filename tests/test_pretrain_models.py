"""The Vision Transformer: packed equals separate, timm says the same, backends agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saved_tensors import kept_for_backward
from distill.export.formats import timm_folder
from infra.errors import UserError
from pretrain.data.config import Views
from pretrain.models.attention import get_attention
from pretrain.models.blocks import _sample_subset, _swiglu
from pretrain.models.config import Checkpointing, HeadConfig, Interpolation, RopeConfig, VisionTransformerConfig
from pretrain.models.execution import Execution
from pretrain.models.heads import DINOHead
from pretrain.models.linear import normed_linear, scaled_linear
from pretrain.models.positions import resample_pos_embed
from pretrain.models.rope import AxialRope
from pretrain.models.vit import VisionTransformer

CONFIG = VisionTransformerConfig(embed_dim=48, depth=3, num_heads=3, patch_size=4, image_size=32, layer_scale_init=0.5)


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
    vit = model(num_register_tokens=registers)
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
    ours = model(num_register_tokens=registers)
    config = timm_folder.config_json(ours, Views())
    theirs = timm.create_model(config["architecture"], **config["model_args"]).eval()
    theirs.load_state_dict(timm_folder.state_dict(ours))
    pixels = images(4, side)
    with torch.inference_mode():
        features = theirs.forward_features(pixels)
        out = ours([pixels])[0]
        torch.testing.assert_close(out.class_token, theirs(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.patch_tokens, features[:, 1 + registers :], rtol=0, atol=1e-5)


def test_attention_backends_agree() -> None:
    qkv = torch.randn(2 * 5 + 3 * 7, 3, 4, 8)
    shapes = [(2, 5), (3, 7)]
    torch.testing.assert_close(get_attention("sdpa")(qkv, shapes), get_attention("reference")(qkv, shapes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_agrees_on_cuda() -> None:
    pytest.importorskip("xformers")
    qkv = torch.randn(31, 3, 4, 32, device="cuda", dtype=torch.float16)
    shapes = [(2, 5), (3, 7)]
    torch.testing.assert_close(
        get_attention("xformers")(qkv, shapes), get_attention("reference")(qkv, shapes), rtol=1e-2, atol=1e-2
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
    rows, kept, factors = _sample_subset([(10, 5), (4, 3)], 0.3, torch.device("cpu"))
    assert kept == [(7, 5), (2, 3)]
    assert len(rows.unique()) == len(rows) == 7 * 5 + 2 * 3
    assert factors[0].item() == pytest.approx(10 / 7)
    assert factors[-1].item() == pytest.approx(4 / 2)
    vit = model(drop_path_rate=0.5).train()
    assert not torch.allclose(vit([images(4, 32)])[0].class_token, vit([images(4, 32)])[0].class_token)
    vit.eval()
    torch.testing.assert_close(vit([images(4, 32)])[0].class_token, vit([images(4, 32)])[0].class_token)


def test_head_logits_are_cosines_at_first() -> None:
    head = DINOHead(16, HeadConfig(hidden_dim=32, bottleneck_dim=8, num_prototypes=20))
    logits = head(torch.randn(50, 16))
    assert logits.shape == (50, 20)
    assert logits.abs().max() <= 1 + 1e-5


GROUPS = [(5, 32), (7, 16)]


def gradients(vit: VisionTransformer, execution: Execution) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a training pass whose stochastic depth always falls alike."""
    vit.execution = execution
    torch.manual_seed(7)
    out = vit.train()([images(n, side) for n, side in GROUPS])
    loss = sum(each.class_token.square().mean() + each.patch_tokens.square().mean() for each in out)
    assert isinstance(loss, torch.Tensor)
    trained = [parameter for name, parameter in vit.named_parameters() if name != "mask_token"]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


PARTS = [
    {"drop_path_rate": 0.3},
    {
        "pos_embed": "rope",
        "ffn_layer": "swiglu",
        "key_bias": False,
        "rope": RopeConfig(rescale=2.0, shift=0.1, jitter=1.5),
    },
]


@pytest.mark.parametrize("parts", PARTS, ids=["dinov2", "dinov3"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(checkpointing: Checkpointing, parts: dict[str, object]) -> None:
    vit = model(**parts)
    loss, expected = gradients(vit, Execution())
    again, found = gradients(vit, Execution(checkpointing))
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_compiled_blocks_change_nothing(drop_path: float) -> None:
    vit = model(drop_path_rate=drop_path)
    loss, expected = gradients(vit, Execution())
    again, found = gradients(vit, Execution(compile=True))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def saved_bytes(vit: VisionTransformer, execution: Execution) -> int:
    vit.execution = execution
    with kept_for_backward(vit) as kept:
        out = vit.train()([images(n, side) for n, side in GROUPS])
    assert out[0].class_token.requires_grad
    return kept.bytes


def test_activation_checkpointing_keeps_less() -> None:
    vit = model(depth=6)
    assert saved_bytes(vit, Execution("full")) < saved_bytes(vit, Execution()) / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, F.gelu, _swiglu])
def test_lean_layers_are_the_plain_ones(activation: Callable[..., torch.Tensor] | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, first = torch.nn.LayerNorm(8), torch.nn.Linear(8, 24)
    second = torch.nn.Linear(12 if activation is _swiglu else 24, 8)
    scale = torch.nn.Parameter(torch.randn(8))
    x = torch.randn(10, 8, requires_grad=True)
    leaves = [x, scale, *norm.parameters(), *first.parameters(), *second.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = scaled_linear(normed_linear(x, norm, first, first.bias), second, scale, activation)
        hidden = first(norm(x))
        plain = second(hidden if activation is None else activation(hidden)) * scale
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    torch.testing.assert_close(ours.float(), plain.float(), **tolerance)
    weights = torch.randn(10, 8)
    for a, b in zip(
        torch.autograd.grad((ours.float() * weights).sum(), leaves),
        torch.autograd.grad((plain.float() * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


def test_keys_without_a_bias_stay_without() -> None:
    """With rotary positions, where a bias of the keys does not cancel in the softmax."""
    for key_bias in (False, True):
        vit = model(pos_embed="rope", key_bias=key_bias)
        before = vit([images(2, 32)])[0].class_token
        for block in vit.blocks:
            block.attn.qkv.bias.data.chunk(3)[1].fill_(5.0)  # type: ignore[union-attr]
        assert torch.allclose(vit([images(2, 32)])[0].class_token, before) != key_bias


def test_rope_augments_in_training_alone() -> None:
    rope = AxialRope(RopeConfig(shift=0.2, jitter=1.2, rescale=2.0), 16)
    assert torch.equal(rope.eval()(3, 4, 1)[0], rope(3, 4, 1)[0])
    assert not torch.equal(rope.train()(3, 4, 1)[0], rope(3, 4, 1)[0])
    cosines, sines = rope.eval()(3, 4, 5)
    assert cosines.shape == sines.shape == (17, 16)
    assert torch.equal(cosines[:5], torch.ones(5, 16))


def test_norms_of_their_own() -> None:
    """Class tokens of global and of local crops have norms of their own, the latter in training only."""
    vit = model(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    assert vit.cls_norm is not None
    assert vit.local_cls_norm is not None
    groups = [images(2, 32), images(3, 16)]
    before = vit.train()(groups)
    vit.local_cls_norm.bias.data += 1
    after = vit(groups)
    torch.testing.assert_close(after[1].class_token, before[1].class_token + 1)
    torch.testing.assert_close(after[0].class_token, before[0].class_token)
    vit.cls_norm.bias.data += 1
    torch.testing.assert_close(vit(groups)[0].class_token, before[0].class_token + 1)
    torch.testing.assert_close(vit(groups)[0].patch_tokens, before[0].patch_tokens)


@pytest.mark.parametrize("how", ["antialias", "offset", "plain"])
def test_positions_are_resized_as_asked(how: Interpolation) -> None:
    table = torch.randn(1, 64, 6)
    assert resample_pos_embed(table, (8, 8), (8, 8), how) is table
    out = resample_pos_embed(table, (8, 8), (5, 11), how)
    assert out.shape == (1, 55, 6)
    flat = torch.full((1, 64, 6), 0.3)
    torch.testing.assert_close(resample_pos_embed(flat, (8, 8), (5, 11), how), torch.full((1, 55, 6), 0.3))


def test_stochastic_depth_saves_its_share_of_the_work() -> None:
    """DINOv2's way at a rate of 0.3 leaves out 28 % of a block's FLOPs and more."""
    flops = {}
    for rate in (0.0, 0.3):
        vit = model(drop_path_rate=rate).train()
        with FlopCounterMode(display=False) as counter:
            vit([images(10, 32), images(20, 16)])
        flops[rate] = counter.get_total_flops()
    assert flops[0.3] < 0.73 * flops[0.0]
