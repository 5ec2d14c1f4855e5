"""The command line and the whole pipeline, run as a user runs them."""

from __future__ import annotations

import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urljoin

import pytest
import yaml
from starlette.testclient import TestClient

import curation
from curation.config import CurateConfig
from distill.config import DistillConfig
from eval.report.templating import PAGE
from eval.ui.server import make_app
from flows.cli.main import main
from flows.config import PipelineConfig
from infra.artifacts.artifact import Artifact, find, verify
from infra.config import load_yaml
from infra.errors import UserError
from tests.conftest import SMALL, SyntheticCorpora, image_folder
from tests.test_distill import MODEL, STUDENT
from tests.test_pretrain_recipes import RECIPES
from tests.test_pretrain_training import TINY, until_saved

FOVEA = Path(sys.executable).with_name("fovea")
COMMANDS = (
    *(
        "run",
        "ingest",
        "embed",
        "curate",
        "materialize",
        "pretrain",
        "distill",
        "eval",
        "eval-checkpoints",
        "compare",
        "ablate",
    ),
    *("import", "publish", "report", "deploy", "ui", "doctor", "explain", "recipes", "completion"),
)


def fovea(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FOVEA), *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=550
    )


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    script = (
        "import sys; from flows.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'prefect', 'faiss', 'timm', 'sklearn', 'deepspeed', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: fovea" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nope.yaml"], "nope.yaml: no such file"),
        (["ingest", "."], ".: a folder; give the path of a YAML file, or the folder by a flag (--source)"),
        (["ingest", "--source", "a", "--out", "b", "--source", "c"], "--source: given twice; give it once"),
        (["ui", ".", "--port", "80000"], "--port: 80000: ports are 0 to 65535"),
        (["bogus"], 'Unknown command "bogus"'),
        (["pretrain", "dinov9"], "dinov9: no such file and no recipe; recipes are clip_vitb16, "),
        (["pretrain", "tiny_cpu", "--corpora", "/nope", "--out", "o"], "/nope: no corpus or selection here"),
        (["ingest", "--source", "/nope", "--out", "o"], "/nope: not found"),
        (["ingest", "--source", sys.executable, "--out", "o"], "is a single file; give a folder, or shards"),
        (["ingest", "--sorce", "x", "--out", "o"], "Did you mean --source?"),
        (["ingest", "--out", "o"], "source: required"),
        (["ingest", "--source", "ftq://x", "--out", "o"], "ftq://x"),
        (["pretrain", "--corpora", "/nope", "--out", "o"], "/nope: no corpus or selection here"),
        (["pretrain", "--corpora", "x", "--out", "o", "--optimizer.grad-clip", "-1"], "optimizer.grad_clip"),
        (
            [
                "eval",
                "--model.kind",
                "checkpoint",
                "--model.url",
                "/n",
                "--datasets.train",
                "a",
                "--datasets.test",
                "b",
            ],
            "a: not found",
        ),
        (["eval", "nobody", "quick"], "nobody: no backbone by this name; give URL of a checkpoint"),
        (["eval", "pixels", "quik", "--datasets.train", "a"], "quik: no such suite; there are full, imagenet, quick"),
        (["eval", "pixels", "--datasets.train", "a"], "datasets: knn needs test; give each as datasets.NAME"),
        (["eval", "timm:nobody", "--datasets.train", "torchvision:CIFAR11/train", "--datasets.test", "x"], "CIFAR11"),
        (["compare", "a"], "compare: needs two reports or more"),
        (["compare", "a", "b"], "a: no report here"),
        (
            ["eval", "pixels", "--datasets.train", "pairs:a:b", "--datasets.test", "x"],
            "pairs:a:b: give two folders of this machine",
        ),
        (["run", "--root", "x"], "either sources or synthetic"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = subprocess.run([str(FOVEA), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    *notices, mistake = done.stderr.splitlines()
    assert mistake.startswith("fovea: ")
    assert expected in mistake
    assert notices in ([], [f"{arguments[0]}: checking inputs"])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("after", "code"), [(r"embed: \d", 130), (r"materialize: \d", 75)])
def test_ctrl_c_in_a_terminal_ends_a_run_in_one_line(after: str, code: int, tmp_path: Path, prefect_home: Path) -> None:
    """A terminal sends it to all processes, Prefect's server too."""
    settings = {
        **pipeline(tmp_path / "run"),
        "pretrain": {**TINY, "schedule": {"steps": 100_000, "global_batch_size": 8}},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home)}
    process = subprocess.Popen(
        [str(FOVEA), "run", str(tmp_path / "p.yaml")],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(after, line):
            break
    if code == 75:
        until_saved(checkpoint_folder(tmp_path / "run" / "pretrain"), process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert re.search("fovea: (interrupted; run again to resume|pretrain: stopped .*; run again to resume)", told)


def checkpoint_folder(parent: Path) -> Path:
    """The folder in which a training works, once it is there."""
    while not (folders := [path for path in parent.glob("*") if path.is_dir() and not path.name.endswith(".job")]):
        time.sleep(0.05)
    return folders[0]


def test_an_unreachable_bucket_is_one_line(tmp_path: Path) -> None:
    done = fovea(
        *("ingest", "--source", "s3://nowhere/images", "--out", str(tmp_path / "o")),
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="very-secret",
    )
    assert done.returncode == 2
    assert "s3://nowhere/images: the endpoint is unreachable" in done.stderr
    assert "very-secret" not in done.stderr


def test_a_key_that_stands_twice_or_a_tab_is_named(tmp_path: Path) -> None:
    for text, named in {
        "source: a\nout: b\nsource: c\n": "(line 3): not valid YAML: source is given twice; fix the syntax",
        "source: a\n\tout: b\n": "(line 2): not valid YAML: found character '\\t'",
    }.items():
        (tmp_path / "i.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            load_yaml(tmp_path / "i.yaml")
        assert named in str(caught.value)


def test_a_wrong_key_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("root: x\nsynthetic: {}\npretrian: {}\n")
    done = fovea("run", str(tmp_path / "p.yaml"))
    assert done.returncode == 2
    assert "p.yaml: pretrian: unknown key; allowed here: checkpoint_eval" in done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_through_the_command_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", recipe, "--corpora", "/nope", "--out", "out", "--views.num-global-crops", "2"])
    assert ended.value.code == 2
    assert "/nope: no corpus or selection here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "cifar10", "webpool"])
def test_every_pipeline_passes_through_the_command_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FOVEA_DATA", str(tmp_path))
    from flows.orchestration import pipeline

    def reached(config: PipelineConfig) -> None:
        raise UserError(f"{len(config.evaluate.tasks)} protocols")

    monkeypatch.setattr(pipeline, "pipeline", reached)
    with pytest.raises(SystemExit):
        main(["run", str(Path(__file__).parents[1] / "flows" / "pipelines" / f"{name}.yaml")])
    assert capsys.readouterr().err.splitlines()[-1] == "fovea: 3 protocols"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 3)
    (tmp_path / "i.yaml").write_text(
        yaml.safe_dump({"source": str(tmp_path / "images"), "out": "nowhere", "min_side": 9})
    )
    done = fovea("ingest", str(tmp_path / "i.yaml"), "--out", str(tmp_path / "corpus"))
    assert done.stdout.strip() == str(tmp_path / "corpus")
    artifact = find(str(tmp_path / "corpus"))
    assert artifact is not None
    assert artifact.manifest.config["min_side"] == 9


def test_flags_below_a_recipes_students_reach_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import training

    seen: list[DistillConfig] = []
    monkeypatch.setattr(training, "train", lambda _, config: seen.append(config))
    main(["distill", "dinov2_family", "--corpora", "x", "--out", "y", "--students.small.lr", "0.5"])
    (config,) = seen
    assert {name: each.lr for name, each in config.students.items()} == {"base": 1.0, "large": 1.0, "small": 0.5}
    assert config.students["small"].model.embed_dim == 384
    assert config.students["small"].model.patch_size == 14


def test_ingest_counts_what_it_turned_away(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 3)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    done = fovea("ingest", "--source", str(tmp_path / "images"), "--out", str(tmp_path / "corpus"))
    assert "rejected: 1 not_an_image" in done.stderr


def pipeline(root: Path) -> dict[str, object]:
    students = {"small": {"model": MODEL}, "coarse": {"model": {**MODEL, "patch_size": 16}}}
    settings = {
        "name": "Test",
        "root": str(root),
        "synthetic": SMALL.settings(),
        "dedup_embedding": {"backbone": {"kind": "pixels", "whiten": 1.5}},
        "deduplicate": {
            "steps": [
                {"kind": "exact"},
                {"kind": "near_duplicates", "threshold": 0.95},
                {"kind": "decontaminate", "threshold": 0.88},
            ]
        },
        "pretrain": TINY,
        "distill": {**STUDENT, "students": students},
        "evaluate": {"tasks": [{"kind": "knn", "k": [5]}, {"kind": "logistic", "C": [1.0]}], "pictures": 4},
    }
    PipelineConfig.model_validate(settings)
    return settings


def run_pipeline(root: Path, home: Path) -> subprocess.CompletedProcess[str]:
    file = root.parent / f"{root.name}.yaml"
    file.write_text(yaml.safe_dump(pipeline(root)))
    return fovea("run", str(file), PREFECT_HOME=str(home))


def crawled(root: Path) -> dict[str, int]:
    """Status codes of all pages and pictures of `fovea ui` that its links lead to."""
    client = TestClient(make_app(str(root), ["localhost"]), base_url="http://localhost")
    answers: dict[str, int] = {}
    left = ["/"]
    while left:
        page = left.pop()
        if page in answers:
            continue
        answer = client.get(page)
        answers[page] = answer.status_code
        if answer.headers["content-type"].startswith("text/html") and "/files/" not in page:
            links = re.findall(r'(?:href|src)="([^"#]+)', answer.text)
            left += [urljoin(page, html.unescape(link)) for link in links if not link.startswith(("data:", "http"))]
    return answers


def ids(root: Path) -> dict[str, str]:
    summary = json.loads((root / "summary.json").read_text())
    return {stage: each["id"] for stage, each in summary["artifacts"].items()}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1500)
def test_the_pipeline_runs_resumes_and_survives_kill(tmp_path: Path, prefect_home: Path) -> None:
    """Run it, run it again, and kill it with SIGKILL at random moments until it ends: the artifacts are the same."""
    first = run_pipeline(tmp_path / "whole", prefect_home)
    assert first.returncode == 0, first.stderr
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert set(summary) == {
        *(
            "dedup",
            "decontamination",
            "retrieval",
            "evaluation",
            "verdicts",
            "publish",
            "artifacts",
            "seconds",
            "config",
        ),
    }
    assert set(summary["evaluation"]) == {"knn", "logistic"}
    for told in summary["evaluation"].values():
        assert set(told["values"]) == set(told["untrained"]) == {"teacher", "small", "coarse"}
        assert 0 <= told["pixels"] <= 1
    for name, verdict in summary["verdicts"].items():
        assert "etter than its baselines" in verdict
        assert f"{name}: {verdict[:20]}" in first.stdout
    assert set(summary["publish"]) == {"small", "coarse"}
    for differences in summary["publish"].values():
        assert set(differences) == {"timm", "torch_hub", "official"}
        assert max(differences.values()) <= 1e-5
    for stage, each in summary["artifacts"].items():
        artifact = find(each["url"])
        assert artifact is not None, stage
        assert artifact.id == each["id"]
        assert verify(artifact) == []
        assert each["url"] in first.stdout or not stage.startswith(("report", "publish"))

    answers = crawled(tmp_path / "whole")
    assert len(answers) > 300
    assert {page: code for page, code in answers.items() if code != 200} == {}

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*") if path.name != "summary.json"}
    again = run_pipeline(tmp_path / "whole", prefect_home)
    assert again.returncode == 0, again.stderr
    unchanged = {path: path.stat().st_mtime_ns for path in times if path.is_file()}
    assert unchanged == {path: times[path] for path in unchanged}
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["seconds"] == summary["seconds"]

    assert _killed_until_done(tmp_path / "killed", prefect_home) >= 2
    assert ids(tmp_path / "killed") == ids(tmp_path / "whole")
    for stage, each in summary["artifacts"].items():
        url = json.loads((tmp_path / "killed" / "summary.json").read_text())["artifacts"][stage]["url"]
        before, after = find(each["url"]), find(url)
        assert before is not None
        assert after is not None
        same = {file.path: file.sha256 for file in before.manifest.files if not tells_places(file.path)}
        assert {file.path: file.sha256 for file in after.manifest.files if not tells_places(file.path)} == same, stage
        if stage == "report":
            assert _without_times(before) == _without_times(after)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_an_ablation_trains_on_each_choice_and_compares(
    synthetic: SyntheticCorpora, tmp_path: Path, prefect_home: Path
) -> None:
    cut = CurateConfig(corpus=synthetic.pool, steps=[{"kind": "exact"}], out=str(tmp_path / "selection"))
    selection = curation.run(cut)
    settings = {
        "root": str(tmp_path / "runs"),
        "corpus": synthetic.pool,
        "selections": {"clean": selection.url},
        "seeds": [3],
        "train": synthetic.seed,
        "test": synthetic.test,
        "pretrain": TINY | {"schedule": {"steps": 3, "global_batch_size": 16}},
        "evaluate": {"tasks": [{"kind": "knn", "k": [5]}], "baselines": False, "pictures": 0},
    }
    (tmp_path / "ablate.yaml").write_text(yaml.safe_dump(settings))
    done = fovea("ablate", str(tmp_path / "ablate.yaml"), PREFECT_HOME=str(prefect_home))
    assert done.returncode == 0, done.stderr
    report = find(done.stdout.split()[-1])
    assert report is not None
    assert set(report.metrics["knn"]) == {"raw", "clean", "random"}
    images = {row["model"]: row["images"] for row in report.read_json("report.json")["rows"]}
    assert images["random"] == images["clean"] == selection.metrics["kept"] < images["raw"]
    trained = [find(str(path)) for path in (tmp_path / "runs" / "pretrain").iterdir()]
    assert [each.manifest.config["schedule"]["seed"] for each in trained if each is not None] == [3, 3, 3]


def tells_places(path: str) -> bool:
    """Files that name URLs, tell how long things took, or that DeepSpeed's and timm's containers stamp, are alike but
    not equal."""
    return path in ("lineage.json", "shards.json", "README.md", PAGE) or path.startswith("training/")


def _without_times(report: Artifact) -> str:
    return re.sub(r'(<td class="number took">)[^<]*', r"\1", report.read_bytes(PAGE).decode())


def _killed_until_done(root: Path, home: Path) -> int:
    file = root.parent / f"{root.name}.yaml"
    file.write_text(yaml.safe_dump(pipeline(root)))
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    rng = random.Random(0)
    for kills in range(20):
        process = subprocess.Popen([str(FOVEA), "run", str(file)], env=environment, start_new_session=True)
        try:
            process.wait(timeout=15 + rng.random() * 15 + 15 * kills)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1)
            continue
        assert process.returncode == 0
        return kills
    pytest.fail("twenty attempts were not enough")
