"""Losses and their gradients against lightly, open_clip and transformers."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.models import positions
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import Outputs, TeacherOutputs
from pretrain.objectives.build import build_objectives
from pretrain.objectives.config import (
    ClipConfig,
    DinoConfig,
    GramConfig,
    IbotConfig,
    KoleoConfig,
    MaeConfig,
    SiglipConfig,
    SimmimConfig,
    TextTower,
)
from pretrain.objectives.dino import Dino
from pretrain.objectives.gram import gram_loss
from pretrain.objectives.ibot import Ibot
from pretrain.objectives.image_text import Clip, Siglip, tokenizer
from pretrain.objectives.koleo import koleo
from pretrain.objectives.mae import Mae, patchify
from tests.test_pretrain_objectives import HEAD, LOCALS, MODEL, B, K, made, outputs_of, places

TEXT = TextTower(context=8, width=16, num_heads=2, layers=1)


def close(ours: Tensor, theirs: Tensor, by: list[Tensor]) -> None:
    """Values and gradients agree to 1e-5."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss, by, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_dino_is_lightlys() -> None:
    from lightly.loss import DINOLoss

    dino = made(Dino, DinoConfig(head=HEAD, centering="softmax"))
    theirs = DINOLoss(output_dim=K, student_temp=0.1, center_momentum=0.9)
    empty = torch.empty(0)
    batch = Batch(empty, empty, empty, empty, empty, empty, empty, torch.arange(B), torch.empty(0), empty)
    for _ in range(3):  # the center moves from step to step
        dino.targets.begin_step()
        outputs = outputs_of()
        assert outputs.student_locals is not None
        tokens = [outputs.masked_student_globals.class_token, outputs.student_locals.class_token]
        teacher = dino.teacher_head(outputs.teacher_globals.class_token).detach().chunk(2)
        students = [*dino.head(tokens[0]).chunk(2), *dino.head(tokens[1]).chunk(LOCALS)]
        expected = theirs(list(teacher), students, teacher_temp=0.05)
        terms = dino(outputs, batch, 0.05)
        close(terms["dino_global"] + terms["dino_local"], expected, tokens)


