"""The command line: every key is a flag with the meaning it has in YAML, no word vanishes, help shows what holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from curation.config import CurateConfig, EmbedConfig
from eval.config import EvaluateSettings
from flows.cli import help as help_pages
from flows.cli.commands import COMMANDS
from flows.cli.completion import completion_script
from flows.cli.main import main
from flows.cli.overrides import apply_flags
from flows.cli.recipes import kinds, listing, recipes_of
from flows.cli.schema import REQUIRED, Key, is_optional, keys, leaves, options
from flows.config import PipelineConfig
from infra.config import Config
from infra.errors import UserError
from pretrain.config import PretrainConfig, PretrainSettings

EVERY_KEY = [
    pytest.param(command.model, key, id=f"{name} {key.flag} {key.kind or ''}".strip())
    for name, command in COMMANDS.items()
    for key in leaves(command.model)
]


def example(annotation: Any) -> Any:
    """Some value of a key, as YAML has it."""
    (kind, *_) = options(annotation)
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    if get_origin(kind) is list:
        return [example(get_args(kind)[0])] * 2
    if get_origin(kind) is tuple:
        return [example(each) for each in get_args(kind)]
    if get_origin(kind) is dict:
        return {"a-b": example(get_args(kind)[1])}
    if isinstance(kind, type) and issubclass(kind, Config):
        discriminator = (
            {"kind": get_args(kind.model_fields["kind"].annotation)[0]} if "kind" in kind.model_fields else {}
        )
        required = {key.path[0]: example(key.annotation) for key in keys(kind) if key.is_required}
        return {**discriminator, **required}
    return {bool: True, int: 3, float: 0.5, str: "7: x", Any: {"x": 1}}[kind]


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=100_000).strip().removesuffix("...").strip()
    return text.strip("'") if isinstance(value, str) else text


def words_of(value: Any) -> Iterator[str]:
    """A value as somebody types it."""
    if isinstance(value, list):
        for each in value:
            yield from words_of(each)
    elif isinstance(value, dict | bool):
        yield flow(value)
    else:
        yield str(value)


@pytest.mark.parametrize(("model", "key"), EVERY_KEY)
def test_every_key_is_a_flag_with_the_meaning_it_has_in_yaml(model: type[Config], key: Key) -> None:
    adapter = TypeAdapter(key.annotation)
    values = [example(key.annotation), *([None] if is_optional(key.annotation) else [])]
    if key.default is not REQUIRED and not isinstance(key.default, Config):
        values.append(adapter.dump_python(key.default, mode="json"))
    for value in values:
        words = ["null"] if value is None else list(words_of(value))
        if isinstance(value, list) and (not value or isinstance(value[0], list)):
            words = [flow(value)]
        tokens = [f"--{'.'.join(key.path[:-1])}.kind", key.kind] if key.kind and key.path[-1] != "kind" else []
        given = apply_flags("x", [*tokens, key.flag, *words], {}, model)
        for part in key.path:
            given = given[part]
        try:
            expected = adapter.validate_python(value)
        except ValidationError:
            with pytest.raises(ValidationError):
                adapter.validate_python(given)
            continue
        assert adapter.validate_python(given) == expected


BOOLEANS = [each for each in EVERY_KEY if bool in options(each.values[1].annotation)]


@pytest.mark.parametrize(("model", "key"), BOOLEANS)
def test_every_boolean_can_be_turned_on_and_off(model: type[Config], key: Key) -> None:
    kind = [f"--{'.'.join(key.path[:-1])}.kind", key.kind] if key.kind else []
    for tokens, expected in (
        ([key.flag], True),
        ([key.flag, "false"], False),
        ([f"{key.flag}=false"], False),
        ([f"--no-{key.flag.removeprefix('--')}"], False),
        ([key.flag, "yes"], True),
    ):
        given: Any = apply_flags("x", [*kind, *tokens], {}, model)
        for part in key.path:
            given = given[part]
        assert given is expected


BASES: dict[str, dict[str, Any]] = {
    "run": {"root": "r", "synthetic": {}},
    "ingest": {"source": "s", "out": "o"},
    "embed": {"corpus": "c", "out": "o"},
    "curate": {"corpus": "c", "out": "o"},
    "materialize": {"corpus": "c", "selection": "s", "out": "o"},
    "pretrain": {"corpora": ["c"], "out": "o"},
    "plan": {"gpus": 1},
    "distill": {"corpora": ["c"], "out": "o"},
    "import": {"checkpoint": "c", "out": "o"},
    "eval": {"model": {"kind": "pixels"}, "datasets": {"train": "a", "test": "b"}},
    "eval-checkpoints": {"training": "t", "datasets": {"train": "a", "test": "b"}},
    "ablate": {"root": "r", "corpus": "c", "selections": {"x": "s"}, "train": "a", "test": "b"},
    "publish": {"checkpoint": "c", "images": "i", "out": "o"},
    "report": {"artifacts": {"a": "u"}, "out": "o"},
    "deploy": {"pipeline": "p"},
}
"""What has to be given."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_key_that_is_given_its_default_changes_nothing(name: str) -> None:
    """At any depth, in a file as by a flag: the keys beside it stay as they are where nothing is given."""
    model, base = COMMANDS[name].model, BASES[name]
    expected = model.model_validate(base)
    count = 0
    for key in leaves(model):
        default = value_at(expected, key.path)
        if len(key.path) < 2 or default is REQUIRED or key.path[0] in base:
            continue
        count += 1
        plain = TypeAdapter(key.annotation).dump_python(default, mode="json")
        content: Any = plain
        for part in reversed(key.path):
            content = {part: content}
        assert model.model_validate({**base, **content}) == expected, key.flag
        assert model.model_validate({**base, **apply_flags("x", [key.flag, flow(plain)], {}, model)}) == expected
    assert count or name in (
        "ingest",
        "deploy",
        "report",
        "publish",
        "curate",
        "materialize",
        "eval-checkpoints",
        "eval",
    )


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    """The value of a key; `REQUIRED` where the group that it belongs to is another or none."""
    for part in path:
        if not isinstance(config, Config) or part not in type(config).model_fields:
            return REQUIRED
        config = getattr(config, part)
    return config


