"""The reference pages are those of the models."""

from __future__ import annotations

import re
from pathlib import Path

from flows.cli.commands import COMMANDS
from flows.cli.reference import reference_pages

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def test_the_committed_pages_are_current() -> None:
    pages = reference_pages()
    assert {path.name for path in FOLDER.glob("*.md")} == set(pages)
    for name, text in pages.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"docs/reference/{name}: run make reference"


def test_every_key_of_every_command_has_an_effect() -> None:
    text = "\n".join(reference_pages().values())
    for command in COMMANDS.values():
        assert f"`fovea {command.name}`" in text
        for name in command.model.model_fields:
            assert f"| `{name}` |" in text
    assert [line for line in text.splitlines() if line.startswith("| `") and re.search(r"\|  \|$", line)] == []


def test_every_link_leads_to_a_section() -> None:
    pages = reference_pages()
    anchors = {
        (name, title.lower()) for name, text in pages.items() for title in re.findall(r"^## (\w+)$", text, re.MULTILINE)
    }
    for name, text in pages.items():
        for page, anchor in re.findall(r"\]\(([\w.]*)#(\w+)\)", text):
            assert (page or name, anchor) in anchors
