"""Several students at once, of any make, under teachers of any origin."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import distill
import pretrain
from distill.config import DistillConfig, PublishConfig
from distill.export.publish import publish
from distill.train import distill as distill_module
from distill.train import teacher_cache
from distill.train.build import DistillationSetup
from distill.train.distill import _build_dataset
from distill.train.specs import checkpoint_spec, student_url, student_urls
from distill.train.teacher_cache import TeacherCache
from distill.train.teachers import BackboneTeacher
from distill.train.train_module import DistillModule
from eval.protocols.knn import predict
from infra.artifacts.artifact import open_artifact
from infra.config import load_yaml
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig, OpenClipBackboneConfig, TimmBackboneConfig
from pretrain.backbones.features import extract
from pretrain.backbones.registry import load_backbone
from pretrain.checkpoint.artifact import WEIGHTS, Checkpoint
from pretrain.config import PretrainConfig
from pretrain.networks import build_backbone
from tests.conftest import SyntheticCorpora, image_folder, ingest_folder
from tests.ranks import run_ranks
from tests.test_pretrain_training import HEAD, config, losses

PLAIN: dict[str, Any] = {
    "schedule": {"steps": 6, "global_batch_size": 8},
    "optimizer": {"base_lr": 2e-2},
    "teacher": {"momentum": [0.5, 1.0], "temperature": [0.06, 0.07]},
    "sharding": {"backend": "torch"},
    "runtime": {"num_workers": 0, "checkpoint_every": 2},
}
VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}
SMALL = {"model": VIT}
FINE = {"model": {**VIT, "patch_size": 4, "num_register_tokens": 1}, "lr": 0.5}
NET = {"timm": {"name": "test_resnet", "image_size": 32}}
SAID = [{"kind": "dino_ibot"}, {"kind": "features"}]
HERE = {"global_crops": {"size": 32}, "num_local_crops": 0}


@pytest.fixture(scope="module")
def teacher(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = {
        "schedule": {"steps": 6, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    }
    objectives = [{"kind": kind, "head": HEAD} for kind in ("dino", "ibot")]
    out = tmp_path_factory.mktemp("teacher") / "run"
    return pretrain.run(config(synthetic.seed, out, **settings, objectives=objectives)).url


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> TimmBackboneConfig:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm.create_model("test_vit2", num_classes=0).state_dict(), path)
    return TimmBackboneConfig(model="test_vit2", checkpoint=str(path))


def settings(corpus: str, out: Path, **changes: Any) -> DistillConfig:
    return DistillConfig.model_validate({**PLAIN, **changes, "corpora": [corpus], "out": str(out)})


def test_students_together_are_what_they_are_alone(
    synthetic: SyntheticCorpora, teacher: str, foreign: TimmBackboneConfig, tmp_path: Path
) -> None:
    """Bit for bit: by the teacher's heads and by features of two teachers, one of which is standardized once for all;
    of another patch size, of another learning rate, with batch normalization."""
    students = {"small": SMALL, "fine": FINE, "net": NET}
    shared: dict[str, Any] = {
        "teacher_checkpoint": teacher,
        "teachers": {"timm": foreign.model_dump()},
        "objectives": SAID,
        "optimizer": {"base_lr": 2e-2, "grad_clip": 0.1},
    }
    together = distill.run(settings(synthetic.seed, tmp_path / "all", **shared, students=students))
    assert together.metrics["students"] == {name: f"{tmp_path}/all-{name}" for name in students}
    with pytest.raises(UserError, match=r"of several students; give one of fine"):
        Checkpoint.open(together.url)
    for name, student in students.items():
        alone = distill.run(settings(synthetic.seed, tmp_path / name, **shared, students={"student": student}))
        ours, single = (load_file(Path(url) / WEIGHTS) for url in (student_url(together.url, name), alone.url))
        assert ours.keys() == single.keys()
        assert all(torch.equal(value, single[key]) for key, value in ours.items()), name
        assert (
            losses(tmp_path / "all")[-1][f"{name}_features_timm_patch"]
            == (losses(tmp_path / name)[-1]["features_timm_patch"])
        )
    assert losses(tmp_path / "all")[-1]["gradient_norm"] > 0.3  # so that clipping tells


def test_teachers_run_once_a_batch(synthetic: SyntheticCorpora, teacher: str, foreign: TimmBackboneConfig) -> None:
    students = {"small": SMALL, "fine": FINE}
    asked = settings(
        synthetic.seed,
        Path("x"),
        teacher_checkpoint=teacher,
        teachers={"timm": foreign.model_dump()},
        objectives=SAID,
        students=students,
    )
    learner, batch = learner_and_batch(asked)
    calls: list[str] = []
    other: BackboneTeacher = learner.__dict__["others"]["timm"]
    embedding = other._backbone.model.patch_embed  # type: ignore[attr-defined]
    embedding.register_forward_hook(lambda *_: calls.append("timm"))
    assert learner.teacher is not None
    learner.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    heads = [name for name, _ in learner.named_modules() if name.endswith("teacher_head")]
    assert heads == [f"students.of_fine.objectives.{kind}.teacher_head" for kind in ("dino", "ibot")]
    for name in heads:
        learner.get_submodule(name).register_forward_hook(lambda *_: calls.append("head"))
    learner(batch, 0.07)
    assert sorted(calls) == ["head", "head", "teacher", "timm"]


def learner_and_batch(asked: DistillConfig, classes: tuple[str, ...] = ()) -> tuple[DistillModule, Any]:
    lesson = DistillationSetup.from_config(asked, list(classes))
    return lesson.build_module(), _build_dataset(lesson).batch(np.arange(4))


@pytest.mark.multiprocess
def test_a_stopped_family_goes_on_bit_for_bit(
    synthetic: SyntheticCorpora,
    teacher: str,
    foreign: TimmBackboneConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is known of the teachers' features goes on too."""
    shared: dict[str, Any] = {
        "teacher_checkpoint": teacher,
        "teachers": {"timm": foreign.model_dump()},
        "objectives": SAID,
        "students": {"small": SMALL, "net": NET},
    }
    whole = distill.run(settings(synthetic.seed, tmp_path / "whole", **shared))
    honest, calls = DistillModule.losses, []

    def fails(self: DistillModule, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DistillModule, "losses", fails)
        with pytest.raises(KeyboardInterrupt):
            distill.run(settings(synthetic.seed, tmp_path / "run", **shared))
    again = distill.run(settings(synthetic.seed, tmp_path / "run", **shared))
    assert again.metrics["resumed_at"] == 4
    assert again.id == whole.id
    for name in ("small", "net"):
        ours, theirs = (load_file(Path(student_url(url, name)) / WEIGHTS) for url in (again.url, whole.url))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_students_company_is_no_part_of_its_id(synthetic: SyntheticCorpora, teacher: str, tmp_path: Path) -> None:
    """Its place is looked at before the training; when it is gone, nothing else is taken for it."""
    shared = {"teacher_checkpoint": teacher, "schedule": {"steps": 1, "global_batch_size": 8}}
    both = distill.run(settings(synthetic.seed, tmp_path / "a", **shared, students={"x": SMALL, "y": NET}))
    other = distill.run(settings(synthetic.seed, tmp_path / "b", **shared, students={"x": SMALL, "z": FINE}))
    first, second = (open_artifact(student_url(each.url, "x"), "checkpoint") for each in (both, other))
    assert first.id == second.id
    assert first.manifest.files == second.manifest.files
    longer = {**shared, "schedule": {"steps": 2, "global_batch_size": 8}, "students": {"x": SMALL, "y": NET}}
    shutil.rmtree(both.url)
    with pytest.raises(UserError, match=r"a-x: holds an artifact of other settings \(schedule\.steps 1, now 2\)"):
        distill.run(settings(synthetic.seed, tmp_path / "a", **longer))
    assert not (tmp_path / "a").exists()
    shutil.rmtree(student_url(other.url, "z"))
    with pytest.raises(UserError, match="b-z: the student is gone"):
        distill.run(settings(synthetic.seed, tmp_path / "b", **shared, students={"x": SMALL, "z": FINE}))


