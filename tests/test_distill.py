"""Distillation keeps its teacher fixed; what is published is what was trained, in timm alone."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

import distill
import pretrain
from distill.config import DistillConfig, FormatName, PublishConfig
from distill.export.formats import timm_folder
from distill.export.publish import publish
from distill.train.build import DistillationSetup
from distill.train.distill import _build_dataset
from eval import run as evaluate
from eval.config import EvaluateConfig
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.backbones.registry import load_backbone
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.config import Optimizer, Sharding
from pretrain.data.loader import Batch
from pretrain.sharding import build
from pretrain.trainer import parameter_groups
from tests.conftest import SyntheticCorpora
from tests.test_pretrain_training import TINY, config

MODEL = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32, "num_register_tokens": 2}
STUDENT = {
    "students": {"student": {"model": MODEL}},
    "schedule": {"steps": 6, "global_batch_size": 8},
    "optimizer": {"base_lr": 2e-2},
    "teacher": {"momentum": [0.5, 1.0]},
    "sharding": {"backend": "torch"},
    "runtime": {"num_workers": 0},
}


@pytest.fixture(scope="module")
def teacher(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("teacher") / "run"
    settings = {
        "schedule": {"steps": 6, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    }
    return Checkpoint.open(pretrain.run(config(synthetic.seed, out, **settings)).url)


@pytest.fixture(scope="module")
def student(synthetic: SyntheticCorpora, teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    settings = distillation(teacher, synthetic.seed, tmp_path_factory.mktemp("student") / "run")
    return Checkpoint.open(distill.run(settings).url)


def distillation(teacher: Checkpoint, corpus: str, out: Path, **changes: object) -> DistillConfig:
    content = {**STUDENT, **changes, "teacher_checkpoint": teacher.artifact.url, "corpora": [corpus], "out": str(out)}
    return DistillConfig.model_validate(content)


def lesson(teacher: Checkpoint, **changes: object) -> DistillationSetup:
    return DistillationSetup.from_config(distillation(teacher, "x", Path("y"), **changes), [])


def test_the_teacher_and_its_heads_are_those_of_the_checkpoint(teacher: Checkpoint) -> None:
    learner = lesson(teacher).build_module()
    state = learner.state_dict()
    for name, value in teacher.weights("teacher.").items():
        assert torch.equal(state[f"teacher.{name}"], value)
    heads = teacher.weights("objectives.dino.teacher_head.")
    for name, value in heads.items():
        assert torch.equal(state[f"students.of_student.objectives.dino.teacher_head.{name}"], value)


def test_distilling_moves_the_student_and_its_average_and_not_the_teacher(
    synthetic: SyntheticCorpora, teacher: Checkpoint, student: Checkpoint
) -> None:
    assert student.description.released == "average"
    first, average, last = (
        state["blocks.0.mlp.fc1.weight"]
        for state in (
            student.untrained_backbone().state_dict(),
            student.backbone().state_dict(),
            student.weights("student."),
        )
    )
    assert not torch.equal(first, average)
    assert not torch.equal(average, last)
    learner = lesson(teacher).build_module()
    engine = build.build(
        learner, parameter_groups(learner, learner_settings()), Optimizer(), Sharding(backend="torch"), (4, 1)
    )
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    loss, _ = engine.forward(batch_of(synthetic, teacher), 0.07)
    engine.parameter_groups()[0]["lr"] = 1e-3
    engine.backward(loss)
    engine.step()
    moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("students.of_student.student.", "students.of_student.objectives.")) for name in moved)
    assert not any("teacher_head" in name for name in moved)


def learner_settings() -> DistillConfig:
    return DistillConfig.model_validate({**STUDENT, "teacher_checkpoint": "t", "corpora": ["x"], "out": "y"})


def batch_of(synthetic: SyntheticCorpora, teacher: Checkpoint) -> Batch:
    return _build_dataset(DistillationSetup.from_config(distillation(teacher, synthetic.seed, Path("y")), [])).batch(
        np.arange(4)
    )


@pytest.mark.parametrize("patches", ["sampled", "all"])
def test_the_student_sees_everything(teacher: Checkpoint, synthetic: SyntheticCorpora, patches: str) -> None:
    learner = lesson(teacher, objectives=[{"kind": "dino_ibot", "patches": patches}]).build_module().eval()
    batch = batch_of(synthetic, teacher)
    seen: list[object] = []
    compared: list[int] = []
    (part,) = learner.branches()
    part.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    head = dict(learner.named_modules())["students.of_student.objectives.ibot.head"]
    head.register_forward_pre_hook(lambda _, arguments: compared.append(len(arguments[0])))
    learner(batch, 0.07)
    assert batch.masks.any()
    assert seen == [[None, None]]
    assert compared == [len(batch.mask_indices) if patches == "sampled" else batch.masks.numel()]


def test_crops_must_fit_every_students_patches(
    teacher: Checkpoint, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    model = {**MODEL, "patch_size": 3, "image_size": 33}
    with pytest.raises(UserError, match=r"32 is no multiple of the patch size 3 of students.odd.model"):
        distill.run(distillation(teacher, synthetic.seed, tmp_path / "x", students={"odd": {"model": model}}))


def test_a_mixed_teacher_hands_down_its_prototypes_alone(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    """Tied heads are DINO's, and pixels are nothing to learn from a teacher; without prototypes nothing is."""
    settings = {
        "schedule": {"steps": 1, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    }
    dino, pixels = TINY["objectives"][0], {"kind": "simmim"}  # type: ignore[index]
    mixed = config(
        synthetic.seed, tmp_path / "mixed", **settings, objectives=[dino, {"kind": "ibot", "share_head": True}, pixels]
    )
    checkpoint = Checkpoint.open(pretrain.run(mixed).url)
    assert [each.kind for each in lesson(checkpoint).teacher_objectives] == ["dino", "ibot"]
    student = Checkpoint.open(distill.run(distillation(checkpoint, synthetic.seed, tmp_path / "student")).url)
    with pytest.raises(UserError, match="which has no heads"):
        distill.run(distillation(student, synthetic.seed, tmp_path / "again"))
    alone = config(synthetic.seed, tmp_path / "alone", **settings, objectives=[pixels])
    nothing = Checkpoint.open(pretrain.run(alone).url)
    with pytest.raises(UserError, match="no prototypes to distill from"):
        distill.run(distillation(nothing, synthetic.seed, tmp_path / "none"))


@pytest.fixture(scope="module")
def published(synthetic: SyntheticCorpora, student: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published")
    report = evaluate(
        EvaluateConfig(
            model=CheckpointBackboneConfig(url=student.artifact.url),
            datasets={"train": synthetic.seed, "test": synthetic.test},
            out=str(out / "report"),
        )
    )
    settings = PublishConfig(
        checkpoint=student.artifact.url,
        images=synthetic.test,
        reports=[report.url],
        license="cc0-1.0",
        formats=["official", "torch_export", "onnx", "transformers", "torch_hub"],
        out=str(out / "backbone"),
    )
    artifact = publish(settings)
    assert list(artifact.metrics["max_abs_diff"]) == [name for name in get_args(FormatName) if name != "open_clip"]
    assert max(artifact.metrics["max_abs_diff"].values()) <= 1e-5
    return Path(artifact.url)


LOAD = """
import sys, json, numpy as np, timm, torch
from huggingface_hub import ModelCard
from PIL import Image
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    features = model(transform(Image.open(sys.argv[2])).unsqueeze(0))
assert not {"pretrain", "infra", "distill"} & set(sys.modules)
print(json.dumps(features[0].tolist()))
"""


@pytest.mark.multiprocess
def test_the_model_cards_snippet_gives_our_features(
    synthetic: SyntheticCorpora, student: Checkpoint, published: Path
) -> None:
    """The transform included, on an image file, in a process that never imports Fovea."""
    path = sorted((synthetic.folder / "test").rglob("*.png"))[3]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(published), str(path)], capture_output=True, text=True, check=True
    )
    backbone = load_backbone(CheckpointBackboneConfig(url=student.artifact.url))
    image = torch.as_tensor(np.array(backbone.preprocess(Image.open(path).convert("RGB"))))
    np.testing.assert_allclose(json.loads(done.stdout), backbone.features(image[None])[0], rtol=0, atol=1e-5)


