"""Losses against brute force and against identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.models.config import HeadConfig, VisionTransformerConfig
from pretrain.models.vit import Features, VisionTransformer
from pretrain.objectives.base import TEACHER, Objective, Outputs, TeacherOutputs
from pretrain.objectives.centering import TeacherTargets, cross_entropy, sinkhorn_knopp
from pretrain.objectives.config import DinoConfig, IbotConfig, KoleoConfig
from pretrain.objectives.dino import Dino
from pretrain.objectives.ibot import Ibot
from pretrain.objectives.koleo import Koleo, koleo

B, LOCALS, DIM, PATCHES, K = 5, 3, 16, 9, 16
HEAD = HeadConfig(hidden_dim=24, bottleneck_dim=8, num_prototypes=K, init_std=0.3)
MODEL = VisionTransformerConfig(
    embed_dim=DIM, depth=2, num_heads=2, patch_size=4, image_size=12, layer_scale_init=1.0, init_std=0.2
)


def made(objective: type[Objective], config: object) -> Any:
    torch.manual_seed(2)
    return objective(config, MODEL, MODEL)


def outputs_of(images: int = B, locals_: int = LOCALS, dtype: torch.dtype = torch.float32) -> Outputs:
    """Outputs whose features are given instead of computed."""
    generator = torch.Generator().manual_seed(0)

    def features(n: int) -> Features:
        shapes = (n, DIM), (n, PATCHES, DIM)
        return Features(*(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes))

    backbone = VisionTransformer(MODEL)
    pixels = torch.randn(2 * images, 3, 12, 12, generator=generator)
    student = [features(2 * images), features(locals_ * images)]
    teacher = features(2 * images)
    outputs = Outputs(backbone, TeacherOutputs({TEACHER: lambda: teacher}), pixels, torch.empty(0), None, None)
    outputs.__dict__["_student"] = student
    return outputs


def places(masks: Tensor) -> Tensor:
    """Where masks are true, of all patch tokens one after another."""
    return masks.flatten().nonzero()[:, 0]


@pytest.fixture
def outputs() -> Outputs:
    return outputs_of()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    masks = torch.rand(2 * B, PATCHES) < 0.4
    masks[::2] = False
    masks[1, 0] = True
    empty = torch.empty(0)
    return Batch(empty, empty, empty, empty, masks, empty, empty, torch.arange(B), torch.empty(0), places(masks))


def test_sinkhorn_balances_prototypes_and_gives_distributions() -> None:
    torch.manual_seed(0)
    targets = sinkhorn_knopp(torch.randn(512, 8), 0.5)
    torch.testing.assert_close(targets.sum(1), torch.ones(512))
    torch.testing.assert_close(targets.sum(0), torch.full((8,), 64.0), rtol=0.1, atol=0)


def test_sinkhorn_survives_large_logits() -> None:
    assert torch.isfinite(sinkhorn_knopp(torch.randn(64, 8) * 1e4, 0.04)).all()


def test_softmax_centering_moves_its_center_once_a_step() -> None:
    """By the mean of all micro-batches, however the step is cut into them."""
    whole, cut = (TeacherTargets(K, "softmax", momentum=0.9) for _ in range(2))
    logits = torch.randn(32, K)
    torch.testing.assert_close(whole(logits, 0.1), (logits / 0.1).softmax(-1))
    for part in logits.split([4, 28]):
        cut(part, 0.1)
    for targets in (whole, cut):
        assert not targets.center.any()
        targets.begin_step()
        torch.testing.assert_close(targets.center, 0.1 * logits.mean(0, keepdim=True))
        torch.testing.assert_close(targets(logits, 0.1), ((logits - 0.1 * logits.mean(0)) / 0.1).softmax(-1))
    whole.eval()
    whole.begin_step()
    before = whole.center.clone()
    whole(logits, 0.1)
    whole.begin_step()
    assert torch.equal(whole.center, before)


def test_a_uniform_teacher_and_student_cost_log_k() -> None:
    uniform = torch.full((7, K), 1 / K)
    torch.testing.assert_close(cross_entropy(uniform, torch.zeros(7, K), 0.1), torch.full((7,), math.log(K)))


def test_dino_is_the_mean_over_pairs_of_different_crops(outputs: Outputs, batch: Batch) -> None:
    dino = made(Dino, DinoConfig(head=HEAD))
    terms = dino(outputs, batch, 0.05)
    targets = dino.targets(dino.teacher_head(outputs.teacher_globals.class_token), 0.05).chunk(2)
    assert outputs.student_locals is not None
    students = [
        *dino.head(outputs.masked_student_globals.class_token).chunk(2),
        *dino.head(outputs.student_locals.class_token).chunk(LOCALS),
    ]
    pairs = [
        cross_entropy(target, student, 0.1).mean()
        for i, target in enumerate(targets)
        for j, student in enumerate(students)
        if i != j
    ]
    assert len(pairs) == 2 + 2 * LOCALS
    torch.testing.assert_close(terms["dino_global"] + terms["dino_local"], torch.stack(pairs).mean())


def test_ibot_weighs_images_equally_whatever_their_masks(outputs: Outputs, batch: Batch) -> None:
    ibot = made(Ibot, IbotConfig(head=HEAD))
    loss = ibot(outputs, batch, 0.05)["ibot"]
    targets = ibot.targets(ibot.teacher_head(outputs.teacher_globals.patch_tokens[batch.masks]), 0.05)
    losses = cross_entropy(targets, ibot.head(outputs.masked_student_globals.patch_tokens[batch.masks]), 0.1)
    images = batch.masks.nonzero()[:, 0]
    total = sum(losses[images == image].mean() for image in images.unique())
    torch.testing.assert_close(loss, total / len(images.unique()))
    everywhere = made(Ibot, IbotConfig(head=HEAD, normalize_by="all"))
    torch.testing.assert_close(everywhere(outputs, batch, 0.05)["ibot"], total / (2 * B))


def test_ibot_does_not_look_at_visible_patches(outputs: Outputs, batch: Batch) -> None:
    ibot = made(Ibot, IbotConfig(head=HEAD))
    before = ibot(outputs, batch, 0.05)["ibot"]
    outputs.masked_student_globals.patch_tokens.data[~batch.masks] = 100.0
    outputs.teacher_globals.patch_tokens.data[~batch.masks] = -100.0
    torch.testing.assert_close(ibot(outputs, batch, 0.05)["ibot"], before)


def test_without_masks_ibot_is_zero(outputs: Outputs, batch: Batch) -> None:
    batch.masks[:] = False
    batch.mask_indices = places(batch.masks)
    loss = made(Ibot, IbotConfig(head=HEAD))(outputs, batch, 0.05)["ibot"]
    assert loss.item() == 0


def test_koleo_of_orthonormal_vectors() -> None:
    assert koleo(torch.eye(8)).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-5)


def test_koleo_sees_each_crop_by_itself(outputs: Outputs, batch: Batch) -> None:
    term = made(Koleo, KoleoConfig())(outputs, batch, 0.05)["koleo"]
    first, second = outputs.masked_student_globals.class_token.chunk(2)
    torch.testing.assert_close(term, koleo(first) + koleo(second))


def test_koleo_leaves_half_precision_unless_told_to_stay(batch: Batch) -> None:
    outputs = outputs_of()
    first, second = outputs.masked_student_globals.class_token.float().chunk(2)
    exact = koleo(first) + koleo(second)
    with torch.autocast("cpu", torch.bfloat16):
        term = made(Koleo, KoleoConfig())(outputs, batch, 0.05)["koleo"]
        faithful = made(Koleo, KoleoConfig(half_precision=True))(outputs, batch, 0.05)["koleo"]
    torch.testing.assert_close(term, exact)
    assert faithful.dtype == torch.bfloat16


def test_koleo_is_the_brute_force_distance_to_the_nearest() -> None:
    """Distances by brute force."""
    x = torch.nn.functional.normalize(torch.randn(10, 4), dim=1)
    nearest = [min((x[i] - x[j] + 1e-8).norm() for j in range(10) if j != i) for i in range(10)]
    torch.testing.assert_close(koleo(x), -(torch.stack(nearest) + 1e-8).log().mean(), rtol=1e-4, atol=1e-4)