def test_students_named_like_parts_of_torch_and_teachers_in_any_order(
    synthetic: SyntheticCorpora, teacher: str, foreign: TimmBackboneConfig, tmp_path: Path
) -> None:
    both = {"half": foreign.model_dump(), "apply": {"kind": "checkpoint", "url": teacher}}
    shared: dict[str, Any] = {
        "objectives": [{"kind": "features"}],
        "views": HERE,
        "students": {"type": SMALL, "keys": NET},
    }
    shared |= {"schedule": {"steps": 2, "global_batch_size": 8}}
    asked = settings(synthetic.seed, tmp_path / "a", **shared, teachers=both)
    turned = settings(synthetic.seed, tmp_path / "b", **shared, teachers=dict(reversed(both.items())))
    a, b = (load_file(Path(student_url(distill.run(each).url, "type")) / WEIGHTS) for each in (asked, turned))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert checkpoint_spec(asked).id == checkpoint_spec(turned).id


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_tell_all_pairs_apart(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    """CLIP's logits are over the batch of all ranks."""
    clip_here = tmp_path / "tiny-clip.json"
    assert clip_here.exists()
    asked = {
        "teachers": {"big": clip.model_dump()},
        "objectives": [
            {
                "kind": "clip_distill",
                "teacher": "big",
                "embed_dim": 8,
                "text": {"context": 8, "width": 16, "num_heads": 2, "layers": 1},
            }
        ],
        "views": {**HERE, "num_global_crops": 1},
        "students": {"student": SMALL},
        "schedule": {"steps": 2, "global_batch_size": 8},
    }
    corpus = captioned(tmp_path)
    (tmp_path / "job").mkdir()
    start = f"import open_clip, runpy; open_clip.add_model_config({str(clip_here)!r}); "
    start += "runpy.run_module('distill', run_name='__main__')"
    (tmp_path / "start.py").write_text(start)
    run = settings(corpus, tmp_path / "run", **asked, sharding={"zero_stage": 0})
    assert run_ranks(tmp_path / "start.py", run, tmp_path / "job").returncode == 0
    distill.run(settings(corpus, tmp_path / "one", **asked))
    for ours, single in zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True):
        assert ours["clip_distill_contrastive"] == pytest.approx(single["clip_distill_contrastive"], rel=1e-3)
        assert ours["clip_distill"] == pytest.approx(single["clip_distill"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_distill_as_one(
    synthetic: SyntheticCorpora, teacher: str, foreign: TimmBackboneConfig, tmp_path: Path, stage: int
) -> None:
    """Every rank has a share of all students: no rank waits for a larger one's."""
    shared: dict[str, Any] = {
        "teacher_checkpoint": teacher,
        "teachers": {"timm": foreign.model_dump()},
        "objectives": [{"kind": "dino_ibot", "patches": "all"}, {"kind": "features"}],  # masks are each rank's own
        "students": {"small": SMALL, "fine": FINE},
        "schedule": {"steps": 4, "global_batch_size": 8},
        "collapse": {"every": 2},
        "teacher": {"momentum": [0.5, 0.5], "temperature": [0.07, 0.07]},
    }
    sharding = {"zero_stage": stage}
    run = settings(synthetic.seed, tmp_path / "run", **shared, sharding=sharding)
    (tmp_path / "job").mkdir()
    assert run_ranks("distill", run, tmp_path / "job").returncode == 0
    distill.run(settings(synthetic.seed, tmp_path / "one", **shared))
    for ours, single in zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True):
        assert ours["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=1e-2)
        assert ours == pytest.approx(single, rel=1e-2)


NETWORKS = [
    "test_convnext",
    "test_efficientnet",
    "test_vit",
    "test_mambaout",
    "mixer_s32_224",
    "swin_tiny_patch4_window7_224",
]


def test_a_network_of_timm_is_distilled_evaluated_and_published(
    synthetic: SyntheticCorpora, foreign: TimmBackboneConfig, tmp_path: Path
) -> None:
    asked = settings(
        synthetic.seed,
        tmp_path / "student",
        teachers={"timm": foreign.model_dump()},
        objectives=[{"kind": "features"}, {"kind": "gram_distill"}],
        views=HERE,
        students={"student": {"timm": {"name": "test_convnext", "image_size": 64}}},
    )
    student = distill.run(asked)
    assert student_urls(student, ["student"]) == {"student": student.url}
    features = extract(load_backbone(CheckpointBackboneConfig(url=student.url)), Corpus.open(synthetic.test), 8, "x")
    assert features.shape[1] == 64
    artifact = publish(
        PublishConfig(
            checkpoint=student.url,
            images=synthetic.test,
            formats=["torch_hub", "onnx", "torch_export"],
            out=str(tmp_path / "backbone"),
        )
    )
    assert max(artifact.metrics["max_abs_diff"].values()) < 1e-5
    assert "| Network | test_convnext |" in (tmp_path / "backbone" / "README.md").read_text()
    with pytest.raises(UserError, match="the official code has no model like test_convnext; leave official out"):
        publish(
            PublishConfig(
                checkpoint=student.url, images=synthetic.test, formats=["official"], out=str(tmp_path / "other")
            )
        )


def test_a_teacher_says_of_crops_what_its_library_says(
    foreign: TimmBackboneConfig, clip: OpenClipBackboneConfig
) -> None:
    """Crops of another side come resized; those of a Vision Transformer that takes any, as they are."""
    crops = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float() / 255
    for config_, side in ((foreign, 48), (clip, 32)):
        teacher, backbone = BackboneTeacher("it", config_), load_backbone(config_)
        sized = crops if side == 48 else F.interpolate(crops, (side, side), mode="bilinear", antialias=True)
        images = sized.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        vectors, (tokens,) = backbone.layers(backbone.get_normalized_layers(images), 1)  # type: ignore[attr-defined]
        found = teacher(crops)
        torch.testing.assert_close(found.class_token, vectors)
        torch.testing.assert_close(found.patch_tokens, tokens.patch_tokens.flatten(1, 2))
        assert (teacher.embed_dim, teacher.patch_dim) == (vectors.shape[1], tokens.patch_tokens.shape[-1])
        assert not found.class_token.is_inference()


def test_deit_learns_classes_from_labels_and_a_classifier(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 24, classes=3), tmp_path / "corpus").artifact.url
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "teacher.safetensors")
    deit = {"kind": "deit", "classifier": "test_resnet", "checkpoint": str(tmp_path / "teacher.safetensors")}
    shared = {
        "objectives": [deit],
        "views": {
            "global_crops": {
                "size": 32,
                "scale": [0.6, 1.0],
                "photometric": [{"jitter_prob": 0.0, "grayscale_prob": 0.0}],
            }
        },
        "schedule": {"steps": 60, "global_batch_size": 24},
        "optimizer": {"base_lr": 5e-3, "lr_scaling": "none", "warmup_steps": 5},
    }
    student = {"model": {**VIT, "num_register_tokens": 1, "layer_scale_init": None, "init_std": 0.1}}
    distill.run(settings(corpus, tmp_path / "a", **shared, students={"student": student}))
    rows = losses(tmp_path / "a")
    for term in ("deit_labels", "deit_teacher"):
        assert np.mean([row[term] for row in rows[-5:]]) < 0.8 * rows[0][term]
    tuned = {"student": {**student, "init_from": str(tmp_path / "a")}}
    again = distill.run(settings(corpus, tmp_path / "b", **shared, students=tuned))
    assert again.manifest.inputs["start_student"].id == open_artifact(str(tmp_path / "a"), "checkpoint").id
    assert again.manifest.inputs["classifier"].id
    assert losses(tmp_path / "b")[0]["deit_labels"] != rows[0]["deit_labels"]
    other = {"student": {"model": {**VIT, "embed_dim": 32}, "init_from": str(tmp_path / "a")}}
    with pytest.raises(UserError, match="holds another backbone than the student's"):
        distill.run(settings(corpus, tmp_path / "c", **shared, students=other))
    for key, value, told in (("norm_eps", 1e-5, "norm_eps 1e-06, not 1e-05"), ("num_heads", 4, "num_heads 2, not 4")):
        changed = {"student": {"model": {**student["model"], key: value}, "init_from": str(tmp_path / "a")}}
        with pytest.raises(UserError, match=f"was made with model.{told}"):
            distill.run(settings(corpus, tmp_path / "c", **shared, students=changed))
    deit_gone = [{**deit, "checkpoint": str(tmp_path / "gone")}]
    with pytest.raises(UserError, match="gone: no such file"):
        distill.run(settings(corpus, tmp_path / "c", **shared | {"objectives": deit_gone}))
    save_file({"x": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match="not weights of test_resnet with 3 classes"):
        distill.run(settings(corpus, tmp_path / "d", **shared))


def captioned(tmp_path: Path) -> str:
    folder = image_folder(tmp_path / "images", 24)
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture number {path.stem}")
    return ingest_folder(folder, tmp_path / "corpus").artifact.url


def test_clip_is_distilled_by_open_clips_loss(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    """The loss of the first step by hand; then its student names images as one that was pretrained does."""
    import open_clip
    from open_clip.loss import DistillClipLoss

    from pretrain.backbones.image_text import has_texts

    corpus = captioned(tmp_path)
    text = {"context": 8, "width": 16, "num_heads": 2, "layers": 1}
    asked = settings(
        corpus,
        tmp_path / "student",
        teachers={"big": clip.model_dump()},
        objectives=[
            {"kind": "clip_distill", "teacher": "big", "embed_dim": 8, "text": text, "contrastive_weight": 0.5}
        ],
        views={**HERE, "num_global_crops": 1},
        students={"student": SMALL},
        schedule={"steps": 30, "global_batch_size": 8},
    )
    learner, batch = learner_and_batch(asked)
    _, terms = learner.eval()(batch, 0.07)
    model, _, _ = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.checkpoint)
    model.eval()
    crops = batch.global_crops.float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (model.visual.image_mean, model.visual.image_std))
    with torch.inference_mode():
        seen = model.encode_image((crops - mean) / std, normalize=True)
        told = model.encode_text(batch.texts, normalize=True)
    towers: Any = learner.get_submodule("students.of_student.objectives.clip_distill.towers")
    (part,) = learner.branches()
    image = towers.encode_images(part.student([learner.normalize(batch.global_crops)])[0].class_token)
    contrast, distilled = DistillClipLoss()(
        image, towers.encode_texts(batch.texts), towers.scale(), seen.clone(), told.clone(), model.logit_scale.exp()
    )
    torch.testing.assert_close(terms["clip_distill"], distilled.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        terms["clip_distill_contrastive"], 0.5 * contrast.detach().reshape(()), rtol=1e-4, atol=1e-5
    )
    url = distill.run(asked).url
    rows = losses(tmp_path / "student")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert has_texts(CheckpointBackboneConfig(url=url))
    from pretrain.backbones import image_text

    assert image_text.load(CheckpointBackboneConfig(url=url)).texts(["picture number 3"]).shape == (1, 8)
    longer = {"kind": "clip_distill", "teacher": "big", "text": {**text, "context": 9}}
    other = DistillConfig.model_validate(asked.model_dump() | {"objectives": [longer]})
    with pytest.raises(UserError, match=r"take one of byte pairs and set text\.context"):
        DistillationSetup.from_config(other, []).build_module()