def test_ibot_is_lightlys() -> None:
    from lightly.loss import IBOTPatchLoss

    ibot = made(Ibot, IbotConfig(head=HEAD, centering="softmax", normalize_by="all"))
    theirs = IBOTPatchLoss(output_dim=K, student_temp=0.1)
    masks = torch.rand(2 * B, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    empty = torch.empty(0)
    batch = Batch(empty, empty, empty, empty, masks, empty, empty, torch.arange(B), torch.empty(0), places(masks))
    for _ in range(3):
        ibot.targets.begin_step()
        outputs = outputs_of()
        teacher = ibot.teacher_head(outputs.teacher_globals.patch_tokens[masks]).detach()
        student = ibot.head(outputs.masked_student_globals.patch_tokens[masks])
        expected = theirs(teacher, student, masks.unflatten(1, (3, 3)), teacher_temp=0.05)
        close(ibot(outputs, batch, 0.05)["ibot"], expected, [outputs.masked_student_globals.patch_tokens])


def test_koleo_is_lightlys() -> None:
    from lightly.loss import KoLeoLoss

    x = torch.randn(12, 16, requires_grad=True)
    close(koleo(x), KoLeoLoss()(x), [x])


def pairs(n: int = 6, dim: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return image, text


def test_clip_is_open_clips() -> None:
    from open_clip.loss import ClipLoss

    clip = made(Clip, ClipConfig(embed_dim=16, text=TEXT))
    assert clip.scale().item() == pytest.approx(1 / 0.07)
    image, text = pairs()
    expected = ClipLoss()(image, text, clip.logit_scale.exp())
    close(clip.contrast(image, text)["clip"], expected, [image, text, clip.logit_scale])


def test_clips_scale_stays_below_100_and_can_fall_again() -> None:
    clip = made(Clip, ClipConfig(embed_dim=16, text=TEXT))
    clip.logit_scale.data.fill_(math.log(500))
    assert clip.scale().item() == pytest.approx(100)
    (gradient,) = torch.autograd.grad(clip.scale(), clip.logit_scale)
    assert gradient.item() > 0


def test_siglip_is_open_clips() -> None:
    from open_clip.loss import SigLipLoss

    siglip = made(Siglip, SiglipConfig(embed_dim=16, text=TEXT))
    image, text = pairs()
    expected = SigLipLoss()(image, text, siglip.logit_scale.exp(), siglip.logit_bias)
    close(siglip.contrast(image, text)["siglip"], expected, [image, text, siglip.logit_scale, siglip.logit_bias])


def test_captions_become_open_clips_tokens() -> None:
    import open_clip

    captions = ["a red apple", "naïve 🍎 café"]
    assert torch.equal(tokenizer(TextTower())(captions), open_clip.tokenize(captions))


def mae_names(state: dict[str, Tensor], decoder: bool) -> dict[str, Tensor]:
    """Our names in transformers' masked autoencoder."""
    out = {}
    for name, value in state.items():
        block = "decoder.decoder_layers" if decoder else "vit.layers"
        name = re.sub(r"^blocks", block, name).replace("attn.proj.", "attention.o_proj.")
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        if "attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = chunk
        else:
            out[name] = value
    renamed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
    }
    if decoder:
        renamed = {
            "embed.weight": "decoder.decoder_embed.weight",
            "embed.bias": "decoder.decoder_embed.bias",
            "mask_token": "decoder.mask_token",
            "pos_embed": "decoder.decoder_pos_embed",
            "norm.weight": "decoder.decoder_norm.weight",
            "norm.bias": "decoder.decoder_norm.bias",
            "pixels.weight": "decoder.decoder_pred.weight",
            "pixels.bias": "decoder.decoder_pred.bias",
        }
    return {renamed.get(name, name): value for name, value in out.items()}


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_is_transformers(normalize: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    settings = VisionTransformerConfig(
        embed_dim=48,
        depth=2,
        num_heads=3,
        patch_size=8,
        image_size=32,
        layer_scale_init=None,
        pos_embed="sincos",
        init="xavier",
    )
    vit = VisionTransformer(settings)
    mae = Mae(MaeConfig(embed_dim=32, depth=1, num_heads=2, normalize_pixels=normalize), settings, settings)
    config = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, norm_pix_loss=normalize, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config)
    state = {name: value for name, value in vit.state_dict().items() if name != "mask_token"}
    theirs.load_state_dict(mae_names(state, decoder=False) | mae_names(mae.decoder.state_dict(), decoder=True))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    expected = theirs(images, noise=noise)
    outputs = Outputs(vit, TeacherOutputs({}), images, None, None, None)
    loss, predicted = mae.loss(outputs, images, noise)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(predicted, expected.logits, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    ours, other = vit.patch_embed.proj.weight.grad, theirs.vit.embeddings.patch_embeddings.projection.weight.grad
    assert ours is not None
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_sincos_positions_hold_the_column_first() -> None:
    table = positions.sincos(3, 8)[0]
    assert table[0].abs().max() == 0
    for row in range(3):
        for column in range(3):
            angles = [place / 10000 ** (i / 2) for place in (column, row) for i in range(2)]
            expected = [f(a) for half in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in half]
            torch.testing.assert_close(table[1 + 3 * row + column], torch.tensor(expected))


def test_maes_loss_does_not_see_predictions_on_visible_patches() -> None:
    settings = MODEL.model_copy(update={"pos_embed": "sincos"})
    vit = VisionTransformer(settings)
    mae = Mae(MaeConfig(embed_dim=16, depth=1, num_heads=2, mask_ratio=0.5), settings, settings)
    images, noise = torch.randn(2, 3, 12, 12), torch.rand(2, 9)
    loss, predicted = mae.loss(Outputs(vit, TeacherOutputs({}), images, None, None, None), images, noise)
    assert predicted.shape == patchify(images, 4).shape == (2, 9, 48)
    (gradient,) = torch.autograd.grad(loss, predicted)
    hidden = noise.argsort(1).argsort(1) >= 4
    assert torch.equal(gradient.abs().sum(-1) > 0, hidden)


def test_patchify_puts_pixels_row_by_row() -> None:
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert torch.equal(patches[1, 2].view(4, 4, 3), images[1, :, 4:8, 0:4].permute(1, 2, 0))


def test_gram_is_zero_for_turned_features_and_else_brute_force() -> None:
    student, anchor = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    assert gram_loss(student, 3 * student @ turn).item() == pytest.approx(0, abs=1e-10)
    errors = [
        (F.cosine_similarity(s[i], s[j], dim=0) - F.cosine_similarity(a[i], a[j], dim=0)) ** 2
        for s, a in zip(student, anchor, strict=True)
        for i in range(5)
        for j in range(5)
    ]
    torch.testing.assert_close(gram_loss(student, anchor), torch.stack(errors).mean())


def test_gram_is_computed_in_float32() -> None:
    student, anchor = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    exact = gram_loss(student, anchor)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_loss(student, anchor), exact)


def test_gram_follows_its_schedule() -> None:
    gram = build_objectives([GramConfig(start_step=2, update_every=3, max_updates=1)], MODEL, MODEL)["gram"]
    teacher = VisionTransformer(MODEL)
    outputs = outputs_of()
    batch = Batch(*[torch.empty(0)] * 7, torch.arange(B), *[torch.empty(0)] * 2)
    seen = []
    for step in range(9):
        teacher.cls_token.data.fill_(step)
        for source, copy in gram.begin_step(step, teacher):
            copy.load_state_dict(source.state_dict())
        terms = gram(outputs, batch, 0.05)
        seen.append(gram.anchor.cls_token[0, 0, 0].item() if terms else None)  # type: ignore[union-attr]
    assert seen == [None, None, 2, 2, 2, 5, 5, 5, 5]


def test_tied_ibot_uses_dinos_heads_and_saves_them_once() -> None:
    built = build_objectives([IbotConfig(share_head=True), DinoConfig(head=HEAD)], MODEL, MODEL)
    dino, ibot = built["dino"], built["ibot"]
    assert ibot.head is dino.head  # type: ignore[union-attr]
    assert list(ibot.state_dict()) == ["targets.center", "targets.total", "targets.count"]
    assert not list(ibot.head_pairs())
    masks = torch.rand(2 * B, 9) < 0.4
    batch = Batch(
        *[torch.empty(0)] * 4, masks, torch.empty(0), torch.empty(0), torch.arange(B), torch.empty(0), places(masks)
    )
    assert torch.isfinite(ibot(outputs_of(), batch, 0.05)["ibot"])


def test_simmim_counts_masked_pixels_alone() -> None:
    simmim = build_objectives([SimmimConfig()], MODEL, MODEL)["simmim"]
    masks = torch.zeros(2 * B, 9, dtype=torch.bool)
    masks[0, 4] = True
    batch = Batch(
        *[torch.empty(0)] * 4, masks, torch.empty(0), torch.empty(0), torch.arange(B), torch.empty(0), places(masks)
    )
    outputs = outputs_of()
    before = simmim(outputs, batch, 0.05)["simmim"]
    outputs.images[1:] = 100
    outputs.images[0, :, :4] = 100
    torch.testing.assert_close(simmim(outputs, batch, 0.05)["simmim"], before)
    outputs.images[0, :, 4:8, 4:8] += 1
    assert simmim(outputs, batch, 0.05)["simmim"] != before


def test_distributed_koleo_alone_is_koleo() -> None:
    x = torch.randn(8, 4)
    assert torch.equal(koleo(x, distributed=True), koleo(x))
    assert KoleoConfig().distributed is False
