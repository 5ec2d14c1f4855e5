"""Configuration: what is wrong is named, with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from curation.config import CurateSettings
from flows.config import PipelineConfig
from infra.config import describe, load_yaml
from infra.errors import UserError
from pretrain.config import PretrainSettings


def message(model: type, content: dict[str, object]) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(content)
    return describe(caught.value, model)


def test_an_unknown_key_is_named_with_those_allowed() -> None:
    text = message(PretrainSettings, {"optimizer": {"lr": 1.0}})
    assert text.startswith("optimizer.lr: unknown key; allowed here: base_lr, betas, eps")


def test_an_unknown_key_in_a_list_of_kinds_is_named_with_those_of_its_kind() -> None:
    text = message(CurateSettings, {"steps": [{"kind": "retrieve", "treshold": 1}]})
    assert "allowed here: index, k, kind, min_similarity, recall_audit_images, without_replacement" in text


def test_an_unknown_kind_names_the_kinds() -> None:
    text = message(CurateSettings, {"steps": [{"kind": "dedupe"}]})
    assert "near_duplicates, " in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"embed_dim": 100, "num_heads": 3}}, "embed_dim 100 is no multiple of num_heads 3"),
        ({"views": {"global_crops": {"size": 100}}}, "no multiple of patch_size"),
        ({"optimizer": {"grad_clip": -1}}, "optimizer.grad_clip: input should be greater than 0, got -1"),
        ({"objectives": []}, "objectives: list should have at least 1 item"),
    ],
)
def test_a_wrong_value_is_one_line(content: dict[str, object], expected: str) -> None:
    text = message(PretrainSettings, content)
    assert expected in text
    assert "\n" not in text


def test_a_pipeline_needs_one_source_of_images() -> None:
    assert "either sources or synthetic" in message(PipelineConfig, {"root": "x"})


def test_variables_in_sources_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"pool": "${SOME_DATA}/pool", "test": "t", "train": "t"}
    assert "SOME_DATA is not set" in message(PipelineConfig, {"root": "x", "sources": sources})
    monkeypatch.setenv("SOME_DATA", "/data")
    config = PipelineConfig.model_validate({"root": "x", "sources": sources})
    assert config.sources is not None
    assert config.sources.pool == "/data/pool"


@pytest.mark.parametrize(
    ("content", "expected"), [("a: [1", "not valid YAML"), ("- a", "no mapping"), (None, "no such file")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=expected):
        load_yaml(path)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("flows/pipelines/*.yaml")), ids=lambda p: p.stem)
def test_shipped_pipelines_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_DATA", "/data")
    PipelineConfig.model_validate(load_yaml(path))
