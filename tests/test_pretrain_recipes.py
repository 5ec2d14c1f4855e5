"""Recipes hold what was published: every schedule, and the multipliers of each kind of parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from infra.config import load_yaml
from infra.errors import UserError
from pretrain import schedules
from pretrain.config import PretrainConfig
from pretrain.objectives.config import DinoConfig, IbotConfig, KoleoConfig
from pretrain.train import build_module
from pretrain.trainer import parameter_groups

FOLDER = Path(pretrain.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        load_yaml(str(FOLDER / f"{name}.yaml")) | {"corpora": ["x"], "out": "y"} | changes
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_cites_its_source(name: str) -> None:
    settings = recipe(name)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "Source: " in text or name in ("tiny_cpu", "small_gpu")
    assert settings.optimizer.warmup_steps <= settings.schedule.steps


# name: steps, global batch, peak lr, last lr, warmup, weight decay, momentum, temperature and its warmup, local crops
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "dinov2_vitl16_short": (125_000, 2048, 5.657e-3, 1e-6, 12_500, (0.04, 0.4), (0.992, 1), (0.04, 0.07), 37_500, 8),
    "dinov2_vitl14": (625_000, 3072, 3.464e-4, 1e-6, 100_000, (0.04, 0.2), (0.994, 1), (0.04, 0.07), 37_500, 8),
    "dinov3_vitl16": (125_000, 2048, 5.657e-3, 1e-6, 12_500, (0.04, 0.4), (0.992, 1), (0.04, 0.07), 37_500, 8),
    "dinov2_vitg14": (625_000, 1024, 2e-4, 1e-6, 100_000, (0.04, 0.2), (0.994, 1), (0.04, 0.07), 37_500, 8),
    "dino_vits16": (125_100, 1024, 2e-3, 1e-6, 12_510, (0.04, 0.4), (0.996, 1), (0.04, 0.07), 37_530, 8),
    "ibot_vitb16": (500_400, 1024, 2e-3, 1e-6, 12_510, (0.04, 0.4), (0.996, 1), (0.04, 0.07), 37_530, 10),
    "mae_vitl16": (249_600, 4096, 2.4e-3, 0, 12_480, (0.05, 0.05), (0, 0), None, 0, 0),
    "clip_vitb16": (378_788, 33_792, 5e-4, 0, 10_000, (0.2, 0.2), (0, 0), None, 0, 0),
    "siglip_vitb16": (274_658, 32_768, 1e-3, 0, 10_000, (1e-4, 1e-4), (0, 0), None, 0, 0),
}


# Later phases, whose values for these models are ours.
OURS: dict[str, tuple[Any, ...]] = {
    "dinov2_vitg14_highres": (10_000, 1024, 2e-5, 1e-6, 1_600, (0.04, 0.2), (0.994, 1), (0.04, 0.07), 600, 8),
    "dinov3_vitl16_gram": (40_000, 2048, 1.697e-4, 1.697e-4, 0, (0.04, 0.04), (0.999, 0.999), (0.07, 0.07), 0, 8),
}


def test_every_recipe_is_held_against_a_table() -> None:
    assert set(PUBLISHED) | set(OURS) | {"tiny_cpu", "small_gpu"} == set(RECIPES)


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_schedules_are_the_recorded_ones(name: str) -> None:
    values = (PUBLISHED | OURS)[name]
    steps, batch, peak, last, warmup, decay, momentum, temperature, temperature_warmup, local_crops = values
    settings = recipe(name)
    assert settings.schedule.steps == steps
    assert settings.schedule.global_batch_size == batch
    assert settings.views.num_local_crops == local_crops
    assert schedules.peak_lr(settings.optimizer, batch) == pytest.approx(peak, rel=1e-3)

    def at(step: int) -> schedules.ScheduleValues:
        return schedules.schedule_values(settings, step)

    assert at(warmup).lr == pytest.approx(peak, rel=1e-3)
    if warmup:
        assert at(warmup // 2).lr == pytest.approx(peak / 2, rel=1e-3)
    assert at(steps).lr == pytest.approx(last, rel=1e-3)
    middle = warmup + (steps - warmup) // 2
    assert at(middle).lr == pytest.approx((peak + last) / 2, rel=1e-3)
    for step, share in ((0, 0.0), (steps // 2, 0.5), (steps, 1.0)):
        assert at(step).weight_decay == pytest.approx(decay[0] + share * (decay[1] - decay[0]), rel=1e-3)
        assert at(step).momentum == pytest.approx(momentum[0] + share * (momentum[1] - momentum[0]), rel=1e-3)
    if temperature:
        assert at(0).temperature == pytest.approx(temperature[0])
        assert at(temperature_warmup).temperature == pytest.approx(temperature[1])
        assert at(temperature_warmup // 2).temperature == pytest.approx(sum(temperature) / 2)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "expected"),
    [(64, None, 1, (64, 1)), (64, None, 4, (16, 1)), (64, 8, 2, (8, 4)), (96, 32, 1, (32, 3))],
)
def test_the_global_batch_is_spread_over_ranks(
    batch: int, micro_batch: int | None, ranks: int, expected: tuple[int, int]
) -> None:
    runtime = {"micro_batch_size": micro_batch}
    assert (
        schedules.split_global_batch(recipe("tiny_cpu", schedule={"global_batch_size": batch}, runtime=runtime), ranks)
        == expected
    )


@pytest.mark.parametrize(("batch", "micro_batch", "ranks"), [(64, 12, 1), (64, 16, 8), (3, None, 2), (1, None, 2)])
def test_a_global_batch_that_cannot_be_spread_is_refused(batch: int, micro_batch: int | None, ranks: int) -> None:
    settings = recipe("tiny_cpu", schedule={"global_batch_size": batch}, runtime={"micro_batch_size": micro_batch})
    with pytest.raises(UserError, match=f"schedule.global_batch_size: {batch} is no multiple of {ranks} ranks"):
        schedules.split_global_batch(settings, ranks)


# name: dim, depth, heads, feed-forward, drop path, DINO's prototypes, its and iBOT's bottleneck, centering, layer decay
BUILT: dict[str, tuple[Any, ...]] = {
    "dinov2_vitl16_short": (1024, 24, 16, "mlp", 0.3, 65_536, 256, None, "softmax", 0.9),
    "dinov2_vitl14": (1024, 24, 16, "swiglu", 0.4, 131_072, 384, 256, "sinkhorn", 1.0),
    "dinov2_vitg14": (1536, 40, 24, "swiglu", 0.4, 131_072, 384, 256, "sinkhorn", 1.0),
    "dinov3_vitl16": (1024, 24, 16, "mlp", 0.3, 65_536, 256, 256, "sinkhorn", 0.9),
}


@pytest.mark.parametrize("name", BUILT)
def test_models_and_heads_are_the_published_ones(name: str) -> None:
    settings = recipe(name)
    model = settings.model
    dino, ibot, koleo = settings.objectives[:3]
    assert isinstance(dino, DinoConfig)
    assert isinstance(ibot, IbotConfig)
    assert isinstance(koleo, KoleoConfig)
    bottleneck = None if ibot.share_head else ibot.head.bottleneck_dim
    found = (
        model.embed_dim,
        model.depth,
        model.num_heads,
        model.ffn_layer,
        model.drop_path_rate,
        dino.head.num_prototypes,
    )
    found += (dino.head.bottleneck_dim, bottleneck, dino.centering, settings.optimizer.layerwise_lr_decay)
    assert found == BUILT[name]
    assert koleo.weight == 0.1
    assert ibot.normalize_by == "all"


def test_giants_hidden_width_is_4096() -> None:
    assert recipe("dinov2_vitg14").model.hidden == 4096


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("dinov")])
def test_known_quirks_are_kept_where_the_reference_has_them(name: str) -> None:
    settings = recipe(name)
    assert settings.views.inverted_blur
    assert settings.optimizer.weight_decay_tokens
    assert settings.views.mask_sampler == ("dinov3" if name.startswith("dinov3") else "dinov2")


@pytest.mark.parametrize("name", ["dino_vits16", "ibot_vitb16"])
def test_dino_and_ibot_never_inverted_the_blur(name: str) -> None:
    assert not recipe(name).views.inverted_blur


def test_dinov3s_parts_are_those_of_its_imagenet_configuration() -> None:
    model = recipe("dinov3_vitl16").model
    assert (model.pos_embed, model.num_register_tokens, model.key_bias, model.norm_eps) == ("rope", 0, True, 1e-6)


def test_ours_mends_them() -> None:
    settings = recipe("small_gpu")
    assert not settings.views.inverted_blur
    assert not settings.optimizer.weight_decay_tokens
    assert settings.views.mask_sampler == "dinov3"
    ibot, koleo = settings.objectives[1:3]
    assert isinstance(ibot, IbotConfig)
    assert isinstance(koleo, KoleoConfig)
    assert ibot.normalize_by == "masked"
    assert not koleo.half_precision


def multipliers(name: str, decay_tokens: bool = True) -> dict[str, tuple[float, float]]:
    settings = recipe(name)
    small = settings.model.model_copy(update={"embed_dim": 32, "num_heads": 2, "depth": 3, "image_size": 28})
    heads = [each.model_copy(update={"head": each.head.model_copy(update={"num_prototypes": 8, "hidden_dim": 8})})
             if isinstance(each, DinoConfig | IbotConfig) else each for each in settings.objectives]  # fmt: skip
    optimizer = settings.optimizer.model_copy(update={"weight_decay_tokens": decay_tokens})
    settings = settings.model_copy(update={"model": small, "objectives": heads, "optimizer": optimizer})
    learner = build_module(settings)
    names = {id(parameter): each for each, parameter in learner.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_multiplier"], group["weight_decay_multiplier"])
        for group in parameter_groups(learner, settings)
        for parameter in group["params"]
    }


def test_multipliers_of_the_short_recipe() -> None:
    """lr: 0.9 ^ (depth + 1 - layer), the patch embedding a fifth of it; weight decay on all but vectors."""
    found = multipliers("dinov2_vitl16_short")
    assert found["student.cls_token"] == (pytest.approx(0.9**4), 1)
    assert found["student.pos_embed"] == (pytest.approx(0.9**4), 1)
    assert found["student.mask_token"] == (pytest.approx(0.9**4), 1)
    assert found["student.patch_embed.proj.weight"] == (pytest.approx(0.2 * 0.9**4), 1)
    assert found["student.patch_embed.proj.bias"] == (pytest.approx(0.2 * 0.9**4), 0)
    assert found["student.blocks.0.attn.qkv.weight"] == (pytest.approx(0.9**3), 1)
    assert found["student.blocks.2.ls2.gamma"] == (pytest.approx(0.9), 0)
    assert found["student.norm.weight"] == (1, 0)
    assert found["objectives.dino.head.mlp.0.weight"] == (1, 1)
    assert found["objectives.dino.head.last_layer.parametrizations.weight.original1"] == (1, 1)
    assert found["objectives.dino.head.last_layer.parametrizations.weight.original0"] == (1, 1)
    assert not any(name.startswith(("teacher.", "objectives.ibot")) for name in found)


def test_tokens_are_not_decayed_by_default() -> None:
    found = multipliers("dinov2_vitl16_short", decay_tokens=False)
    assert {found[f"student.{name}"][1] for name in ("cls_token", "pos_embed", "mask_token")} == {0}
    assert found["student.blocks.0.attn.qkv.weight"][1] == 1


def test_dinov3s_prototypes_are_plain() -> None:
    learner = build_module(
        recipe(
            "tiny_cpu",
            objectives=[{"kind": "dino", "head": {"hidden_dim": 8, "num_prototypes": 4, "weight_norm": False}}],
        )
    )
    assert "objectives.dino.head.last_layer.weight" in learner.state_dict()
    assert isinstance(learner.objectives["dino"], torch.nn.Module)
