"""Protocols that name classes, against other libraries and identities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking import knn_predict
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eval.data.feature_store import FrozenFeatures
from eval.data.image_corruptions import CORRUPTIONS, MCE_CORRUPTIONS, corrupt
from eval.protocols import corruptions, fine_tune, knn, linear, logistic
from eval.protocols.classification import sample_per_class, validation_split
from eval.protocols.config import Corruptions, FewShot, FineTune, Knn, Linear, Logistic
from eval.stats.rng import make_rng
from infra.artifacts.artifact import ArtifactSpec, get_or_create
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones import base, registry
from pretrain.backbones.config import TimmBackboneConfig
from pretrain.data.decode import decode_rgb
from pretrain.data.sample_order import generator as drawn
from tests.eval_contexts import PIXELS, Colors, first_of, make_context, make_model, tinted, unit


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return tinted(tmp_path_factory.mktemp("train"), 90, 1)


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return tinted(tmp_path_factory.mktemp("test"), 60, 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 5))
def test_knn_is_the_weighted_vote_of_scikit_learn(seed: int, k: int, classes: int) -> None:
    bank, queries = unit(seed, 40), unit(seed + 1, 25)
    labels = np.random.default_rng(seed).integers(0, classes, 40)
    voters = KNeighborsClassifier(
        n_neighbors=k,
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07 - 1 / 0.07),
    ).fit(bank.astype(np.float64), labels)
    votes = knn.predict(bank, labels, queries, classes, k, 0.07)
    shares = voters.predict_proba(queries.astype(np.float64))
    best_two = np.sort(shares, axis=1)[:, -2:]
    clear = best_two[:, -1] - best_two[:, 0] > 1e-4 if shares.shape[1] > 1 else np.ones(25, dtype=bool)
    np.testing.assert_array_equal(votes.argmax(1)[clear], voters.classes_[shares.argmax(1)][clear])


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_is_that_of_lightly(k: int) -> None:
    bank, queries = unit(0, 3000, 16), unit(1, 500, 16)
    labels = np.random.default_rng(0).integers(0, 7, 3000)
    votes = knn.predict(bank, labels, queries, 7, k, 0.07)
    theirs = knn_predict(
        torch.from_numpy(queries), torch.from_numpy(bank).T, torch.from_numpy(labels), 7, knn_k=k, knn_t=0.07
    )
    np.testing.assert_array_equal(votes.argmax(1), theirs[:, 0].numpy())


def test_the_nearest_neighbor_of_a_bank_image_is_itself() -> None:
    bank, labels = unit(0, 60), np.random.default_rng(0).integers(0, 7, 60)
    np.testing.assert_array_equal(knn.predict(bank, labels, bank, 7, 1, 0.07).argmax(1), labels)


def test_k_is_chosen_without_the_test_set(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    def score(test: Corpus, **settings: object) -> list[str]:
        task = Knn(k=[1, 5, 60], **settings)
        opened = make_context({"train": train, "test": test}, [task.model_dump()])
        return [each.metric for each in knn.knn(task, make_model(tmp_path), opened).scores]

    assert score(test_set)[0] == score(train)[0]  # the training set, too, may be the test set
    assert sorted(score(test_set)) == sorted(f"accuracy, k = {k}" for k in (1, 5, 60))
    assert score(train, select_on="test")[0] == "accuracy, k = 1"


def test_leaving_oneself_out_is_what_chooses_k(train: Corpus, tmp_path: Path) -> None:
    bank, labels = make_model(tmp_path).vectors(train), train.labels
    k, right = knn._choose_k(Knn(), bank, labels, 3, [1, 7], [0.0, 0.0])
    expected = []
    for count in (1, 7):
        hits = 0
        for row in range(len(bank)):
            others = np.delete(np.arange(len(bank)), row)
            votes = knn.predict(bank[others], labels[others], bank[row : row + 1], 3, count, 0.07)
            hits += int(votes.argmax() == labels[row])
        expected.append(hits / len(bank))
    assert right == pytest.approx(expected)
    assert k == [1, 7][int(np.argmax(expected))]


def test_few_images_a_class_are_drawn_several_times(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    task = Knn(k=[5], per_class=[2], num_draws=4)
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()])
    (_, few) = knn.knn(task, make_model(tmp_path), opened).scores
    rows = [sample_per_class(train.labels, 2, make_rng(0, "per class", 2, draw)) for draw in range(4)]
    vectors, queries = make_model(tmp_path).vectors(train), make_model(tmp_path).vectors(test_set)
    right = [
        (knn.predict(vectors[some], train.labels[some], queries, 3, 5, 0.07).argmax(1) == test_set.labels).mean()
        for some in rows
    ]
    assert few.value == pytest.approx(np.mean(right))
    assert few.low is not None
    assert few.low < few.value


def scikit_learn(train: Corpus, test: Corpus, strength: float, folder: Path) -> float:
    """Accuracy of a regression by hand."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-3))
    first, second = (make_model(folder).features_of(each).raw() for each in (train, test))
    return float(model.fit(first, train.labels).score(second, test.labels))