SNIPPET = """
import sys
from huggingface_hub import ModelCard
from PIL import Image
image = Image.open(sys.argv[1]).convert("RGB")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_cards_snippets_run_as_they_stand(synthetic: SyntheticCorpora, published: Path) -> None:
    """Each in a process of its own that never imports Fovea."""
    path = sorted((synthetic.folder / "test").rglob("*.png"))[3]
    blocks = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        code = SNIPPET + block.replace("PATH/OF/THIS/FOLDER", str(published))
        code += "\nassert features.shape[1] == 24\nassert not {'pretrain', 'infra', 'distill'} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-I", "-c", code, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_graphs_take_any_batch_and_size(student: Checkpoint, published: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(published / "model.onnx", providers=["CPUExecutionProvider"])
    graph = torch.export.load(published / "model.pt2").module()
    backbone = student.backbone()
    for shape in ((1, 3, 32, 32), (3, 3, 16, 56), (2, 3, 64, 40)):
        pixels = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = backbone([pixels])[0].class_token
            torch.testing.assert_close(graph(pixels), expected, atol=1e-5, rtol=1e-4)
        (found,) = session.run(["features"], {"pixels": pixels.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


AGAIN = """
import sys
from pathlib import Path
from distill.export.formats.registry import FORMATS
from distill.export.formats.source import PublishSource
from pretrain.checkpoint.artifact import Checkpoint

