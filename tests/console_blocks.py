"""Commands of the documentation's console blocks, with the output that the pages show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```console\n(?P<text>.*?)^```|<!-- setup:\n(?P<setup>.*?)-->",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
_ID = re.compile(r"\b[0-9a-f]{12}\b")


@dataclass(frozen=True)
class Block:
    """One console block, or commands that a page needs and does not show."""

    commands: list[str]
    output: list[str]
    """Lines that the page shows below its commands."""
    not_run: str | None
    """The reason why the block is not run."""


def blocks(page: Path) -> list[Block]:
    """The console blocks of a page, in order."""
    return [_block(match) for match in _BLOCK.finditer(page.read_text())]


def _block(match: re.Match[str]) -> Block:
    if match["setup"] is not None:
        return Block(match["setup"].splitlines(), [], None)
    commands, output = list[str](), list[str]()
    continued = False
    for line in match["text"].splitlines():
        if continued:
            commands[-1] += f"\n{line}"
        elif line.startswith("$ "):
            commands.append(line.removeprefix("$ "))
        else:
            output.append(line)
        continued = line.endswith("\\") and (continued or line.startswith("$ "))
    return Block(commands, output, match["reason"])


def shape(line: str) -> str:
    """A line of output without what differs from run to run: numbers, ids, column widths, a busy machine's warnings."""
    line = re.sub(r"^(ok|warn)\b", "STATUS", line)
    return re.sub(r"\s+", " ", _NUMBER.sub("N", _ID.sub("ID", line))).strip()


def missing(shown: list[str], printed: str) -> list[str]:
    """Lines that a page shows and a run did not print, by their shape; `…` in a shown line stands for anything."""
    found = {shape(line) for line in printed.splitlines()}
    return [line for line in shown if not any(_matches(shape(line), each) for each in found)]


def _matches(shown: str, printed: str) -> bool:
    return re.fullmatch(".*".join(re.escape(part) for part in shown.split("…")), printed) is not None


def pages(root: Path) -> Iterator[Path]:
    """README and the pages of docs/ that have console blocks."""
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if blocks(page):
            yield page