def test_logistic_regression_is_that_of_scikit_learn(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    task = Logistic(C=[0.01, 0.1, 1.0])
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()])
    (score,) = logistic.logistic(task, make_model(tmp_path), opened).scores
    fit, choose = validation_split(train.labels, 0.1, 0)
    assert not set(fit) & set(choose)
    features, right = make_model(tmp_path).features_of(train).raw(), []
    for strength in task.C:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-3))
        model.fit(features[fit], train.labels[fit])
        right.append(model.score(features[choose], train.labels[choose]))
    best = task.C[int(np.argmax(right))]
    assert score.value == pytest.approx(scikit_learn(train, test_set, best, tmp_path))
    published = Logistic(C=task.C, select_on="test")
    (score,) = logistic.logistic(published, make_model(tmp_path), opened).scores
    assert score.value == max(scikit_learn(train, test_set, each, tmp_path) for each in task.C)


def test_few_shot_gets_better_with_more_shots(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    task = FewShot(shots=[1, 20], num_draws=6)
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()])
    many, one = logistic.few_shot(task, make_model(tmp_path), opened).scores
    assert (many.metric, one.metric) == ("accuracy, 20 a class", "accuracy, 1 a class")
    assert many.value > one.value


class FakeFrozen(FrozenFeatures):
    """Features in memory."""

    @classmethod
    def holding(cls, values: np.ndarray, folder: Path, blocks: list[int], mean: int, views: int = 1) -> FrozenFeatures:
        artifact = get_or_create(
            ArtifactSpec("embeddings", "test", 1, {"at": str(folder)}), str(folder), lambda directory: {}
        )
        found = cls(artifact, views, 0, blocks, mean)
        found.__dict__["parts"] = [values[:7], values[7:]]
        return found


def test_heads_are_trained_as_torch_trains_each_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(64, 12)).astype(np.float32), rng.integers(0, 4, 64)
    features = FakeFrozen.holding(values, tmp_path / "f", [3, 3, 3], 3)
    grid = [linear.ProbeHead(*each) for each in ((1, False, 0.5), (1, False, 0.1), (3, True, 0.2), (2, False, 0.3))]
    heads = linear.ProbeHeads(grid, features, 4, 0)
    columns = {(1, False): [6, 7, 8], (3, True): list(range(12)), (2, False): list(range(3, 9))}
    layers = []
    starts = [heads.weights[0][0], heads.weights[0][1], heads.weights[1][0], heads.weights[2][0]]
    for head, start in zip(grid, starts, strict=True):
        layer = torch.nn.Linear(len(start) - 1, 4)
        layer.weight.data, layer.bias.data = start[:-1].T.clone(), start[-1].clone()
        layers.append((head, layer, torch.optim.SGD(layer.parameters(), lr=head.learning_rate, momentum=0.9)))
    for step in range(5):
        rows = np.arange(step * 8, step * 8 + 16)
        some, truth = torch.from_numpy(features.take(rows)), torch.from_numpy(labels[rows])
        heads.step(some, truth, 1.0)
        for head, layer, optimizer in layers:
            optimizer.zero_grad()
            chosen = some[:, columns[head.blocks, head.pooled]]
            torch.nn.functional.cross_entropy(layer(chosen), truth).backward()
            optimizer.step()
    rows = np.arange(64)
    for number, (head, layer, _) in enumerate(layers):
        with torch.no_grad():
            expected = layer(torch.from_numpy(values[:, columns[head.blocks, head.pooled]])).numpy()
        np.testing.assert_allclose(heads.scores(features, number), expected, atol=1e-5)
        right = float((expected.argmax(1) == labels).mean())
        assert heads.accuracies(features, rows, labels)[number] == pytest.approx(right)