def test_settings_of_a_nested_default_survive_one_change() -> None:
    views = PretrainSettings.model_validate({"views": {"local_crops": {"size": 32}}}).views
    assert (views.local_crops.size, views.local_crops.scale, views.local_crops.photometric[0].blur_prob) == (
        32,
        (0.05, 0.32),
        0.5,
    )
    pipeline = PipelineConfig.model_validate({"root": "x", "synthetic": {}, "retrieve": {"memory_gb": 8}})
    assert [step.kind for step in pipeline.retrieve.steps] == ["retrieve"]
    suites = PipelineConfig.model_validate({"root": "x", "synthetic": {}, "evaluate": {"suite": "imagenet"}})
    assert suites.evaluate == EvaluateSettings(suite="imagenet")
    other = EmbedConfig.model_validate({"corpus": "c", "out": "o", "backbone": {"kind": "checkpoint", "url": "u"}})
    assert other.backbone.kind == "checkpoint"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["curate", "--corpus", "a", "decon.yaml"], "decon.yaml: belongs to no flag"),
        (["curate", "--corpus", "a", "--out", "b", "missing.yaml"], "missing.yaml: belongs to no flag"),
        (["curate", "dedup", "retrieve"], "retrieve: belongs to no flag"),
        (["plan", "--gpus", "1", "small_gpu"], "small_gpu: belongs to no flag"),
        (["eval", "pixels", "quick", "more"], "more: belongs to no flag"),
        (["embed", "--corpus", "a", "--no-batch"], "--no-batch: unknown flag"),
        (["embed", "--no-ray", "x", "--corpus", "a"], "--no-ray: unknown flag"),
        (["embed", "--corpus"], "--corpus: needs a value"),
        (["embed", "--backbone.sgins", "false"], "--backbone.sgins: unknown flag. Did you mean --backbone.signs?"),
        (["embed", "-x"], "-x: belongs to no flag"),
        (["curate", "--steps", "{kind: exact"], "is not valid YAML; quote it"),
        (
            ["curate", "--steps", "{min: 3}", "--corpus", "a", "--out", "b"],
            "steps.0: kind is required; give one of balance, ",
        ),
        (
            ["embed", "--corpus", "a", "--out", "b", "--backbone.kind", "vgg"],
            "backbone: no kind 'vgg'; give one of pixels",
        ),
        (["embed", "--corpus", "a", "--out", "b", "--batch", "many"], "batch: input should be a valid integer"),
        (["run", "--root", "x"], "fovea: give either sources or synthetic"),
        (["eval", "pixels", "quick"], "datasets: required; add it"),
        (["pretrain"], "required; add it (and 1 more) (fovea pretrain --help)"),
        (["recipes", "nothing"], "nothing: no recipe, suite or pipeline of this name"),
    ],
)
def test_no_word_vanishes_and_no_message_leaks(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in said
    assert said.count("\n") == 1
    for leak in ("Config", "discriminator", "{'", "BaseModel"):
        assert leak not in said


def test_lists_take_several_values_and_items_can_be_named() -> None:
    flags = ["--eval-embeddings", "a", "b", "--steps.1.threshold", "0.8", "--corpus", "c"]
    content = apply_flags("curate", flags, {}, CurateConfig)
    config = CurateConfig.model_validate({**content, "out": "o"})
    assert config.eval_embeddings == ["a", "b"]
    assert [step.kind for step in config.steps] == ["exact", "near_duplicates"]
    assert config.model_dump()["steps"][1]["threshold"] == 0.8
    whole = apply_flags("curate", ["--steps", "{kind: exact}", "{kind: random_sample, count: 3}"], {}, CurateConfig)
    assert whole == {"steps": [{"kind": "exact"}, {"kind": "random_sample", "count": 3}]}
    with pytest.raises(UserError, match="there are 2 items"):
        apply_flags("curate", ["--steps.7.threshold", "1"], {}, CurateConfig)


def test_a_flag_leaves_the_files_own_content() -> None:
    content = {"students": {"a-b": {"lr": 0.5}, "c": {"lr": 2}}}
    model = COMMANDS["distill"].model
    changed = apply_flags(
        "distill", ["--students.a-b.model.patch-size", "4", "--students.c.init-from=null"], content, model
    )
    assert changed == {
        "students": {"a-b": {"lr": 0.5, "model": {"patch_size": "4"}}, "c": {"lr": 2, "init_from": None}}
    }
    assert content == {"students": {"a-b": {"lr": 0.5}, "c": {"lr": 2}}}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_printed_configuration_runs_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(BASES[name]))
    printed = []
    for path in (file, tmp_path / "printed.yaml"):
        main([name, str(path), "--print-config"])
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert COMMANDS[name].model.model_validate(yaml.safe_load(printed[0])) == COMMANDS[name].model(**BASES[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_usage_what_is_required_and_the_defaults_that_hold(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = COMMANDS[name]
    pages = []
    for flag in ("--help", "--help-all"):
        main([name, flag])
        pages.append(capsys.readouterr().out)
    brief, full = pages
    assert brief.startswith(f"Usage: fovea {name} {command.words}")
    assert max(len(line) for line in full.splitlines() if "--" not in line) <= 110
    assert len(brief.splitlines()) < 90
    for key in keys(command.model):
        assert key.flag in brief
        assert not key.is_required or brief.index(key.flag) < brief.index("[--KEY VALUE]") or name == "eval"
    for key in leaves(command.model):
        assert key.path[-1] == "kind" or key.flag in full
    for kind in ("KNN", "LINEAR", "CONFIG", "NoneType", "typing."):
        assert kind not in full
    if command.room is not None:
        assert all(recipe in brief for recipe in recipes_of("pretrain" if name == "plan" else name))


def test_help_has_defaults_of_instances(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--views.local-crops.scale FLOAT... Minimum and maximum share of the image's area. [[0.05, 0.32]]" in text
    assert "Peak learning rate at the reference batch size" in text
    assert help_pages.to_inline_yaml((0.1, None)) == "[0.1, null]"


def test_everything_that_is_shipped_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = listing()
    root = Path(__file__).parents[1]
    folders = ("pretrain/recipes", "curation/recipes", "distill/recipes", "eval/suites", "flows/pipelines")
    names = [path.stem for folder in folders for path in (root / folder).glob("*.yaml")]
    assert len(names) > 20
    assert all(f"  {name} " in text for name in names)
    assert all(kind in text for group in kinds().values() for kind in group)
    with pytest.raises(SystemExit):
        main(["recipes", "tiny_cpu"])
    assert yaml.safe_load(capsys.readouterr().out)["schedule"]["steps"] == 450


def test_a_shell_completes_commands_recipes_and_flags() -> None:
    def completed(*words: str) -> set[str]:
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _fovea; echo "${{COMPREPLY[@]}}"'
        shell = ["bash", "-c", completion_script("bash") + line]
        return set(subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split())

    assert {"pretrain", "plan", "publish"} <= completed("fovea", "p")
    assert "tiny_cpu" in completed("fovea", "pretrain", "ti")
    assert "--schedule.steps" in completed("fovea", "pretrain", "--schedule.s")
    assert "bashcompinit" in completion_script("zsh")
    with pytest.raises(UserError, match="fish: no completion"):
        completion_script("fish")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "recipes"], capture_output=True, text=True)
    assert "tiny_cpu" in done.stdout


def test_a_pretraining_can_be_given_whole_by_flags() -> None:
    flags = ["--objectives", "{kind: dino, weight: 2}", "koleo"][:2]
    content = apply_flags("pretrain", [*flags, "--corpora", "a", "b", "--out", "o"], {}, PretrainConfig)
    config = PretrainConfig.model_validate(content)
    assert config.corpora == ["a", "b"]
    assert [(each.kind, each.weight) for each in config.objectives] == [("dino", 2.0)]
