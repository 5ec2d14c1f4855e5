"""What a stage made, as artifacts on the server's pages: tables, a picture, where to look further.

The numbers are the artifact's own; the server only shows them, so a server that does not answer stops no stage.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from eval.report.gallery import data_uri
from eval.report.templating import PAGE
from eval.stats.scores import select_headlines
from eval.ui.pages import flatten, has_page
from flows.outcome import format_score as score
from infra.artifacts.artifact import Artifact
from infra.corpus.selection import read_steps
from infra.storage import filesystem

UI = "FOVEA_UI"
"""Environment variable: where `fovea ui` is reached, so that the server's pages can lead there."""
_PICTURE = "pca.png"
_WIDTH, _QUALITY = 900, 80  # pixels, JPEG

Row = dict[str, Any]


def publish_stage_artifacts(stage: str, artifact: Artifact) -> str:
    """Show a stage's artifact on the server; return its URL."""
    with suppress_api_errors():
        key, told = f"fovea-{stage}", _TABLES.get(artifact.manifest.kind, _metrics_table)(artifact)
        if told:
            create_table_artifact(told, key=key, description=f"[{stage} {artifact.id[:12]}]({page_link(artifact)})")
        if picture := _picture(artifact):
            create_markdown_artifact(
                f"![PCA of patch tokens]({picture})", key=f"{key}-pca", description="PCA of patches"
            )
        create_link_artifact(page_link(artifact), key=f"{key}-page", link_text=f"{stage}: {artifact.url}")
    return artifact.url


@contextmanager
def suppress_api_errors() -> Iterator[None]:
    """Say that the server does not answer, instead of failing."""
    try:
        yield
    except (httpx.HTTPError, PrefectException, OSError, ValueError) as error:
        get_run_logger().warning("not shown on the server: %s: %s", type(error).__name__, error)


def page_link(artifact: Artifact) -> str:
    """Where an artifact can be looked at: at `fovea ui`, else its page or its place."""
    if base := os.environ.get(UI):
        return f"{base.rstrip('/')}/artifacts/{artifact.id}"
    place = filesystem.join(artifact.url, PAGE) if has_page(artifact) else artifact.url
    return filesystem.local_path(place).absolute().as_uri() if filesystem.is_local(place) else place


def _metrics_table(artifact: Artifact) -> list[Row]:
    """The single numbers among an artifact's metrics."""
    return [
        {"what": name.replace("_", " "), "value": value}
        for name, value in flatten(artifact.metrics).items()
        if isinstance(value, int | float | str)
    ]


def _funnel_table(selection: Artifact) -> list[Row]:
    return [{"step": step.name, "kept": step.kept, "dropped": step.dropped} for step in read_steps(selection)]


def _scores_table(report: Artifact) -> list[Row]:
    """Headlines, a column for each model; the page of a run has none of its own."""
    if report.manifest.stage not in ("evaluate", "compare"):
        return []
    table: dict[str, Row] = {}
    for row in select_headlines(report.read_json("report.json")["rows"]):
        told = table.setdefault(row["protocol"], {"protocol": row["protocol"], "metric": row["metric"]})
        told[row["model"]] = score(row["value"], row["is_fraction"])
    return list(table.values())


_TABLES: dict[str, Callable[[Artifact], list[Row]]] = {"selection": _funnel_table, "report": _scores_table}


def _picture(artifact: Artifact) -> str | None:
    """A report's PCA picture, small, as a data URI: the server's database holds it."""
    if not any(file.path == _PICTURE for file in artifact.manifest.files):
        return None
    with Image.open(io.BytesIO(artifact.read_bytes(_PICTURE))) as image:
        image.thumbnail((_WIDTH, _WIDTH))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return data_uri(buffer.getvalue(), "image/jpeg")