def test_the_linear_probe_learns_and_chooses_without_the_test_set(
    train: Corpus, test_set: Corpus, tmp_path: Path
) -> None:
    task = Linear(learning_rates=[1e-3, 1e-1], min_steps=150, batch=32, views=2)
    notes = []
    for test in (test_set, train):
        opened = make_context({"train": train, "test": test}, [task.model_dump()], pictures=4)
        outcome = linear.linear(task, make_model(tmp_path, backbone=Colors(), blocks=4), opened)
        notes.append(outcome.scores[0].note)
        assert outcome.scores[0].value > 0.6
        assert set(outcome.pictures) == {"curve", "confusion"}
    assert notes[0] == notes[1]
    published = Linear(learning_rates=[1e-3, 1e-1], min_steps=50, batch=32, select_on="test")
    opened = make_context({"train": train, "test": test_set}, [published.model_dump()])
    (score,) = linear.linear(published, make_model(tmp_path, backbone=Colors()), opened).scores
    assert "settings chosen on this test set" in score.note


def test_probes_of_backbones_without_tokens_take_the_vector(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    task = Linear(learning_rates=[1e-1], min_steps=150, batch=32)
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()])
    (score,) = linear.linear(task, make_model(tmp_path), opened).scores
    assert score.value > 0.5


def test_the_backbone_runs_once_and_views_are_told_apart(train: Corpus, tmp_path: Path) -> None:
    first = make_model(tmp_path, backbone=Colors()).features_of(train, 3)
    assert len(first) == 3 * len(train)
    broken = make_model(tmp_path)
    broken.__dict__["backbone"] = None  # whoever used it would fail
    again = broken.features_of(train, 3)
    assert again.artifact.id == first.artifact.id
    np.testing.assert_array_equal(again.raw(), first.raw())
    np.testing.assert_array_equal(first.raw(), make_model(tmp_path, backbone=Colors()).features_of(train).raw())
    rows = first.take(np.array([3, 4, 5]))
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


def test_other_sets_are_scored_by_class_maps(train: Corpus, tmp_path: Path) -> None:
    other = tinted(tmp_path / "other", 40, 3, classes=4)  # class3 is of another color
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({"class0": "class0", "class1": ["class1", "class2"]}))
    opened = make_context(
        {"train": train, "test": train, "other": other},
        [{"kind": "knn", "k": [1], "ood_datasets": [{"dataset": "other", "classes": str(tmp_path / "map.yaml")}]}],
    )
    (task,) = opened.settings.tasks
    own, mapped = knn.knn(task, make_model(tmp_path), opened).scores
    assert own.value == 1.0
    vectors = make_model(tmp_path).vectors(other)
    votes = knn.predict(make_model(tmp_path).vectors(train), train.labels, vectors, 3, 1, 0.07)
    scored = other.labels < 2
    answers = votes[scored].argmax(1)
    expected = np.where(other.labels[scored] == 0, answers == 0, answers > 0).mean()
    assert mapped.metric == "accuracy on other"
    assert mapped.images == scored.sum()
    assert mapped.value == pytest.approx(expected)
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({"class0": "nobody"}))
    with pytest.raises(UserError, match="class0: nobody is no class of the training set"):
        knn.knn(task, make_model(tmp_path), opened)


def test_a_set_of_some_classes_restricts_the_answers(train: Corpus, tmp_path: Path) -> None:
    some = tinted(tmp_path / "some", 30, 4, classes=2)
    scores = {}
    for restrict in (True, False):
        also = [{"dataset": "some", "restrict": restrict}]
        opened = make_context(
            {"train": train, "test": train, "some": some}, [{"kind": "knn", "k": [20], "ood_datasets": also}]
        )
        scores[restrict] = knn.knn(opened.settings.tasks[0], make_model(tmp_path), opened).scores[-1].value
    assert scores[True] >= scores[False]
    assert scores[True] > 0.5


def test_leaked_images_are_counted_and_left_out(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    leaked = np.arange(len(test_set)) < 10
    opened = make_context({"train": train, "test": test_set}, [{"kind": "knn", "k": [5]}], {"test": leaked})
    score = knn.knn(opened.settings.tasks[0], make_model(tmp_path), opened).scores[0]
    votes = knn.predict(
        make_model(tmp_path).vectors(train), train.labels, make_model(tmp_path).vectors(test_set), 3, 5, 0.07
    )
    right = votes.argmax(1) == test_set.labels
    assert (score.leaked, score.value) == (10, pytest.approx(right.mean()))
    assert score.without_leaks == pytest.approx(right[10:].mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 224])
