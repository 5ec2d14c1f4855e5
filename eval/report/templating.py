"""Templates to pages. Everything that came from data is escaped."""

from __future__ import annotations

from typing import Any

import jinja2

PAGE = "index.html"


def render_template(name: str, **values: Any) -> str:
    """One of `templates/`, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(f"{name}.html.jinja").render(**values)
