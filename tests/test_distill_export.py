"""Formats of models of all kinds, what cards tell, and where backbones go."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from distill.config import PublishConfig, PublishSettings
from distill.export.formats import transformers_folder
from distill.export.formats.compatibility import require_compatible
from distill.export.formats.source import PublishSource
from distill.export.provenance import Provenance
from distill.export.publish import publish
from distill.export.verify import max_difference
from infra.artifacts.artifact import Artifact, find
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.backbones.preprocessing import center_crop
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.config import PretrainConfig
from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import VisionTransformer
from tests.conftest import SyntheticCorpora, encode_image, image_folder, ingest_folder, picture
from tests.hub_server import Hub, serving
from tests.test_distill_students import captioned
from tests.test_pretrain_training import config

MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("clip", {**MODEL, "layer_scale_init": None, "mlp_ratio": 2.6}),
        ("siglip", {**MODEL, "layer_scale_init": 0.5, "qkv_bias": False, "pos_embed": "sincos"}),
    ],
)
def test_clip_models_load_in_open_clip(kind: str, model: dict[str, Any], tmp_path: Path) -> None:
    corpus = captioned(tmp_path)
    text = {"context": 8, "width": 16, "num_heads": 2, "layers": 1}
    settings = {
        "model": model,
        "objectives": [{"kind": kind, "embed_dim": 8, "text": text}],
        "views": {"global_crops": {"size": 32}, "num_global_crops": 1, "num_local_crops": 0},
        "schedule": {"steps": 6, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
        "corpora": [corpus],
        "out": str(tmp_path / "teacher"),
    }
    url = pretrain.run(PretrainConfig.model_validate(settings)).url
    artifact = publish(
        PublishConfig(checkpoint=url, images=corpus, formats=["open_clip"], out=str(tmp_path / "backbone"))
    )
    assert list(artifact.metrics["max_abs_diff"]) == ["open_clip"]
    assert artifact.metrics["max_abs_diff"]["open_clip"] < 1e-5
    import open_clip

    name = f"local-dir:{artifact.url}/open_clip"
    model_, _, preprocess = open_clip.create_model_and_transforms(name)
    towers = PublishSource.from_checkpoint(Checkpoint.open(url)).towers
    assert towers is not None
    assert float(model_.logit_scale.exp()) == pytest.approx(float(towers.logit_scale.exp()))
    assert preprocess(picture(0)).shape == (3, 32, 32)
    assert "With open_clip" in Path(artifact.url, "README.md").read_text()


def test_only_clip_models_are_published_for_open_clip() -> None:
    with pytest.raises(UserError, match="open_clip is for models that were trained with captions"):
        require_compatible("open_clip", VisionTransformerConfig.model_validate(MODEL), [])


@pytest.mark.multiprocess
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_a_plain_vit_is_one_in_transformers(position: str, synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    from transformers import AutoConfig

    settings = {**MODEL, "layer_scale_init": None, "mlp_ratio": 2.6, "norm_eps": 1e-5, "pos_embed": position}
    torch.manual_seed(0)
    vit = VisionTransformer(VisionTransformerConfig.model_validate(settings)).eval().requires_grad_(False)
    transformers_folder.write(vit, Views(), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path / "transformers").model_type == "vit"
    pixels = torch.randn(3, 3, 32, 32)
    assert max_difference("transformers", tmp_path, PublishSource(vit, Views(), None), pixels) < 1e-5


def test_models_that_timm_has_not_are_published_otherwise(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    settings = {
        "schedule": {"steps": 1, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    }
    odd = {**MODEL, "norm_eps": 1e-4}
    url = pretrain.run(config(synthetic.seed, tmp_path / "odd", **settings, model=odd)).url
    shared: dict[str, Any] = {"checkpoint": url, "images": synthetic.test}
    with pytest.raises(UserError, match=r"model\.norm_eps 0\.0001: timm has no such model; leave timm out"):
        publish(PublishConfig(**shared, formats=["timm"], out=str(tmp_path / "a")))
    found = publish(PublishConfig(**shared, formats=["transformers", "official"], out=str(tmp_path / "b")))
    assert set(found.metrics["max_abs_diff"]) == {"transformers", "official"}
    card = Path(found.url, "README.md").read_text()
    assert "library_name: transformers" in card
    assert "With timm" not in card
    assert PublishSettings(formats=["onnx"]).formats == ["timm", "onnx"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with .json files, some of whose licenses mean harm."""
    path = tmp_path_factory.mktemp("shard") / "images.tar"
    named = ["CC-BY-4.0"] * 6 + ["MIT"] * 3 + ["<script>x</script> | [a](b)"] + [7] * 2  # type: ignore[list-item]
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(named):
            files = {"png": encode_image(picture(number)), "json": json.dumps({"license": name}).encode()}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def trained(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("trained")
    corpus = ingest_folder(shard, root / "corpus").artifact.url
    settings = {
        "schedule": {"steps": 3, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    }
    return Checkpoint.open(pretrain.run(config(corpus, root / "teacher", **settings)).url)


@pytest.fixture
def backbone(trained: Checkpoint, tmp_path: Path) -> Artifact:
    return published(trained, tmp_path / "models" / "{id}")


def published(trained: Checkpoint, out: Path, **changes: Any) -> Artifact:
    corpus = trained.artifact.manifest.inputs["corpus_0"].url
    settings = {"checkpoint": trained.artifact.url, "images": corpus, "formats": ["official"], "out": str(out)}
    return publish(PublishConfig.model_validate(settings | {"name": "small"} | changes))


def test_a_card_tells_licenses_and_compute(backbone: Artifact, trained: Checkpoint, shard: Path) -> None:
    told = Provenance.from_checkpoint(trained.artifact)
    (source,) = told.sources
    assert (source.name, source.images, source.read) == ("images.tar", 12, 12)
    assert source.licenses == {"CC-BY-4.0": 6, "MIT": 3, "<script>x</script> | [a](b)": 1}
    (compute,) = told.compute
    assert (compute.stage, compute.images, compute.devices, compute.kwh) == ("pretrain", 24, "1 x CPU", None)
    assert 0 < compute.hours < 0.1
    card = Path(backbone.url, "README.md").read_text()
    assert r"CC-BY-4.0 (50 %), MIT (25 %), &lt;script&gt;x&lt;/script&gt; \| \[a\](b) (8 %)" in card
    assert str(shard.parent) not in card
    assert "## Intended use" in card
    assert "Not evaluated." in card


def test_energy_is_that_of_the_boards(trained: Checkpoint) -> None:
    metrics = {"images_seen": 3_600_000, "images_per_second": 1000.0, "devices": 8, "device": "NVIDIA H100 80GB HBM3"}
    manifest = trained.artifact.manifest.model_copy(update={"metrics": metrics | {"flops_per_image": 2e9}})
    (compute,) = Provenance.from_checkpoint(Artifact(trained.artifact.url, manifest)).compute
    assert compute.hours == pytest.approx(8)
    assert compute.kwh == pytest.approx(5.6)
    assert compute.flops == pytest.approx(7.2e15)


def test_processors_prepare_images_as_we_do(backbone: Artifact) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(backbone.url)
    image = Image.fromarray(np.asarray(picture(3, (60, 60))))
    views = Views()
    expected = (center_crop(image, 32) / 255.0 - np.array(views.mean)) / np.array(views.std)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=2e-2)


def test_the_latest_is_a_pointer_and_versions_stay(backbone: Artifact, trained: Checkpoint) -> None:
    parent = Path(backbone.url).parent
    pointer = parent / "small.latest.json"
    assert json.loads(pointer.read_text()) == {"id": backbone.id, "folder": Path(backbone.url).name}
    other = published(trained, parent / "{id}", license="mit")
    assert json.loads(pointer.read_text())["folder"] == Path(other.url).name
    assert find(backbone.url) is not None
    with pytest.raises(UserError, match=r"holds an artifact of other settings \(license \"other\", now \"mit\"\)"):
        published(trained, Path(backbone.url), license="mit")
    assert json.loads(pointer.read_text())["folder"] == Path(other.url).name


def test_a_bucket_has_pointers_too(trained: Checkpoint) -> None:
    corpus = trained.artifact.manifest.inputs["corpus_0"].url
    settings = {"checkpoint": trained.artifact.url, "images": corpus, "formats": ["official"], "name": "small"}
    found = publish(PublishConfig.model_validate(settings | {"out": "memory://models/{id}"}))
    assert json.loads(filesystem.read_bytes("memory://models/small.latest.json"))["id"] == found.id
    assert filesystem.exists(found.url_of("official.pth"))
    filesystem.remove("memory://models")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    with serving() as found:
        monkeypatch.setenv("HF_TOKEN", found.token)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", found.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield found


def test_a_backbone_goes_to_the_hub_in_one_commit(hub: Hub, trained: Checkpoint, tmp_path: Path) -> None:
    first = published(trained, tmp_path / "models" / "{id}", hf_repo="me/small")
    repository = hub.repositories["me/small"]
    assert repository.private
    assert len(repository.commits) == 1
    assert repository.tags == {first.id[:12]: repository.commits[0]}
    for file in first.manifest.files:
        assert repository.files[file.path] == Path(first.url, file.path).read_bytes()
    assert len(hub.large) >= 1
    published(trained, tmp_path / "models" / "{id}", hf_repo="me/small")
    assert len(repository.commits) == 1
    second = published(trained, tmp_path / "models" / "{id}", hf_repo="me/small", license="mit")
    assert list(repository.tags) == [first.id[:12], second.id[:12]]


def test_a_version_of_the_hub_holds_nothing_of_the_one_before(hub: Hub, trained: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "models" / "{id}"
    published(trained, out, hf_repo="me/small", formats=["official", "timm"])
    second = published(trained, out, hf_repo="me/small", formats=["official"])
    repository = hub.repositories["me/small"]
    assert set(repository.files) == {file.path for file in second.manifest.files}
    first = published(trained, out, hf_repo="me/small", formats=["official", "timm"])
    assert json.loads((tmp_path / "models" / "small.latest.json").read_text())["id"] == second.id != first.id
    assert str(tmp_path).encode() not in b"".join(repository.files.values())


def test_a_hub_that_refuses_is_one_line_and_the_pointer_stays(
    hub: Hub, trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failing = True
    with pytest.raises(UserError, match=r"hf_repo: me/small: .*507"):
        published(trained, tmp_path / "models" / "{id}", hf_repo="me/small")
    assert hub.repositories["me/small"].tags == {}
    assert not list((tmp_path / "models").glob("*.latest.json"))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="log in with a token"):
        published(trained, tmp_path / "models" / "{id}", hf_repo="me/small")


def test_a_training_that_had_nothing_left_to_do_has_no_speed(trained: Checkpoint) -> None:
    manifest = trained.artifact.manifest
    resumed = manifest.model_copy(update={"metrics": manifest.metrics | {"images_per_second": 0.0}})
    (compute,) = Provenance.from_checkpoint(Artifact(trained.artifact.url, resumed)).compute
    assert (compute.hours, compute.kwh) == (None, None)


def test_folders_of_images_lose_their_paths(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "secret" / "photos", 4), tmp_path / "corpus").artifact
    (source,) = Provenance.from_checkpoint(corpus).sources
    assert source.name == "photos"
    assert source.licenses == {}
