"""What losses of students cost, by hand and by other libraries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler

from distill.objectives.config import DeitConfig, FeaturesConfig, GramDistillConfig
from distill.objectives.deit import CLASSIFIER, Deit
from distill.objectives.features import ChannelStatistics, FeatureDistill
from distill.objectives.gram_distill import GramDistill
from pretrain.models.positions import to_grid
from pretrain.models.vit import Features as Said
from pretrain.objectives.base import Outputs, TeacherOutputs


class Width:
    """Of a backbone, its widths."""

    def __init__(self, embed_dim: int, patch_dim: int) -> None:
        self.embed_dim, self.patch_dim = embed_dim, patch_dim


def outputs_of(student: Said, **teachers: Said) -> Outputs:
    taught = TeacherOutputs({name: lambda said=said: said for name, said in teachers.items()})  # type: ignore[misc]
    outputs = Outputs(torch.nn.Identity(), taught, torch.zeros(2, 3, 8, 8), None, None, None)  # type: ignore[arg-type]
    outputs.__dict__["_student"] = [student]
    return outputs


def said(seed: int, dim: int, patch_dim: int, side: int, count: int = 4) -> Said:
    generator = torch.Generator().manual_seed(seed)
    return Said(
        torch.randn(count, dim, generator=generator), torch.randn(count, side**2, patch_dim, generator=generator) + 3
    )


@pytest.mark.parametrize("standardize", [4, 0])
def test_features_cost_what_the_formula_says(standardize: int) -> None:
    asked = FeaturesConfig(
        standardize_images=standardize, class_weight=0.5, patch_weight=2.0, cosine=0.7, smooth_l1=0.3
    )
    loss = FeatureDistill(asked, Width(6, 5), {"a": Width(7, 8)})
    student, wanted = said(0, 6, 5, 2), said(1, 7, 8, 4)
    outputs = outputs_of(student, a=wanted)
    loss.update_statistics(outputs.teachers)
    terms = loss(outputs, None, 0.0)
    heads: Any = loss.heads["of_a"]
    tokens = wanted.class_token, wanted.patch_tokens
    if standardize:
        tokens = tuple(
            torch.from_numpy(StandardScaler().fit_transform(each.flatten(0, -2).numpy())).view(each.shape)
            for each in tokens
        )  # type: ignore[assignment]
    own = heads.class_token(student.class_token)
    expected = 0.5 * (1 - F.cosine_similarity(own, tokens[0])).mean()
    torch.testing.assert_close(terms["features_a_class"], expected)
    patches = heads.patch_tokens(to_grid(student.patch_tokens, 16))
    cosine = (1 - F.cosine_similarity(patches, tokens[1], dim=-1)).mean()
    expected = 2.0 * (0.7 * cosine + 0.3 * F.smooth_l1_loss(patches, tokens[1]))
    torch.testing.assert_close(terms["features_a_patch"], expected, rtol=1e-4, atol=1e-6)


def test_a_standard_is_that_of_all_it_has_seen() -> None:
    scaler, standard = StandardScaler(), ChannelStatistics(3)
    for seed in range(4):
        rows = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed)) * 4 + 2
        scaler.partial_fit(rows.flatten(0, 1).numpy())
        standard.update(rows)
    found = standard(rows)
    expected = scaler.transform(rows.flatten(0, 1).numpy())
    np.testing.assert_allclose(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_gram_distill_are_alike_whatever_the_width_and_rotation() -> None:
    student = said(0, 6, 6, 3)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    same = Said(student.class_token, 5 * student.patch_tokens @ turned)
    loss = GramDistill(GramDistillConfig(), ["a"])
    assert float(loss(outputs_of(student, a=same), None, 0.0)["gram_distill_a"]) < 1e-10
    assert float(loss(outputs_of(student, a=said(2, 9, 9, 3)), None, 0.0)["gram_distill_a"]) > 1e-3


def test_maps_are_resampled_by_places() -> None:
    ramp = torch.arange(4.0).repeat(4, 1).flatten()[None, :, None]
    small = to_grid(ramp, 4)[0, :, 0]
    torch.testing.assert_close(small[0::2], small[0::2].mean().expand(2))
    assert small[0] < small[1]
    torch.testing.assert_close(to_grid(torch.full((1, 9, 2), 3.0), 49), torch.full((1, 49, 2), 3.0))


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_deit_is_the_papers(mode: str) -> None:
    torch.manual_seed(0)
    asked = DeitConfig(classifier="x", checkpoint="y", mode=mode, distillation_weight=0.3, temperature=2.0)  # type: ignore[arg-type]
    loss = Deit(asked, Width(6, 6), 5)
    student = said(0, 6, 6, 2)
    student.registers = torch.randn(4, 2, 6)
    logits = torch.randn(4, 5)
    labels = torch.tensor([1, 4])
    batch: Any = SimpleNamespace(labels=labels)
    terms = loss(outputs_of(student, **{CLASSIFIER: Said(logits, logits[:, None])}), batch, 0.0)
    own, token = loss.by_label(student.class_token), loss.by_teacher(student.registers[:, 0])
    torch.testing.assert_close(terms["deit_labels"], 0.7 * F.cross_entropy(own, labels.repeat(2)))
    hard = F.cross_entropy(token, logits.argmax(1))
    p, q = (logits / 2).softmax(1), (token / 2).softmax(1)
    soft = 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(terms["deit_teacher"], 0.3 * (hard if mode == "hard" else soft))