checkpoint = Checkpoint.open(sys.argv[1])
for name in ("timm", "onnx", "torch_export"):
    FORMATS[name].write(PublishSource.from_checkpoint(checkpoint), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_graphs_have_the_same_bytes_in_every_process_and_name_no_paths(
    student: Checkpoint, published: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", AGAIN, student.artifact.url, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for name in ("model.onnx", "model.pt2"):
        data = (published / name).read_bytes()
        assert data == (tmp_path / name).read_bytes(), name
        assert b"site-packages" not in data
        assert str(Path(distill.__file__).parents[1]).encode() not in data


def test_a_segmenter_of_transformers_stands_on_it(student: Checkpoint, published: Path) -> None:
    from transformers import Dinov2WithRegistersBackbone, UperNetConfig, UperNetForSemanticSegmentation

    backbone = Dinov2WithRegistersBackbone.from_pretrained(published / "transformers", out_indices=[0, 1])
    settings = UperNetConfig(
        backbone_config=backbone.config, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=5
    )
    model = UperNetForSemanticSegmentation(settings)
    model.backbone = backbone
    pixels = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model.eval()(pixels).logits.shape == (2, 5, 32, 48)
        grid = backbone.eval()(pixels[..., :32]).feature_maps[-1]
        expected = student.backbone()([pixels[..., :32]])[0].patch_tokens
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_the_card_tells_numbers_lineage_and_license(published: Path) -> None:
    card = (published / "README.md").read_text()
    metadata = ModelCard.load(published / "README.md").data
    assert metadata.license == "cc0-1.0"
    assert metadata.library_name == "timm"
    assert {result.metric_name for result in metadata.eval_results or []} >= {"representation: RankMe"}
    assert "| knn | accuracy, k = " in card
    assert "| logistic | accuracy | untrained |" in card
    assert "| representation | RankMe | model |" in card
    (evaluated,) = json.loads((published / "eval.json").read_text())
    assert {row["protocol"] for row in evaluated["rows"]} == {"knn", "logistic", "representation"}
    lineage = json.loads((published / "lineage.json").read_text())
    assert {each["stage"] for each in lineage} >= {"source", "ingest", "pretrain", "distill", "evaluate"}
    known: set[str] = set()
    for each in lineage:
        assert set(each["inputs"].values()) <= known  # everything comes after what it was made from
        known.add(each["id"])


@pytest.mark.parametrize("side", [64, 96, 256, 518])
@pytest.mark.parametrize("size", [(600, 600), (601, 777), (930, 604), (607, 1001)])
def test_timm_prepares_images_as_we_do(side: int, size: tuple[int, int]) -> None:
    from pretrain.backbones.preprocessing import center_crop

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    transform = timm.data.create_transform(
        input_size=side, crop_pct=timm_folder._crop_share(side), interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    ours = center_crop(image, side) / 255.0
    np.testing.assert_allclose(transform(image).permute(1, 2, 0), ours, atol=1e-6)


def test_timm_resizes_to_the_side_that_we_do() -> None:
    for side in range(64, 1024):
        assert math.floor(side / timm_folder._crop_share(side)) == round(side * 256 / 224)


def test_rotary_models_load_in_transformers_with_and_without_registers(tmp_path: Path) -> None:
    from transformers import AutoModel

    from distill.export.formats import graphs, transformers_folder
    from pretrain.data.config import Views
    from pretrain.models.config import VisionTransformerConfig
    from pretrain.models.vit import VisionTransformer

    for registers in (0, 3):
        shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32, "pos_embed": "rope"}
        torch.manual_seed(0)
        vit = VisionTransformer(
            VisionTransformerConfig.model_validate(shape | {"num_register_tokens": registers})
        ).eval()
        transformers_folder.write(vit, Views(), tmp_path / str(registers))
        model = AutoModel.from_pretrained(tmp_path / str(registers) / "transformers").eval()
        pixels = torch.randn(2, 3, 32, 48)
        with torch.inference_mode():
            expected = vit([pixels])[0].class_token
            torch.testing.assert_close(model(pixels).pooler_output, expected, atol=1e-5, rtol=1e-4)
    graphs.write_exported(vit, Views(), tmp_path)
    graph = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        for shape in ((1, 3, 16, 56), (3, 3, 32, 32)):
            pixels = torch.randn(*shape)
            torch.testing.assert_close(graph(pixels), vit([pixels])[0].class_token, atol=1e-5, rtol=1e-4)


def test_a_backbone_that_timm_sees_differently_is_not_published(
    synthetic: SyntheticCorpora, student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = timm_folder.config_json
    monkeypatch.setattr(
        timm_folder,
        "config_json",
        lambda *arguments: (config := honest(*arguments)) | {"model_args": config["model_args"] | {"num_heads": 1}},
    )
    settings = PublishConfig(checkpoint=student.artifact.url, images=synthetic.test, out=str(tmp_path / "b"))
    with pytest.raises(UserError, match="timm: features differ"):
        publish(settings)
    assert not (tmp_path / "b" / "manifest.json").exists()
