"""Evaluation of the teachers that a training writes while it goes on, in a process or on a worker of its own.

`python -m flows.checkpoint_eval JOB` runs it as a process; see `infra.launch.job`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client

from eval.config import CompareConfig, EvaluateConfig, EvaluateSettings
from eval.stats.scores import select_headlines
from eval.stats.verdict import MODEL
from flows.config import CheckpointEvalConfig
from flows.orchestration import stages
from flows.outcome import format_score
from infra.artifacts.artifact import find, open_artifact
from infra.errors import UserError
from infra.hashing import hash_json
from infra.launch.job import Job, module_main, parent_tether_env
from infra.storage import filesystem
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.checkpoint import teacher_export


@flow(name="fovea-eval-checkpoints")
def eval_checkpoints(config: CheckpointEvalConfig) -> str:
    """Score each teacher as it comes, and the checkpoint at the end; return the URL of their comparison.

    Raises:
        UserError: nothing came for longer than the configuration's patience.
    """
    reports: dict[str, list[str]] = {}
    for step, url in _iterate_teachers(config):
        name = f"step {step:,}"
        reports[name] = [stages.evaluate(_evaluation(config, url))]
        print(f"{name}: {_scores(reports[name][0])}", file=sys.stderr)
    out = filesystem.join(_out(config), "compare", "{id}")
    return stages.compare(CompareConfig(title="Teachers while training", groups=reports, out=out))


def _scores(report: str) -> str:
    """Headlines of a report's model in a line."""
    rows = select_headlines(open_artifact(report, "report").read_json("report.json")["rows"])
    return ", ".join(
        f"{row['protocol']} {format_score(row['value'], row['is_fraction'])}" for row in rows if row["model"] == MODEL
    )


def _iterate_teachers(config: CheckpointEvalConfig) -> Iterator[tuple[int, str]]:
    """Steps and URLs of teachers, as they appear, the finished checkpoint last."""
    seen: set[str] = set()
    last_news = time.monotonic()
    while True:
        finished = find(config.training)  # first: what was written before it is listed below
        for step, teacher in teacher_export.list_exports(config.training):
            if teacher.url not in seen:
                seen.add(teacher.url)
                yield step, teacher.url
                last_news = time.monotonic()
        if finished is not None:
            yield int(finished.metrics["steps"]), finished.url
            return
        if time.monotonic() - last_news > 3600 * config.patience_hours:
            raise UserError(f"{config.training}: no teacher for {config.patience_hours:g} hours; is it being trained?")
        time.sleep(config.poll_seconds)


def _evaluation(config: CheckpointEvalConfig, url: str) -> EvaluateConfig:
    settings = {name: getattr(config, name) for name in (*EvaluateSettings.model_fields, "datasets", "leaks")}
    places = {
        "features": filesystem.join(_out(config), "features"),
        "out": filesystem.join(_out(config), "evaluate", "{id}"),
    }
    return EvaluateConfig(**settings, **places, model=CheckpointBackboneConfig(url=url))


def _out(config: CheckpointEvalConfig) -> str:
    return config.out or f"{config.training.rstrip('/')}.reports"


@contextmanager
def evaluate_in_background(config: CheckpointEvalConfig, folder: Path, deployment: str | None) -> Iterator[list[str]]:
    """Follow a training that is made meanwhile: on the worker of a deployment, which is not waited for, or in a process
    of low priority, which ends soon after the training.

    Yields:
        A list that holds the URL of the comparison once the process has ended.

    Raises:
        UserError: the teachers could not be scored.
    """
    found: list[str] = []
    if deployment is not None:
        from prefect.deployments import run_deployment

        key = hash_json([config.training, config.settings()])  # a run that goes on has its follower already
        parameters = {"config": config.settings()}
        run_deployment(deployment, parameters=parameters, timeout=0, as_subflow=False, idempotency_key=key)
        yield found
        return
    job = Job(folder)
    job.prepare(config)
    command = ["nice", "-n", "19", sys.executable, "-m", "flows.checkpoint_eval", str(folder)]
    with get_client(sync_client=True) as client:  # the server that this flow has, even if it is its own
        environment = {**os.environ, **parent_tether_env(), "PREFECT_API_URL": str(client.api_url)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield found
        out, _ = process.communicate()
    finally:
        process.terminate()
        process.wait()
    ended = job.exit_status()
    if process.returncode or ended is not None:
        raise UserError(f"eval-checkpoints: {ended.message if ended else f'ended with {process.returncode}'}")
    found.append(out.split()[-1])


if __name__ == "__main__":
    module_main(CheckpointEvalConfig, lambda config: print(eval_checkpoints(config)))
