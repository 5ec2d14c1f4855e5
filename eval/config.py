"""Settings of evaluation and of the pages that tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from eval.protocols.config import TaskConfig
from infra.config import Config, Output, load_yaml
from pretrain.backbones.config import BackboneConfig

SUITES = Path(__file__).with_name("suites")


def suite_tasks(name: str) -> list[Any]:
    """The tasks of a suite that comes with Fovea, or of a YAML file.

    Raises:
        ValueError: there is none of this name.
        UserError: the file is missing, or is not YAML.
    """
    path = SUITES / f"{name}.yaml"
    if name.isidentifier() and not path.is_file() and not Path(name).exists():
        known = ", ".join(sorted(each.stem for each in SUITES.glob("*.yaml")))
        raise ValueError(f"{name}: no such suite; there are {known}, or give the path of a file")
    tasks = load_yaml(path if path.is_file() else name).get("tasks")
    if not isinstance(tasks, list):
        raise ValueError(f"{name}: has no list of tasks; see eval/suites")
    return tasks


class Gate(Config):
    """Maximum loss of score against an earlier report."""

    report: str
    """URL of the earlier report."""
    max_drop: float = Field(0.01, ge=0)
    """Maximum drop of a headline score; a larger one fails the evaluation."""
    protocols: list[str] = Field(default_factory=list)
    """Names of the protocols that are looked at; none: all that both reports have, and whose headline is a share."""


class EvaluateSettings(Config):
    """Protocols and what they share."""

    suite: str | None = None
    """Name of a suite (quick, imagenet, full) or path of a YAML file with `tasks`, which come before `tasks`."""
    tasks: list[TaskConfig] = Field(default_factory=list)
    """Protocols. Without suite and tasks: the suite quick."""
    bootstrap: int = Field(1000, ge=10)
    """Resamples of the test set for the 95 % intervals."""
    baselines: bool = True
    """Measure the untrained network and raw pixels beside the backbone, where features are all it takes."""
    pictures: int = Field(10, ge=0)
    """Images in each picture; 0: no pictures."""
    seed: int = Field(0, ge=0)
    """Seed of splits, draws and resampling."""
    batch: int = Field(256, ge=1)
    """Images a forward pass."""
    workers: int = Field(0, ge=0)
    """Processes that load images; 0: this one."""
    gate: Gate | None = None
    """Fail where scores fell."""

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A suite or tasks that are given stand in the place of the default's."""
        whole = super().completed(given)
        if "suite" in given or "tasks" in given:
            return {name: value for name, value in whole.items() if name in given or name not in ("suite", "tasks")}
        return whole

    @model_validator(mode="before")
    @classmethod
    def _with_suite(cls, given: Any) -> Any:
        """Tasks written out, so that a report knows what was done, whatever becomes of a suite's file."""
        if not isinstance(given, dict):
            return given
        suite, tasks = given.get("suite"), given.get("tasks")
        if suite is None and not tasks:
            suite = "quick"
        if suite is None or not isinstance(tasks, list | None):
            return given
        return given | {"suite": None, "tasks": [*suite_tasks(suite), *(tasks or [])]}

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateSettings:
        names = [file_name(task.protocol) for task in self.tasks]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise ValueError(f"tasks: {twice[0]} is there twice; give one a name")
        return self


def file_name(name: str) -> str:
    """The name of a task as a file may have it."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name.lower()).strip("-.")


class EvaluateConfig(EvaluateSettings, Output):
    """Backbone and datasets in, report out."""

    model: BackboneConfig
    """The backbone."""
    datasets: dict[str, str] = Field(min_length=1)
    """Names that tasks use (train, test, ...) and URLs of their corpora."""
    leaks: dict[str, str] = Field(default_factory=dict)
    """For names of datasets the URL of a selection over each: what it drops was seen in training, and scores are given
    with and without it."""
    features: str | None = None
    """URL below which features are kept for other evaluations; null: `features` beside the report."""
    out: str = "runs/eval/{id}"
    """URL of the report; {id} stands for its id."""

    def runnable(self) -> list[TaskConfig]:
        """The tasks whose datasets are given."""
        return [task for task in self.tasks if set(task.datasets()) <= set(self.datasets)]

    def needed(self) -> set[str]:
        """Names of the given datasets that some task reads."""
        read = {name for task in self.runnable() for name in [*task.datasets(), *task.optional_datasets()]}
        return read & set(self.datasets)

    def left_out(self) -> dict[str, list[str]]:
        """Names of tasks that miss datasets, and which."""
        found = {task.protocol: sorted(set(task.datasets()) - set(self.datasets)) for task in self.tasks}
        for task in self.runnable():
            found |= {
                f"{task.protocol} on {name}": [name] for name in task.optional_datasets() if name not in self.datasets
            }
        return {name: missing for name, missing in found.items() if missing}

    @model_validator(mode="after")
    def _leaks_are_of_datasets(self) -> EvaluateConfig:
        if unknown := sorted(set(self.leaks) - set(self.datasets)):
            raise ValueError(f"leaks: {unknown[0]} is no dataset; there are {', '.join(sorted(self.datasets))}")
        return self

    @model_validator(mode="after")
    def _some_can_run(self) -> EvaluateConfig:
        if not self.runnable():
            name, missing = next(iter(self.left_out().items()))
            raise ValueError(f"datasets: {name} needs {', '.join(missing)}; give each as datasets.NAME")
        return self


class CompareConfig(Output):
    """Reports of evaluations in groups, of several seeds say; one report that holds them side by side out."""

    title: str = "Comparison"
    """Heading of the page."""
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    """Name of each group and the URLs of its reports; the first group is what others are compared with, report by
    report."""
    out: str = "runs/compare/{id}"
    """URL of the report; {id} stands for its id."""


class ReportSettings(Config):
    """What the page of a run shows."""

    title: str = "Fovea run"
    """Heading of the page."""
    gallery: int = Field(24, ge=1)
    """Examples in each gallery."""


class ReportConfig(ReportSettings, Output):
    """Artifacts of a run in, one page out."""

    artifacts: dict[str, str]
    """Name of each stage and URL of its artifact, in the order of the run."""
    facts: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Named scores to show on top, where the truth is known."""
    out: str
    """URL of the report; {id} stands for its id."""
