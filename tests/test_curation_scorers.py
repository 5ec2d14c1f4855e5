"""Filters by scores, balancing by captions, blurred faces."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from curation.config import CurateConfig, EmbedConfig, FaceBlur, MaterializeConfig
from curation.embed import embed
from curation.face_blur import FaceBlurrer
from curation.materialize import materialize
from curation.scorers import Head
from curation.steps.config import HeadScorer
from curation.steps.metaclip import EntryMatcher, keep_probabilities
from curation.synthetic.corpus import load_photographs
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.config import OpenClipBackboneConfig
from pretrain.data.decode import decode_rgb
from tests.conftest import encode_image, image_folder, ingest_folder, picture
from tests.pools import curated, pool, unit, written


def silent(checkpoint: str | None) -> Callable[[Sequence[Image.Image]], list[float]]:
    return lambda images: []


def bounds(ledger: list[dict[str, Any]]) -> list[bool]:
    return [row["keep"] for row in ledger]


def brightness(checkpoint: str | None) -> Callable[[Sequence[Image.Image]], list[float]]:
    """A scorer of a user: the mean of all pixels."""
    assert checkpoint is None
    return lambda images: [float(np.asarray(image).mean()) for image in images]


def test_fields_tables_and_plugins_score(tmp_path: Path) -> None:
    fields = [0.1, 0.9, "0.5", None, "x", 0.5]
    rows = [{"json": json.dumps({"punsafe": each}).encode()} for each in fields]
    target = pool(tmp_path, unit(0, 6), rows=rows)
    unsafe = {"kind": "score", "scorer": {"kind": "field", "field": "punsafe"}, "name": "nsfw", "max": 0.5}
    artifact, ledger = curated(tmp_path, target, unsafe)
    assert [row["reason"] for row in ledger] == ["kept", "high_nsfw", "kept", "no_nsfw", "no_nsfw", "kept"]
    assert ledger[1]["score"] == np.float32(0.9)
    assert pq.read_table(artifact.local_file("step-00-scores.parquet"))["score"].to_pylist()[:3] == [0.1, 0.9, 0.5]

    table = pa.table({"key": [f"k{i:04d}" for i in (5, 4, 3, 2, 1, 9)], "fun": [5.0, 4.0, 3.0, 2.0, 1.0, 9.0]})
    pq.write_table(table, tmp_path / "scores.parquet")
    scorer = {"kind": "table", "table": str(tmp_path / "scores.parquet"), "column": "fun"}
    first, ledger = curated(tmp_path, target, {"kind": "score", "scorer": scorer, "top": 0.5})
    assert bounds(ledger) == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]  # int(5 * 0.5) and one more, as DataComp does
    assert first.metrics["steps"][0]["least"] == 3.0
    pq.write_table(table.slice(1), tmp_path / "scores.parquet")
    second, _ = curated(tmp_path, target, {"kind": "score", "scorer": scorer, "top": 0.5})
    assert second.id != first.id
    with pytest.raises(UserError, match="in columns key and nope"):
        curated(tmp_path, target, {"kind": "score", "scorer": {**scorer, "column": "nope"}, "min": 0})

    images = [encode_image(Image.new("RGB", (8, 8), (gray, gray, gray))) for gray in (10, 200, 90)]
    plugin = {"kind": "plugin", "name": f"{__name__}:brightness"}
    _, ledger = curated(tmp_path, written(tmp_path / "w", images), {"kind": "score", "scorer": plugin, "min": 90})
    assert bounds(ledger) == [False, True, True]
    with pytest.raises(UserError, match="importable"):
        curated(tmp_path, target, {"kind": "score", "scorer": {**plugin, "name": "nowhere:f"}, "min": 0})


def test_what_the_web_calls_a_number_must_be_one(tmp_path: Path) -> None:
    fields = ["1e999", "Infinity", "NaN", "true", '"Infinity"', "0.5", "null", "[1]", "1e308"]
    rows = [{"json": f'{{"a": {each}}}'.encode()} for each in fields]
    step = {"kind": "score", "scorer": {"kind": "field", "field": "a"}, "top": 1.0}
    artifact, ledger = curated(tmp_path, pool(tmp_path, unit(0, 9), rows=rows), step)
    assert np.flatnonzero(bounds(ledger)).tolist() == [5, 8]
    assert artifact.metrics["steps"][0]["least"] == 0.5


def test_tables_with_keys_twice_or_without_numbers_are_refused(tmp_path: Path) -> None:
    target = pool(tmp_path, unit(0, 3))
    step = {"kind": "score", "scorer": {"kind": "table", "table": str(tmp_path / "t.parquet")}, "min": 2.0}
    keys = pa.array(["k0002", "k0000"]).dictionary_encode()
    pq.write_table(pa.table({"key": keys, "score": pa.array([2**60, 1])}), tmp_path / "t.parquet")
    assert bounds(curated(tmp_path, target, step)[1]) == [False, False, True]
    for table, message in (
        ({"key": ["a", "a"], "score": [1.0, 2.0]}, "has keys twice"),
        ({"key": ["a"], "score": ["high"]}, "no parquet file with keys and numbers"),
    ):
        pq.write_table(pa.table(table), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=message):
            curated(tmp_path, target, step)


def test_a_plugin_does_not_see_damaged_images_and_must_answer_for_each_other(tmp_path: Path) -> None:
    target = written(tmp_path, [encode_image(picture(0)), encode_image(picture(1))[:-40]])
    plugin = {"kind": "plugin", "name": f"{__name__}:brightness"}
    _, ledger = curated(tmp_path, target, {"kind": "score", "scorer": plugin, "min": 0})
    assert [row["reason"] for row in ledger] == ["kept", "no_score"]
    for name, message in ((f"{__name__}:silent", r"\(0,\) numbers for 1 images"), ("math:pi", "no function of images")):
        with pytest.raises(UserError, match=message):
            curated(tmp_path, target, {"kind": "score", "scorer": plugin | {"name": name}, "min": 0})


def test_layers_of_a_head_are_ordered_by_number_and_nothing_else_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(6)]
    deep = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
    save_file(deep.state_dict(), tmp_path / "deep.safetensors")
    vectors = unit(0, 5).astype(np.float32)
    found = Head(HeadScorer(checkpoint=str(tmp_path / "deep.safetensors"), activation="relu"))(vectors)
    with torch.inference_mode():
        expected = deep[:-1](torch.from_numpy(vectors))[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    normal = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    named = {f"{name}.{part}": torch.zeros(size) for name in "xy" for part, size in (("weight", (4, 4)), ("bias", 4))}
    for state in (normal.state_dict(), named, {"positional_embedding": torch.zeros(4, 4)}, {}):
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=r"is it a head|number them"):
            Head(HeadScorer(checkpoint=str(tmp_path / "bad.safetensors")))
    with pytest.raises(UserError, match="has 4 outputs"):
        Head(HeadScorer(checkpoint=str(tmp_path / "deep.safetensors"), unit=4))
    (tmp_path / "page.pt").write_text("<html>404")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Head(HeadScorer(checkpoint=str(tmp_path / "page.pt")))


@pytest.mark.parametrize(("activation", "output"), [("none", "identity"), ("relu", "softmax"), ("relu", "sigmoid")])
def test_a_head_scores_embeddings_as_torch_does(tmp_path: Path, activation: str, output: str) -> None:
    torch.manual_seed(0)
    between = nn.ReLU() if activation == "relu" else nn.Dropout(0.2)
    head = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 2)).eval()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    last = {"identity": nn.Identity(), "softmax": nn.Softmax(-1), "sigmoid": nn.Sigmoid()}[output]
    vectors = unit(0, 20)
    with torch.inference_mode():
        expected = last(head(torch.from_numpy(vectors.astype(np.float32))))[:, 1].numpy()
    scorer = {"kind": "head", "checkpoint": str(tmp_path / "head.pth"), "unit": 1}
    step = {"kind": "score", "scorer": scorer | {"activation": activation, "output": output}, "top": 0.3}
    artifact, ledger = curated(tmp_path, pool(tmp_path, vectors), step)
    found = pq.read_table(artifact.local_file("step-00-scores.parquet"))["score"].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(np.flatnonzero(bounds(ledger))) == set(np.argsort(-expected)[:7])
    with pytest.raises(UserError, match="for vectors of 4 dimensions, not 5"):
        curated(tmp_path, pool(tmp_path, unit(0, 20, 5), "five"), step)
    with pytest.raises(UserError, match="needed by the step score"):
        curated(tmp_path, written(tmp_path / "w", [encode_image(picture(0))]), step)
    wrong = {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3), "b.weight": torch.zeros(2, 5)}
    torch.save(wrong, tmp_path / "head.pth")
    with pytest.raises(UserError, match="is it a head"):
        curated(tmp_path, pool(tmp_path, vectors), {**step, "name": "other"})


def test_captions_score_as_open_clip_does(tmp_path: Path, clip: OpenClipBackboneConfig) -> None:
    source = image_folder(tmp_path / "images", 4)
    captions = ["a red house", "", "two blue birds on a tree", "a house"]
    for number, caption in enumerate(captions):
        if caption:
            (source / f"{number:04d}.txt").write_text(caption)
    corpus = ingest_folder(source, tmp_path / "corpus").artifact.url
    vectors = embed(EmbedConfig(corpus=corpus, backbone=clip, out=str(tmp_path / "vectors"))).url
    step = {"kind": "score", "scorer": {"kind": "caption", "model": clip.model_dump()}, "name": "clip", "min": -1.0}
    from curation import run

    artifact = run(CurateConfig(corpus=corpus, embeddings=vectors, steps=[step], out=str(tmp_path / "selection")))
    found = pq.read_table(artifact.local_file("step-00-scores.parquet"))["score"].to_numpy()
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.checkpoint)
    tokens = open_clip.get_tokenizer("tiny-clip")(captions)
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([preprocess(picture(i)) for i in range(4)]), normalize=True)
        expected = (images * model.encode_text(tokens, normalize=True)).sum(1).numpy()
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2, 3]], expected[[0, 2, 3]], atol=2e-3)  # embeddings are float16
    other = embed(EmbedConfig(corpus=corpus, out=str(tmp_path / "pixels"))).url
    with pytest.raises(UserError, match="embed with that model"):
        run(CurateConfig(corpus=corpus, embeddings=other, steps=[step], out=str(tmp_path / "bad")))


def test_entries_are_whole_words_of_any_case() -> None:
    entries = EntryMatcher(["cat", "New  York", "york", "", "Cat", "c++"])
    assert len(entries) == 4  # cat twice; of c++ the letter
    assert entries.within("A cat in new-york, CATS and york").tolist() == [0, 1, 2]
    assert entries.within("concatenate").tolist() == []


def test_frequent_entries_are_thinned_and_rare_ones_stay(tmp_path: Path) -> None:
    captions = ["a dog"] * 400 + ["a dog and a heron"] * 5 + ["nothing here"] * 10 + [None] * 5 + ["a newt"] * 20
    (tmp_path / "entries.txt").write_text("dog\nheron\nnewt\n")
    target = pool(tmp_path, unit(0, len(captions)), rows=[{"caption": each} for each in captions])
    step = {"kind": "metaclip", "entries": str(tmp_path / "entries.txt"), "most": 40}
    artifact, ledger = curated(tmp_path, target, step)
    kept = np.array(bounds(ledger))
    assert 20 <= kept[:400].sum() <= 62  # 39.5 are expected
    assert kept[400:405].all()
    assert kept[420:].all()
    assert {row["reason"] for row in ledger[405:420]} == {"no_metadata_match"}
    lost = [row for row in ledger[:400] if not row["keep"]]
    assert lost[0]["score"] == np.float32(40 / 405)
    assert artifact.metrics["steps"][0]["entries_above"] == 1


def test_chances_are_those_of_drawing_each_entry_for_itself() -> None:
    rng = np.random.default_rng(0)
    found, counts = [np.array([0, 1]), np.array([1]), np.array([], dtype=int)], np.array([50, 20])
    chances = keep_probabilities(found, counts, 10)
    draws = rng.random((200_000, 2)) < np.array([0.2, 0.5])
    assert chances[0] == pytest.approx(draws.any(1).mean(), abs=5e-3)
    assert chances[1:].tolist() == [0.5, 0.0]


def test_faces_are_blurred_and_all_else_keeps_its_bytes(tmp_path: Path) -> None:
    photographs = load_photographs()
    face = Image.fromarray(photographs["astronaut"])
    images = [
        encode_image(face, "JPEG", quality=92),
        encode_image(face),
        encode_image(face, "BMP"),
        encode_image(picture(1)),
        b"",
    ]
    blurrer = FaceBlurrer(FaceBlur())
    for data, given, extension in zip(images[:3], ("jpeg", "png", "bmp"), ("jpeg", "png", "png"), strict=True):
        changed = blurrer.blur(given, data)
        assert changed is not None
        assert changed[0] == extension
    assert blurrer.blur("jpg", images[4]) is None
    target = written(tmp_path, images[:4])
    selection, _ = curated(tmp_path, target, {"kind": "exact"})
    config = MaterializeConfig(corpus=target.corpus, selection=selection.url, out=str(tmp_path / "plain"))
    artifact = materialize(config.model_copy(update={"blur_faces": FaceBlur(), "out": str(tmp_path / "blurred")}))
    plain, blurred = Corpus.open(materialize(config).url), Corpus.open(artifact.url)
    assert artifact.metrics["blurred"] == 3
    assert [plain.read_image(row) for row in range(4)] == images[:4]
    assert blurred.read_image(3) == images[3]
    before, after = (np.asarray(decode_rgb(each.read_image(1))).astype(int) for each in (plain, blurred))
    different = np.abs(before - after).max(axis=2) > 8
    rows, columns = np.nonzero(different)
    assert 0.02 < different.mean() < 0.2
    assert (rows.min() < 110) & (rows.max() < 250) & (columns.min() > 130) & (columns.max() < 330)  # her face
    assert Image.open(io.BytesIO(blurred.read_image(2))).format == "PNG"
    with pytest.raises(UserError, match="no such file"):
        FaceBlurrer(FaceBlur(model=str(tmp_path / "nope.onnx")))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a YuNet"):
        FaceBlurrer(FaceBlur(model=str(tmp_path / "bad.onnx")))


def test_no_image_of_a_sample_keeps_a_face_and_no_member_is_lost(tmp_path: Path) -> None:
    face = Image.fromarray(load_photographs()["astronaut"])
    source = tmp_path / "source.tar"
    mask = encode_image(Image.new("L", (8, 8), 3))
    files = {
        "a.bmp": encode_image(face, "BMP"),
        "a.seg.png": mask,
        "a.depth.png": encode_image(face),
        "a.json": b"{}",
    }
    with tarfile.open(source, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    corpus = ingest_folder(source, tmp_path / "corpus")
    entry = corpus.index_row(0)
    selection = tmp_path / "selection"
    from curation import run

    run(CurateConfig(corpus=corpus.artifact.url, steps=[{"kind": "exact"}], out=str(selection)))
    config = MaterializeConfig(corpus=corpus.artifact.url, selection=str(selection), out=str(tmp_path / "out"))
    blurred = Corpus.open(materialize(config.model_copy(update={"blur_faces": FaceBlur()})).url)
    blurrer, after = FaceBlurrer(FaceBlur()), blurred.index_row(0)
    assert len(after["members"]) == len(entry["members"]) == 3
    contents = {
        each["name"]: blurred.read_range(after["shard"], each["offset"], each["size"])
        for each in (after["image"], *after["members"])
    }
    assert mask in contents.values()
    assert blurred.read_image(0) == contents[after["image"]["name"]]
    assert not any(blurrer.blur("x", data) for data in contents.values())
