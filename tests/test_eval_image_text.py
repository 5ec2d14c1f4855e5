"""Protocols of models that know images and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torchmetrics.functional.retrieval import retrieval_hit_rate

import pretrain
from eval.protocols import image_text, zero_shot
from eval.protocols.files import read_prompts
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig, OpenClipBackboneConfig, TransformersBackboneConfig
from pretrain.backbones.image_text import load as load_image_text
from pretrain.data.decode import decode_rgb
from tests.conftest import encode_image, picture
from tests.eval_contexts import PIXELS, make_context, make_model, samples, tinted, unit
from tests.test_pretrain_training import TINY


def test_zero_shot_is_that_of_open_clip(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    corpus = tinted(tmp_path, 24, 1)
    spoken = {"class0": "cat", "class1": "dog", "class2": "fire engine"}
    (tmp_path / "names.yaml").write_text(yaml.safe_dump(spoken))
    task = {"kind": "zero_shot", "prompts": "photos", "class_names": str(tmp_path / "names.yaml")}
    opened = make_context({"test": corpus}, [task], pictures=3)
    outcome = zero_shot.zero_shot(opened.settings.tasks[0], make_model(tmp_path, clip), opened)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.checkpoint)
    tokenize = open_clip.get_tokenizer("tiny-clip")
    with torch.inference_mode():
        images = torch.stack([preprocess(decode_rgb(corpus.read_image(row))) for row in range(len(corpus))])
        vectors = [
            model.encode_text(tokenize([each.format(name) for each in read_prompts("photos")]), normalize=True).mean(0)
            for name in spoken.values()
        ]
        logits = model.eval().encode_image(images, normalize=True) @ F.normalize(torch.stack(vectors), dim=1).T
    expected = float((logits.argmax(1).numpy() == corpus.labels).mean())
    assert outcome.scores[0].value == pytest.approx(expected)
    assert set(outcome.pictures) == {"confusion"}


def test_ranks_are_those_of_torchmetrics() -> None:
    queries, answers = unit(0, 40), unit(1, 70)
    right = [np.random.default_rng(i).choice(70, 3, replace=False) for i in range(40)]
    found = image_text.rank_answers(queries, answers, right)
    for k in (1, 5, 10):
        for i in range(40):
            target = torch.zeros(70, dtype=torch.bool)
            target[right[i]] = True
            hit = retrieval_hit_rate(torch.from_numpy(queries[i] @ answers.T), target, top_k=k)
            assert bool(hit) == (found[i] < k)


def test_equal_answers_do_not_count_as_found() -> None:
    """A model that gives every text the same vector must not reach R@1."""
    same = np.tile(unit(0, 1), (10, 1))
    np.testing.assert_array_equal(image_text.rank_answers(same, same, [np.array([i]) for i in range(10)]), 9)


def test_images_and_captions_find_one_another(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    words = ["one red bird", "two blue fish", "three green cups", "four old cars"]
    corpus = samples(
        tmp_path,
        {
            str(i): {"png": encode_image(picture(i)), "txt": f"{word}\n\nagain {word}\n".encode()}
            for i, word in enumerate(words)
        },
    )
    captions, owner = image_text.read_captions(corpus, lines=True)
    assert captions[:2] == ["one red bird", "again one red bird"]
    np.testing.assert_array_equal(owner, [0, 0, 1, 1, 2, 2, 3, 3])
    opened = make_context({"test": corpus}, [{"kind": "image_text", "recall_at": [1, 4]}])
    scores = image_text.image_text(opened.settings.tasks[0], make_model(tmp_path, clip), opened).scores
    assert [score.metric for score in scores] == [
        *("R@1, image to text", "R@4, image to text", "R@1, text to image", "R@4, text to image"),
    ]
    assert scores[3].value == 1.0
    images, vectors = make_model(tmp_path, clip).joint_vectors(corpus), load_image_text(clip).texts(captions)
    expected = (owner[(images @ vectors.T).argmax(1)] == np.arange(4)).mean()
    assert scores[0].value == pytest.approx(expected)


def test_coco_captions_are_five_an_image(shared_data: Path, clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    from tests.conftest import ingest_folder

    corpus = ingest_folder(shared_data / "coco_mini" / "val-000000.tar", tmp_path / "corpus")
    captions, owner = image_text.read_captions(corpus, lines=True)
    assert len(captions) == len(owner)
    assert np.bincount(owner, minlength=len(corpus)).min() == 5
    opened = make_context({"test": corpus}, [{"kind": "image_text"}])
    scores = image_text.image_text(opened.settings.tasks[0], make_model(tmp_path, clip), opened).scores
    assert [score.value for score in scores[:3]] == sorted(score.value for score in scores[:3])


def test_words_are_written_and_their_effect_is_told(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100), "navy")
    written = np.asarray(zero_shot.draw_word(image, "elephant")).astype(int)
    label = (written.min(-1) > 240).any(0)
    assert 140 < label.sum() <= 150  # three quarters of the width
    assert (written.max(-1) < 60).any()  # black letters
    corpus = tinted(tmp_path, 12, 1)
    opened = make_context({"test": corpus}, [{"kind": "typographic"}])
    attacked, plain, believed = zero_shot.typographic(
        opened.settings.tasks[0], make_model(tmp_path, clip), opened
    ).scores
    zero = make_context({"test": corpus}, [{"kind": "zero_shot"}])
    (expected,) = zero_shot.zero_shot(zero.settings.tasks[0], make_model(tmp_path, clip), zero).scores
    assert plain.value == expected.value
    assert attacked.value + believed.value <= 1
    assert believed.better == "lower"


def test_templates_and_names_that_do_not_fit_are_named(tmp_path: Path) -> None:
    assert read_prompts("plain") == ["a photo of a {}."]
    (tmp_path / "bad.txt").write_text("a photo\n")
    with pytest.raises(UserError, match=r"every line needs \{\} once"):
        read_prompts(str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="there are photos, plain"):
        read_prompts("nope")
    with pytest.raises(UserError, match="kind pixels: has no text tower"):
        load_image_text(PIXELS)


def test_a_checkpoint_with_clip_has_both_towers(tmp_path: Path) -> None:
    corpus = samples(
        tmp_path, {str(i): {"png": encode_image(picture(i)), "txt": f"picture {i}".encode()} for i in range(8)}
    )
    text = {"context": 8, "width": 16, "num_heads": 2, "layers": 1}
    settings = TINY | {
        "objectives": [{"kind": "clip", "embed_dim": 16, "text": text}],
        "schedule": {"steps": 2, "global_batch_size": 4},
        "runtime": {"num_workers": 0},
    }
    config = pretrain.config.PretrainConfig.model_validate(
        settings | {"corpora": [corpus.artifact.url], "out": str(tmp_path / "clip")}
    )
    trained = pretrain.run(config)
    model = CheckpointBackboneConfig(url=trained.url)
    opened = make_context({"test": corpus}, [{"kind": "image_text"}])
    scores = image_text.image_text(opened.settings.tasks[0], make_model(tmp_path, model), opened).scores
    assert scores[2].value == 1.0  # R@10 of eight
    vectors = load_image_text(model).texts(["picture 1", "picture 2"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(UserError, match="no trained text tower"):
        load_image_text(model.model_copy(update={"untrained": True}))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_pairs_of_transformers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    from tests.transformers_pairs import saved

    model, processor = saved(family, tmp_path / "model")
    config = TransformersBackboneConfig(checkpoint=str(tmp_path / "model"))
    pair = load_image_text(config)
    corpus = samples(tmp_path, {str(i): {"png": encode_image(picture(i, (32, 32)))} for i in range(3)})
    joint = make_model(tmp_path, config).joint_vectors(corpus)
    words = ["a b c", "c b"]
    longest = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer(words, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
    pixels = processor.image_processor([decode_rgb(corpus.read_image(i)) for i in range(3)], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.inference_mode():
        out = model(pixel_values=pixels, **tokens)
    np.testing.assert_allclose(joint, out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(pair.texts(words), out.text_embeds, atol=1e-5)
