"""Commands without a configuration file, and the list of all commands."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from cyclopts import App, Parameter

from flows.cli.commands import COMMANDS, Command, print_url

app = App(
    name="fovea",
    version=lambda: importlib.metadata.version("fovea"),
    help_format="plaintext",
    help="From a pile of images to a published vision backbone. Every stage takes a YAML file, flags, or both (flags "
    "win), writes one artifact, and returns at once if that artifact exists. fovea recipes lists recipes, suites, "
    "pipelines and kinds.",
    default_parameter=Parameter(negative=(), negative_iterable=(), negative_bool=()),
)


def _list(command: Command, order: int) -> None:
    """Show a command on the page of all; `flows.cli.main` runs it."""

    def stage() -> None: ...

    stage.__doc__ = command.summary
    app.command(stage, name=command.name, sort_key=order)


for _order, _command in enumerate(COMMANDS.values()):
    _list(_command, _order)


@app.command(sort_key=29)
def init(file: Path = Path("pipeline.yaml"), /) -> None:
    """Write a commented example pipeline for your own images.

    Args:
        file: YAML file to write; it must not exist yet.
    """
    from flows.cli.recipes import write_example_pipeline

    write_example_pipeline(file)
    print(f"{file}: point `sources` at your images, then run `fovea run {file}`")


@app.command(sort_key=30)
def explain(key: str, /, *, selection: str, page: Path | None = None) -> None:
    """Explain why an image was kept or dropped, what it lost to and what it stands for.

    Args:
        key: the image's key, as selection.parquet and the corpus's index have it.
        selection: URL of the selection.
        page: HTML file to write the same to, with pictures.
    """
    from eval.report.explain import explain as explain_image
    from eval.report.explain import write_page

    story = explain_image(selection, key)
    print(story.text())
    if page is not None:
        write_page(story, page)


@app.command(sort_key=31)
def compare(*reports: str, title: str = "Comparison", out: str = "runs/compare/{id}") -> None:
    """Put reports of evaluations side by side: one table, one picture, one page.

    Args:
        reports: URLs of reports, or NAME=URL; the others are compared with the first.
        title: heading of the page.
        out: URL of the comparison; {id} stands for its id.
    """
    from flows.evaluation import compare, show_comparison

    artifact = compare(reports, title, out)
    show_comparison(artifact)
    print_url(artifact)


@app.command(sort_key=32)
def ui(root: str = "runs", /, *, host: str = "127.0.0.1", port: int = 4300, names: list[str] | None = None) -> None:
    """Serve all runs under a root to a browser: scores, pages, lineage, images, search. It writes nothing.

    Args:
        root: URL of the folder, ROOT of the pipelines.
        host: address to listen at; whoever reaches it sees everything under the root.
        port: port to listen at.
        names: further names that browsers may call it by, a proxy's say.
    """
    from eval.ui.server import serve

    serve(root, host, port, names or [])


@app.command(sort_key=33)
def doctor(*, storage: str | None = None, json: bool = False) -> None:
    """Check that all that Fovea stands on is there and works: a line each, with the remedy.

    Ends with exit code 1 where something fails.

    Args:
        storage: URL of a folder or bucket that is written to, read, and cleaned again.
        json: print the lines as JSON.
    """
    from flows.doctor import findings, show

    found = list(findings(storage))
    show(found, json)
    if any(each.status == "fail" for each in found):
        raise SystemExit(1)


@app.command(sort_key=34)
def recipes(name: str | None = None, /) -> None:
    """List recipes, suites, pipelines and kinds, or print one file.

    Args:
        name: of the recipe, suite or pipeline to print.
    """
    from flows.cli import recipes as shipped

    print(shipped.listing() if name is None else shipped.text_of(name))


@app.command(sort_key=35)
def completion(shell: str = "bash", /) -> None:
    """Print a script that completes commands, flags and recipes: eval "$(fovea completion bash)".

    Args:
        shell: bash or zsh.
    """
    from flows.cli.completion import completion_script

    print(completion_script(shell))