def test_damages_grow_with_severity_and_keep_the_shape(name: str, side: int) -> None:
    image = np.asarray(decode_rgb(_photo()).resize((side, side)))
    changes = []
    for severity in (1, 3, 5):
        found = corrupt(image, name, severity, drawn(0, 0, severity))
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(found, corrupt(image, name, severity, drawn(0, 0, severity)))
        changes.append(np.abs(found.astype(int) - image).mean())
    assert changes[0] > 0.3
    if name not in ("elastic_transform", "saturate", "glass_blur"):  # other means, not more of one
        assert changes[2] > changes[0]


def _photo() -> bytes:
    from skimage import data

    from tests.conftest import encode_image

    return encode_image(Image.fromarray(data.astronaut()))


def test_corruption_errors_are_means_of_knn_on_damaged_images(train: Corpus, test_set: Corpus, tmp_path: Path) -> None:
    task = Corruptions(corruptions=["contrast", "jpeg_compression"], severities=[1, 5], images=20)
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()], pictures=2)
    outcome = corruptions.corruptions(task, make_model(tmp_path, backbone=Colors()), opened)
    mean, *each = outcome.scores
    assert mean.value == pytest.approx(np.mean([score.value for score in each]))
    assert [score.metric for score in each] == ["error, contrast", "error, jpeg compression"]
    assert {score.better for score in outcome.scores} == {"lower"}
    assert "corruptions" in outcome.pictures
    assert len(MCE_CORRUPTIONS) == 14
    with pytest.raises(UserError, match="rain: there are gaussian_noise"):
        corruptions.corruptions(Corruptions(corruptions=["rain"]), make_model(tmp_path), opened)


def tiny_timm(folder: Path) -> TimmBackboneConfig:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(model.state_dict(), folder / "weights.pt")
    return TimmBackboneConfig(model="vit_tiny_patch16_224", checkpoint=str(folder / "weights.pt"))


def test_fine_tuning_beats_its_own_start_and_changes_the_last_block_alone(
    train: Corpus, test_set: Corpus, tmp_path: Path
) -> None:
    tested = make_model(tmp_path, tiny_timm(tmp_path))
    tuned = fine_tune.FineTunedModel(tested.backbone, 1, 192, 3)
    trained = {name.split(".")[1] for name, each in tuned.named_parameters() if each.requires_grad}
    assert trained == {"blocks", "norm", "weight", "bias"}
    assert {name.split(".")[2] for name, each in tuned.model.named_parameters(prefix="m.b") if each.requires_grad} <= {
        *("blocks", "norm")
    }
    task = FineTune(learning_rates=[1e-3], epochs=3, batch=16)
    opened = make_context({"train": train, "test": test_set}, [task.model_dump()])
    (score,) = fine_tune.fine_tune(task, tested, opened).scores
    assert score.value > 0.45
    with pytest.raises(UserError, match="fine_tune: takes checkpoints of Fovea"):
        fine_tune.fine_tune(task, make_model(tmp_path, PIXELS), opened)


