"""Weights of others as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import pretrain
from distill.config import ImportConfig, PublishConfig
from distill.export.publish import publish
from distill.weight_import.import_weights import import_weights
from infra.artifacts.artifact import find, verify
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig, OfficialBackboneConfig
from pretrain.backbones.registry import load_backbone
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import to_official
from pretrain.models.vit import VisionTransformer
from tests.conftest import TINY_CLIP, SyntheticCorpora, image_folder, ingest_folder
from tests.test_pretrain_training import config

MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}


@pytest.mark.parametrize(
    "extra",
    [
        {"num_register_tokens": 2},
        {"patch_size": 7, "image_size": 28},
        {"pos_embed": "rope", "key_bias": False, "norm_eps": 1e-5},
    ],
)
def test_official_weights_become_a_checkpoint(
    extra: dict[str, object], synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    model = VisionTransformerConfig.model_validate(MODEL | extra)
    torch.manual_seed(0)
    vit = VisionTransformer(model).eval()
    if not model.key_bias:
        for block in vit.blocks:
            block.attn.qkv.bias.data.chunk(3)[1].zero_()
    path = tmp_path / "teacher.pth"
    torch.save({"teacher": to_official(vit.state_dict(), model)}, path)
    artifact = import_weights(ImportConfig(checkpoint=str(path), model=model, out=str(tmp_path / "imported")))
    assert verify(artifact) == []
    side = model.image_size
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    ours = load_backbone(CheckpointBackboneConfig(url=artifact.url)).features(images)
    theirs = load_backbone(OfficialBackboneConfig(checkpoint=str(path), architecture=model, input_size=side)).features(
        images
    )
    torch.testing.assert_close(ours, theirs)
    started = pretrain.run(
        config(
            synthetic.seed,
            tmp_path / "on",
            model=model.model_dump(),
            init_from=artifact.url,
            schedule={"steps": 1, "global_batch_size": 8},
            views={"global_crops": {"size": side}, "num_local_crops": 0},
        )
    )
    assert started.manifest.inputs["init_from"].id == artifact.id


def test_timms_weights_become_a_checkpoint_and_go_back(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-5})):
        torch.manual_seed(number)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        theirs = timm.create_model("vit_tiny_patch16_224", **shape, **options, num_classes=7).eval()
        path = tmp_path / f"{number}.pt"
        torch.save({"state_dict": theirs.state_dict()}, path)
        model = MODEL | {"num_register_tokens": 2 if options else 0, "layer_scale_init": 1e-5 if options else None}
        settings = {"checkpoint": str(path), "layout": "timm", "model": model, "out": str(tmp_path / f"out-{number}")}
        artifact = import_weights(ImportConfig.model_validate(settings))
        pixels = torch.randn(2, 3, 32, 32)
        theirs.reset_classifier(0)
        with torch.inference_mode():
            ours = Checkpoint.open(artifact.url).backbone()([pixels])[0].class_token
            torch.testing.assert_close(ours, theirs(pixels), atol=1e-5, rtol=1e-4)
    published = publish(
        PublishConfig(checkpoint=artifact.url, images=synthetic.test, formats=["timm"], out=str(tmp_path / "published"))
    )
    assert published.metrics["max_abs_diff"]["timm"] <= 1e-5


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 9)}, tmp_path / "w.pt")
    for layout in ("official", "timm"):
        settings = {"checkpoint": str(tmp_path / "w.pt"), "layout": layout, "model": MODEL, "out": str(tmp_path / "o")}
        with pytest.raises(UserError, match=r"w\.pt: (has no|cls_token is|blocks)"):
            import_weights(ImportConfig.model_validate(settings))
    assert find(str(tmp_path / "o")) is None
    with pytest.raises(UserError, match="no such file"):
        import_weights(ImportConfig(checkpoint=str(tmp_path / "nope"), out=str(tmp_path / "o")))


@pytest.mark.multiprocess
@pytest.mark.parametrize(("quick", "custom"), [(True, False), (False, True)])
def test_open_clips_models_come_with_their_towers_and_go_back(tmp_path: Path, quick: bool, custom: bool) -> None:
    """Images and captions get the vectors that open_clip gives them; and again when published for it, or for timm."""
    import json

    import open_clip

    from pretrain.backbones import image_text

    name = f"tiny-{quick}"
    settings = {**TINY_CLIP, "quick_gelu": quick, "custom_text": custom}
    (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    theirs, _, _ = open_clip.create_model_and_transforms(name)
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.1)
    torch.save(theirs.eval().state_dict(), tmp_path / "weights.pt")
    out = str(tmp_path / "checkpoint")
    asked = ImportConfig(checkpoint=str(tmp_path / "weights.pt"), layout="open_clip", name=name, out=out)
    checkpoint = Checkpoint.open(import_weights(asked).url)
    corpus = ingest_folder(image_folder(tmp_path / "images", 6), tmp_path / "corpus").artifact
    pixels = torch.randn(3, 3, 32, 32)
    both = image_text.load(CheckpointBackboneConfig(url=out))
    with torch.inference_mode():
        expected = theirs.encode_image(pixels, normalize=True)
        tokens = open_clip.get_tokenizer(name)(["a dog", "two cats"])
        told = theirs.encode_text(tokens, normalize=True)
        found = both.project(checkpoint.backbone()([pixels])[0].class_token)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(both.texts(["a dog", "two cats"])), told, atol=1e-5, rtol=1e-4)
    settings_ = {"checkpoint": out, "images": corpus.url, "formats": ["timm", "open_clip"]}
    published = publish(
        PublishConfig.model_validate(settings_ | {"out": str(tmp_path / "backbone"), "tolerance": 1e-4})
    )
    assert set(published.metrics["max_abs_diff"]) == {"timm", "open_clip"}
    other = settings_ | {"formats": ["official"], "out": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"model\.pre_norm True: the official code has no such model"):
        publish(PublishConfig.model_validate(other))


def test_what_is_no_model_of_open_clips_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for state in ({"module.visual.conv1.weight": torch.zeros(1)}, {"something": torch.zeros(1)}):
        torch.save({"state_dict": state}, path)
        asked = ImportConfig(checkpoint=str(path), layout="open_clip", name="ViT-B-32", out=str(tmp_path / "c"))
        with pytest.raises(UserError, match=r"weights.pt: has no visual\."):
            import_weights(asked)


def test_open_clips_other_models_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pt")
    for name, reason in (("RN50", "the layers of a ResNet"), ("ViT-B-16-SigLIP", "timm_model_name"), ("x", "none of")):
        asked = ImportConfig(
            checkpoint=str(tmp_path / "weights.pt"), layout="open_clip", name=name, out=str(tmp_path / "c")
        )
        with pytest.raises(UserError, match=reason):
            import_weights(asked)
    asked = ImportConfig(checkpoint=str(tmp_path / "weights.pt"), layout="open_clip", out=str(tmp_path / "c"))
    with pytest.raises(UserError, match="needs --name"):
        import_weights(asked)
