"""Templates to pages. Everything that came from data is escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

PAGE = "index.html"


def rendered(name: str, **values: Any) -> str:
    """One of `templates/`, filled in."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("eval").joinpath(f"templates/{name}.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(**values)
