"""Whole evaluations: suites, reports, datasets by name, the gate, comparisons, interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import curation
import pretrain
from curation.config import CurateConfig, EmbedConfig
from curation.embed import embed
from eval import run
from eval.config import SUITES, EvaluateConfig, EvaluateSettings, Gate
from eval.data.datasets import ingest_named
from eval.gate import require
from eval.protocols import registry
from eval.protocols.files import referenced_files
from eval.report.templating import PAGE
from eval.stats.scores import select_headlines
from infra.artifacts.artifact import Artifact, find, open_artifact
from infra.corpus.corpus import Corpus
from infra.errors import RegressionError, UserError
from pretrain.backbones.config import CheckpointBackboneConfig, PixelDescriptorConfig
from tests.conftest import SyntheticCorpora, encode_image, exit_code, picture
from tests.eval_contexts import PIXELS, tinted
from tests.test_pretrain_training import config

GRAY = PixelDescriptorConfig(side=2, frequencies=1, whiten=0.0)
TASKS = [
    {"kind": "knn", "k": [5, 10]},
    {"kind": "logistic", "C": [1.0]},
    {"kind": "representation", "images": 60},
]


def settings(synthetic: SyntheticCorpora, out: Path, **changes: object) -> EvaluateConfig:
    given = {
        "model": PIXELS,
        "datasets": {"train": synthetic.seed, "test": synthetic.test},
        "tasks": TASKS,
        "bootstrap": 50,
        "pictures": 3,
        "out": str(out / "{id}"),
    }
    return EvaluateConfig.model_validate(given | changes)


@pytest.fixture(scope="module")
def teacher(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("teacher") / "run"
    return pretrain.run(config(synthetic.seed, out, schedule={"steps": 2, "global_batch_size": 8}))


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_every_suite_is_valid_and_written_out(name: str) -> None:
    found = EvaluateSettings(suite=name)
    assert found.suite is None
    assert found == EvaluateSettings.model_validate(found.settings())
    more = EvaluateSettings.model_validate({"suite": name, "tasks": [{"kind": "knn", "name": "more"}]})
    assert more.tasks[:-1] == found.tasks
    assert {task.kind for task in found.tasks} <= set(registry.PROTOCOLS)


def test_settings_that_cannot_be_are_refused() -> None:
    assert [task.kind for task in EvaluateSettings().tasks] == ["knn", "logistic", "representation"]
    with pytest.raises(ValueError, match="knn is there twice; give one a name"):
        EvaluateSettings.model_validate({"tasks": [{"kind": "knn"}, {"kind": "knn", "k": [3]}]})
    with pytest.raises(ValueError, match="a-b is there twice; give one a name"):
        EvaluateSettings.model_validate({"tasks": [{"kind": "knn", "name": "a b"}, {"kind": "knn", "name": "A-b"}]})
    for wrong in ({"kind": "knn", "name": "<b>"}, {"kind": "knn", "k": [0]}, {"kind": "few_shot", "shots": [0]}):
        with pytest.raises(ValueError, match=r"should match pattern|greater than 0"):
            EvaluateSettings.model_validate({"tasks": [wrong]})
    with pytest.raises(ValueError, match="leaks: tset is no dataset"):
        EvaluateConfig.model_validate(
            {"model": PIXELS, "datasets": {"train": "x", "test": "y"}, "leaks": {"tset": "z"}}
        )
    with pytest.raises(ValueError, match="from 1 to 5"):
        EvaluateSettings.model_validate({"tasks": [{"kind": "corruptions", "severities": [6]}]})
    with pytest.raises(ValueError, match="knn needs test"):
        EvaluateConfig.model_validate({"model": PIXELS, "datasets": {"train": "x"}})


def test_a_report_has_numbers_baselines_pictures_and_a_page(
    synthetic: SyntheticCorpora, teacher: Artifact, tmp_path: Path
) -> None:
    tasks = [*TASKS, {"kind": "image_text", "test": "captions"}, {"kind": "zero_shot"}]
    report = run(settings(synthetic, tmp_path, model=CheckpointBackboneConfig(url=teacher.url), tasks=tasks))
    assert set(report.metrics) == {"knn", "logistic", "representation"}
    assert set(report.metrics["knn"]) == {"model", "untrained", "pixels"}
    assert set(report.metrics["representation"]) == {"model", "untrained"}
    names = {file.path for file in report.manifest.files}
    assert names >= {
        *("report.json", PAGE, "pca.png", "attention.png", "map.png"),
        *("knn-neighbors.png", "knn-confusion.png", "knn-curve.png", "logistic-confusion.png"),
    }
    told = report.read_json("report.json")
    assert told["left_out"] == {"image_text": "no dataset captions", "zero_shot": "the backbone lacks a text tower"}
    for row in told["rows"]:
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    first = select_headlines(told["rows"])[0]
    assert (first["protocol"], first["model"]) == ("knn", "model")
    html = report.read_bytes(PAGE).decode()
    assert html.count("data:image/png") == sum(name.endswith(".png") for name in names)
    assert "image_text (no dataset captions)" in html
    alone = settings(synthetic, tmp_path, tasks=[{"kind": "segmentation"}])
    with pytest.raises(UserError, match="segmentation: the backbone lacks patch tokens; there is nothing else"):
        run(alone)
    assert len(list((tmp_path / "features").iterdir())) == 6  # two sets by three subjects, each once


def test_what_was_scored_before_a_kill_is_not_scored_again(
    synthetic: SyntheticCorpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings(synthetic, tmp_path / "whole"))
    count = 0
    honest = registry.run

    def dying(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        run(settings(synthetic, tmp_path / "killed"))
    again = run(settings(synthetic, tmp_path / "killed"))
    assert count == 6  # five tasks of the model and the baseline, and the one that was interrupted
    assert again.id == whole.id
    assert {file.path: file.sha256 for file in again.manifest.files} == {
        file.path: file.sha256 for file in whole.manifest.files
    }


def test_the_gate_closes_where_scores_fell(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    reports = [run(settings(synthetic, tmp_path, model=each, baselines=False)) for each in (PIXELS, GRAY)]
    poor, good = sorted(reports, key=lambda report: report.metrics["logistic"]["model"])
    require(good, Gate(report=poor.url, protocols=["logistic"]))
    require(poor, Gate(report=good.url, max_drop=1000))
    fell = good.metrics["logistic"]["model"] - poor.metrics["logistic"]["model"]
    assert fell > 0.01
    with pytest.raises(RegressionError, match=r"logistic 0\.\d+ to 0\.\d+ \(allowed 0\.01\)"):
        require(poor, Gate(report=good.url, protocols=["logistic"]))
    other = run(
        settings(synthetic, tmp_path, datasets={"train": synthetic.test, "test": synthetic.seed}, baselines=False)
    )
    with pytest.raises(UserError, match="knn has other datasets or settings than in"):
        require(other, Gate(report=good.url))
    with pytest.raises(UserError, match="gate: linear: not in both"):
        require(poor, Gate(report=good.url, protocols=["linear"]))


def test_leaks_are_found_by_curation_and_left_out_of_scores(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    """The pool leaks some images of the test set: over that set, what is near the pool is dropped."""
    descriptor = PixelDescriptorConfig(side=16, frequencies=8, whiten=1.5)
    urls = {
        name: embed(EmbedConfig(corpus=url, backbone=descriptor, out=str(tmp_path / name))).url
        for name, url in (("pool", synthetic.pool), ("test", synthetic.test))
    }
    selection = curation.run(
        CurateConfig.model_validate(
            {
                "corpus": synthetic.test,
                "embeddings": urls["test"],
                "eval_embeddings": [urls["pool"]],
                "steps": [{"kind": "decontaminate", "threshold": 0.88, "count_components": False}],
                "out": str(tmp_path / "leaks"),
            }
        )
    )
    leaked = len(Corpus.open(synthetic.test)) - selection.metrics["kept"]
    assert leaked >= 10
    report = run(settings(synthetic, tmp_path, leaks={"test": selection.url}, baselines=False))
    rows = [row for row in report.read_json("report.json")["rows"] if row["protocol"] == "knn"]
    assert all(row["leaked"] == leaked and row["without_leaks"] is not None for row in rows)
    assert "Without leaks" in report.read_bytes(PAGE).decode()
    assert report.id != run(settings(synthetic, tmp_path, baselines=False)).id
    with pytest.raises(UserError, match="judges another corpus"):
        run(settings(synthetic, tmp_path, leaks={"train": selection.url}))


def test_scores_on_the_images_that_were_learned_from_say_nothing(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    same = settings(synthetic, tmp_path, model=PIXELS, tasks=[{"kind": "knn"}], pictures=0)
    report = run(same.model_copy(update={"datasets": {"train": synthetic.test, "test": synthetic.test}}))
    assert report.read_json("report.json")["verdict"].startswith("Says nothing: train and test are the same images.")


def test_the_command_takes_folders_suites_and_words(
    synthetic: SyntheticCorpora, teacher: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tinted(tmp_path / "one", 30, 1)
    tinted(tmp_path / "two", 20, 2)
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"tasks": TASKS, "bootstrap": 50, "pictures": 0, "baselines": False})
    )
    common = ("--datasets.train", str(tmp_path / "one" / "images"), "--datasets.test", str(tmp_path / "two" / "images"))
    out = ("--out", str(tmp_path / "reports" / "{id}"))
    urls = []
    for model in ("pixels", teacher.url):
        assert exit_code("eval", model, str(tmp_path / "mine.yaml"), *common, *out) == 0
        shown = capsys.readouterr()
        urls.append(shown.out.strip())
        assert "logistic" in shown.err
    assert open_artifact(urls[0], "report").manifest.config["left_out"] == {}
    assert exit_code("compare", urls[0], f"teacher={urls[1]}", "--out", str(tmp_path / "compared")) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "compared")
    compared = open_artifact(str(tmp_path / "compared"), "report")
    assert set(compared.metrics["knn"]) == {"1: pixels", "teacher"}
    assert "teacher" in compared.read_bytes(PAGE).decode()
    rows = {(row["protocol"], row["model"]): row for row in compared.read_json("report.json")["rows"]}
    knn, rank = rows["knn", "teacher"], rows["representation", "teacher"]
    assert knn["gain_low"] <= knn["gain"] <= knn["gain_high"]
    assert rank["gain_low"] is None
    (tmp_path / "all.yaml").write_text(
        yaml.safe_dump({"model": {"kind": "pixels"}, "datasets": {"test": synthetic.test}, "tasks": [TASKS[2]]})
    )
    assert exit_code("eval", str(tmp_path / "all.yaml"), *out) == 0
    assert find(capsys.readouterr().out.strip()) is not None
    gate = ("--gate.report", urls[0], "--gate.protocols", "knn", "--gate.max_drop", "0")
    worse = exit_code("eval", "pixels", str(tmp_path / "mine.yaml"), *common, *out, *gate, "--seed", "3")
    assert worse == 0  # the same kNN
    assert "regression" not in capsys.readouterr().err


def test_images_and_maps_in_two_folders_are_a_dataset(tmp_path: Path) -> None:
    for number in range(3):
        for folder, kind, data in (
            ("images", "jpg", encode_image(picture(number), "JPEG")),
            ("masks", "png", encode_image(Image.fromarray(np.full((32, 40), number, np.uint8)))),
        ):
            path = tmp_path / folder / "clip" / f"{number:02d}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (tmp_path / "images" / "alone.jpg").write_bytes(encode_image(picture(9), "JPEG"))
    name = f"pairs:{tmp_path / 'images'}:{tmp_path / 'masks'}"
    corpus = Corpus.from_artifact(ingest_named(name, str(tmp_path / "corpus")))
    assert corpus.keys == ["clip/00", "clip/01", "clip/02"]
    from eval.data.dense_labels import read_map

    np.testing.assert_array_equal(read_map(corpus, 2, "depth.png"), 2)
    (tmp_path / "masks" / "clip" / "00.png").write_bytes(encode_image(picture(5)))
    again = Corpus.from_artifact(ingest_named(name, str(tmp_path / "again")))
    assert again.artifact.id != corpus.artifact.id
    with pytest.raises(UserError, match=r"00\.map\.png has 3 channels"):
        read_map(again, 0, "seg.png")
    with pytest.raises(UserError, match="no image has a PNG of the same name"):
        ingest_named(f"pairs:{tmp_path / 'images'}:{tmp_path / 'corpus'}", str(tmp_path / "x"))


def test_datasets_of_torchvision_are_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "files" / "eurosat" / "2750"
    for number in range(6):
        path = folder / ("Forest", "River")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(picture(number), "JPEG"))
    corpus = Corpus.from_artifact(
        ingest_named(f"torchvision:EuroSAT/all@{tmp_path / 'files'}", str(tmp_path / "corpus"))
    )
    assert corpus.classes == ["Forest", "River"]
    np.testing.assert_array_equal(corpus.labels, [0, 0, 0, 1, 1, 1])
    with pytest.raises(UserError, match="has the splits train, test"):
        ingest_named("torchvision:CIFAR10/val", str(tmp_path / "x"))
    with pytest.raises(UserError, match="no such dataset; there are CIFAR10"):
        ingest_named("torchvision:CIFAR11/test", str(tmp_path / "x"))
    from torchvision import datasets

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", unreachable)
    with pytest.raises(UserError, match=r"CIFAR10/test: cannot be had \(no network\); put torchvision's files below"):
        ingest_named("torchvision:CIFAR10/test", str(tmp_path / "x"))


def test_files_of_tasks_are_part_of_a_reports_id(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({}))
    task = {"kind": "copy_detection", "queries": "train", "ground_truth": str(truth)}
    found = settings(synthetic, tmp_path, tasks=[task])
    before = referenced_files(found.tasks, found.datasets)
    truth.write_text(json.dumps({"a": []}))
    assert referenced_files(found.tasks, found.datasets) != before
    truth.unlink()
    with pytest.raises(UserError, match="no such file; the task copy_detection reads it"):
        referenced_files(found.tasks, found.datasets)