@pytest.mark.slow
def test_a_timm_model_scores_on_cifar10_as_by_hand(shared_data: Path, tmp_path: Path) -> None:
    """Twenty lines of timm, tarfile and numpy, and ours."""
    import io
    import tarfile

    import timm

    config = tiny_timm(tmp_path)

    def by_hand(shard: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
        model = timm.create_model(config.model, num_classes=0).eval()
        model.load_state_dict(torch.load(config.checkpoint, weights_only=True))
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        vectors, labels = [], []
        with tarfile.open(shard) as archive, torch.inference_mode():
            files = {each.name: archive.extractfile(each).read() for each in archive}
            for name in sorted(each for each in files if each.endswith(".jpg"))[:count]:
                image = Image.open(io.BytesIO(files[name])).convert("RGB")
                vectors.append(model(transform(image)[None])[0].numpy())
                labels.append(int(files[name.replace(".jpg", ".cls")]))
        found = np.stack(vectors)
        return found / np.linalg.norm(found, axis=1, keepdims=True), np.array(labels)

    shards = [shared_data / "cifar10" / f"{name}-000000.tar.gz" for name in ("train", "test")]
    (bank, labels), (queries, truth) = by_hand(shards[0], 240), by_hand(shards[1], 120)
    expected = []
    for query in queries:
        similar = bank @ query
        nearest = np.argsort(-similar)[:20]
        votes = np.bincount(labels[nearest], np.exp(similar[nearest] / 0.07), minlength=10)
        expected.append(votes.argmax())
    corpora = {
        "train": first_of(shards[0], 240, tmp_path / "train"),
        "test": first_of(shards[1], 120, tmp_path / "test"),
    }
    opened = make_context(corpora, [{"kind": "knn", "k": [20]}])
    (score,) = knn.knn(opened.settings.tasks[0], make_model(tmp_path, config), opened).scores
    assert score.value == pytest.approx(float((np.array(expected) == truth).mean()))
    np.testing.assert_allclose(make_model(tmp_path, config).vectors(corpora["test"]), queries, atol=1e-5)
    assert isinstance(registry.load_backbone(config), base.TokenBackbone)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_held_out_part_leaves_every_class_something(labels: list[int], share: float, seed: int) -> None:
    truth = np.array(labels)
    if len(set(labels)) == len(labels):
        with pytest.raises(UserError, match="one image a class is too little"):
            validation_split(truth, share, seed)
        return
    fit, choose = validation_split(truth, share, seed)
    assert sorted([*fit, *choose]) == list(range(len(truth)))
    assert set(truth[fit]) == set(labels)
    assert len(choose) >= 1
    big = np.repeat(np.arange(3), 2000)
    assert len(validation_split(big, share, seed)[1]) == pytest.approx(share * len(big), abs=3)


def test_maps_and_names_may_have_numbers_for_keys(train: Corpus, tmp_path: Path) -> None:
    from eval.protocols.classification import spoken_names

    opened = make_context({"train": train, "test": train}, [{"kind": "knn"}])
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(["cat", "dog", "fire engine"]))
    assert spoken_names(str(tmp_path / "list.yaml"), opened, "test") == ["cat", "dog", "fire engine"]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(["cat"]))
    with pytest.raises(UserError, match="has 1 names, but test has 3 classes"):
        spoken_names(str(tmp_path / "short.yaml"), opened, "test")
    from eval.data.annotations import read_class_names

    (tmp_path / "numbers.yaml").write_text("0: a\n1: [b, c]\n")
    assert read_class_names(str(tmp_path / "numbers.yaml")) == {"0": "a", "1": ["b", "c"]}
    (tmp_path / "numbers.yaml").write_text("just text")
    with pytest.raises(UserError, match="neither a mapping nor a list"):
        read_class_names(str(tmp_path / "numbers.yaml"))


class Broken(Colors):
    """A backbone with weights that are no numbers."""

    def layers(self, batch: torch.Tensor, blocks: int, norm: bool = True) -> tuple[torch.Tensor, list[base.Tokens]]:
        vectors, layers = super().layers(batch, blocks)
        return vectors * torch.nan, layers


def test_features_that_are_no_numbers_are_not_scored(train: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features that are not finite"):
        make_model(tmp_path, backbone=Broken()).features_of(train)


def test_a_kill_between_parts_loses_and_doubles_nothing(
    train: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.data import feature_store

    whole = make_model(tmp_path / "whole", backbone=Colors()).features_of(train, 2)
    monkeypatch.setattr(feature_store, "_PART_BYTES", 4 * 9 * 2 * 20)  # twenty images of nine columns and two views
    honest, parts = feature_store._rows, 0

    def dying(*arguments: object) -> object:
        nonlocal parts
        parts += 1
        if parts == 3:
            raise KeyboardInterrupt
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_store, "_rows", dying)
    first, second = (
        make_model(tmp_path / "killed", backbone=Colors()),
        make_model(tmp_path / "killed", backbone=Colors()),
    )
    second.extraction = feature_store.Extraction(1, 1, 0, 7, 0)  # another batch
    with pytest.raises(KeyboardInterrupt):
        first.features_of(train, 2)
    again = second.features_of(train, 2)
    assert again.artifact.id == whole.artifact.id
    assert len(again.parts) == 5
    np.testing.assert_array_equal(again.take(np.arange(len(again))), whole.take(np.arange(len(whole))))