CACHED: dict[str, Any] = {
    "objectives": [*SAID, {"kind": "gram_distill"}],
    "students": {"small": SMALL, "net": NET},
    "schedule": {"steps": 50, "global_batch_size": 8},
    "num_cached_views": 2,
}


def test_kept_teaching_is_what_teachers_say(
    synthetic: SyntheticCorpora,
    teacher: str,
    foreign: TimmBackboneConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To half precision, over several epochs; kept once, for the next distillation too, which asks nobody."""
    shared = CACHED | {"teacher_checkpoint": teacher, "teachers": {"timm": foreign.model_dump()}}
    asked = settings(synthetic.seed, tmp_path / "kept", **shared)
    images = len(Corpus.open(synthetic.seed))
    assert images < 8 * 50 / 2  # so that views come again
    distill.run(asked)
    (folder,) = (tmp_path / "teacher_cache").iterdir()
    kept = TeacherCache(open_artifact(str(folder), "embeddings"))
    assert kept.artifact.metrics["views"] == 2 * images
    assert set(kept.teachers) == {"teacher", "timm"}
    lesson = DistillationSetup.from_config(asked, [])
    dataset = _build_dataset(lesson)
    places = np.array([3, images + 3, 2 * images + 5, 7])
    batch = dataset.batch(places)
    assert batch.keys.tolist() == (2 * dataset.order.rows_at(places) + places // images % 2).tolist()
    for name, told in lesson.build_module().teacher_features(batch).items():
        found = kept.features(name, batch.keys, torch.device("cpu"))
        torch.testing.assert_close(found.class_token, told.class_token, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.patch_tokens, told.patch_tokens, rtol=2e-3, atol=2e-3)
    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "_open_teacher_cache", lambda *_: None)
        distill.run(settings(synthetic.seed, tmp_path / "streamed", **shared))
    for ours, streamed in zip(losses(tmp_path / "kept"), losses(tmp_path / "streamed"), strict=True):
        assert ours["loss"] == pytest.approx(streamed["loss"], rel=2e-2)
    monkeypatch.setattr(BackboneTeacher, "__call__", lambda *_: pytest.fail("a teacher was asked"))
    again = distill.run(settings(synthetic.seed, tmp_path / "other", **shared | {"students": {"student": FINE}}))
    assert again.metrics["steps"] == 50


def test_keeping_goes_on_after_a_kill(
    synthetic: SyntheticCorpora, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "_PART", 32)
    shared = {"teacher_checkpoint": teacher, "num_cached_views": 1, "schedule": {"steps": 2, "global_batch_size": 8}}
    distill.run(settings(synthetic.seed, tmp_path / "whole" / "run", **shared))
    honest, calls = DistillModule.teacher_features, []

    def fails(self: DistillModule, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(self, batch)

    monkeypatch.setattr(DistillModule, "teacher_features", fails)
    with pytest.raises(KeyboardInterrupt):
        distill.run(settings(synthetic.seed, tmp_path / "killed" / "run", **shared))
    calls.clear()
    monkeypatch.setattr(DistillModule, "teacher_features", lambda *arguments: (calls.append(1), honest(*arguments))[1])
    distill.run(settings(synthetic.seed, tmp_path / "killed" / "run", **shared))
    (whole,), (killed,) = ((tmp_path / name / "teacher_cache").iterdir() for name in ("whole", "killed"))
    parts = sorted(path.name for path in whole.glob("*.npy"))
    assert len(calls) == 1 + len(parts) // 2 - 2
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in parts)


def test_mistakes_are_one_line(
    synthetic: SyntheticCorpora, teacher: str, foreign: TimmBackboneConfig, tmp_path: Path
) -> None:
    features = {"teachers": {"timm": foreign.model_dump()}, "views": HERE}
    unknown = {"objectives": [{"kind": "features", "teachers": ["other"]}]}
    with pytest.raises(UserError, match="no teacher other; there are timm"):
        distill.run(settings(synthetic.seed, tmp_path / "a", **features, **unknown))
    with pytest.raises(UserError, match="needs a teacher with heads"):
        distill.run(settings(synthetic.seed, tmp_path / "b", **features))
    with pytest.raises(ValueError, match="no plain name"):
        settings(synthetic.seed, tmp_path / "b", teacher_checkpoint=teacher, students={"a.b": {}})
    pixels = {"teachers": {"pixels": {"kind": "pixels"}}, "objectives": [{"kind": "features"}], "views": HERE}
    with pytest.raises(UserError, match="one vector an image and no patch tokens"):
        distill.run(settings(synthetic.seed, tmp_path / "c", **pixels))


@pytest.mark.parametrize(
    "path", sorted(Path(distill.__file__).with_name("recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_whole(path: Path) -> None:
    """Their models can be built, and crops fit the patches that are told."""
    recipe = load_yaml(path)
    asked = DistillConfig.model_validate(recipe | {"corpora": ["x"], "out": "y"})
    for student in asked.students.values():
        with torch.device("meta"):
            network = build_backbone(student.network)
        assert network.embed_dim >= 384
    if asked.views is not None:
        assert DistillationSetup.from_config(asked, []).views == asked.views


def test_what_decides_is_in_the_id(synthetic: SyntheticCorpora, foreign: TimmBackboneConfig, tmp_path: Path) -> None:
    features = {"teachers": {"timm": foreign.model_dump()}, "objectives": [{"kind": "features"}], "views": HERE}
    moved = foreign.model_copy(update={"checkpoint": str(tmp_path / "copy.safetensors")})
    Path(moved.checkpoint).write_bytes(Path(foreign.checkpoint).read_bytes())
    ids = [
        checkpoint_spec(settings(synthetic.seed, tmp_path, **{**features, **changes})).id
        for changes in (
            {},
            {"teachers": {"timm": moved.model_dump()}},
            {"objectives": [{"kind": "features", "cosine": 0.8}]},
            {"students": {"student": NET}},
        )
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


WIDE = {
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "patch_size": 8,
    "image_size": 32,
    "layer_scale_init": 1.0,
    "init_std": 0.1,
}
NARROW = {**WIDE, "embed_dim": 48, "depth": 3, "num_heads": 2, "init_std": 0.14}
BY_HEADS = {"hidden_dim": 256, "bottleneck_dim": 64, "num_prototypes": 128, "init_std": 0.08}
LEARN: list[dict[str, Any]] = [
    {"kind": "dino", "head": BY_HEADS},
    {"kind": "ibot", "weight": 0.06, "head": BY_HEADS},
    {"kind": "koleo"},
]
NAME = {"kind": "clip", "embed_dim": 64, "text": {"context": 8, "width": 32, "num_heads": 2, "layers": 1}}
RECIPE: dict[str, Any] = {
    "optimizer": {"base_lr": 4e-3, "warmup_steps": 20, "weight_decay": [0.04, 0.1], "patch_embed_lr_mult": 1.0},
    "sharding": {"backend": "torch"},
    "runtime": {"num_workers": 1, "checkpoint_every": 1000},
}
STEPS = 120


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_distilled_students_beat_one_trained_from_scratch(shared_data: Path, tmp_path: Path) -> None:
    """By nearest neighbors, after as many steps, on slices of CIFAR-10: by the teacher's heads, or by its features.

    The teacher saw the classes' names too: with images alone none of this size gets far in a minute.
    """
    corpora = [slice_of(shared_data, name, count, tmp_path) for name, count in (("train", 4000), ("test", 1000))]
    views = {
        "global_crops": {"size": 32, "scale": [0.4, 1.0], "photometric": [{"jitter_prob": 0.3}]},
        "num_local_crops": 0,
    }
    shared = {**RECIPE, "corpora": [corpora[0]]}

    def trained(model: dict[str, Any], steps: int, objectives: list[dict[str, Any]], out: str) -> str:
        content = {"model": model, "objectives": objectives, "views": views | {"mask_probability": 0.3}}
        content |= {"schedule": {"steps": steps, "global_batch_size": 64}, "out": str(tmp_path / out)}
        content |= {"teacher": {"momentum": [0.97, 1.0], "temperature": [0.04, 0.04]}}
        return pretrain.run(PretrainConfig.model_validate(shared | content)).url

    teacher = trained(WIDE, 400, [*LEARN, NAME], "teacher")
    found = {"scratch": accuracy(trained(NARROW, STEPS, LEARN, "scratch"), *corpora)}
    for kind in ("dino_ibot", "features"):
        content = {"objectives": [{"kind": kind}], "students": {"student": {"model": NARROW}}}
        content |= {"schedule": {"steps": STEPS, "global_batch_size": 64}, "out": str(tmp_path / kind)}
        content |= {"teacher_checkpoint": teacher, "teacher": {"momentum": [0.9, 1.0], "temperature": [0.04, 0.04]}}
        found[kind] = accuracy(distill.run(DistillConfig.model_validate(shared | content)).url, *corpora)
    assert min(found["dino_ibot"], found["features"]) > found["scratch"] + 0.005, found


def slice_of(folder: Path, name: str, count: int, tmp_path: Path) -> str:
    """The first images of a part of CIFAR-10, with the names of their classes as captions."""
    names = (folder / "cifar10" / "classes.txt").read_text().split()
    shard = folder / "cifar10" / f"{name}-000000.tar.gz"
    with tarfile.open(shard) as whole, tarfile.open(tmp_path / f"{name}.tar", "w") as part:
        for member in list(whole)[: 2 * count]:  # an image and its class
            file = whole.extractfile(member)
            assert file is not None
            data = file.read()
            part.addfile(member, io.BytesIO(data))
            if member.name.endswith(".cls"):
                caption = names[int(data)].encode()
                member.name, member.size = member.name.replace(".cls", ".txt"), len(caption)
                part.addfile(member, io.BytesIO(caption))
    return ingest_folder(tmp_path / f"{name}.tar", tmp_path / name).artifact.url


def accuracy(url: str, train: str, test: str) -> float:
    """Of 20 nearest neighbors."""
    backbone, corpora = load_backbone(CheckpointBackboneConfig(url=url)), [Corpus.open(each) for each in (train, test)]
    bank, queries = (extract(backbone, corpus, 256, "knn") for corpus in corpora)
    votes = predict(bank, corpora[0].labels, queries, 10, 20, 0.07)
    return float((votes.argmax(1) == corpora[1].labels).mean())
