"""What an artifact was made from, and what was made from it, as a drawing from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from eval.ui.catalog import Catalog
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import Ancestor, ancestors

WIDTH, HEIGHT = 178, 44
_GAP = (12, 36)  # pixels between boxes of a layer, and between layers


@dataclass(frozen=True)
class LineageBox:
    """An artifact, or raw data, in the drawing."""

    id: str
    title: str
    note: str
    left: int
    top: int
    known: bool
    """Whether it has a page"""
    current: bool


@dataclass(frozen=True)
class LineageDrawing:
    """Boxes, and curves between them as SVG paths."""

    boxes: list[LineageBox]
    curves: list[str]
    width: int
    height: int


def draw_lineage(artifact: Artifact, catalog: Catalog) -> LineageDrawing:
    """Everything that an artifact was made from, and what was made from it directly."""
    shown = ancestors([artifact.as_ref()])
    for child in catalog.children_of(artifact.id):
        inputs = {role: source.id for role, source in child.manifest.inputs.items()}
        shown.append(Ancestor(child.manifest.stage, child.manifest.kind, child.id, child.url, inputs, {}, None))
    known = {each.id for each in catalog.artifacts()}
    ids = {each.id for each in shown}
    parents = {each.id: list(dict.fromkeys(id for id in each.inputs.values() if id in ids)) for each in shown}
    layers = _layers(parents)
    widest = max(len(layer) for layer in layers)
    width = widest * (WIDTH + _GAP[0]) - _GAP[0]
    of = {each.id: each for each in shown}
    boxes: dict[str, LineageBox] = {}
    for number, layer in enumerate(layers):
        # Near the middle of what they were made from, so that few curves cross.
        layer = sorted(layer, key=lambda id: _middle([boxes[parent].left for parent in parents[id]]))
        start = (width - len(layer) * (WIDTH + _GAP[0]) + _GAP[0]) // 2
        for place, id in enumerate(layer):
            left, top = start + place * (WIDTH + _GAP[0]), number * (HEIGHT + _GAP[1])
            has_page = of[id].kind != "raw data" and id in known
            boxes[id] = LineageBox(id, of[id].stage, _note(of[id]), left, top, has_page, id == artifact.id)
    curves = [_curve(boxes[parent], boxes[id]) for id, found in parents.items() for parent in found]
    return LineageDrawing(list(boxes.values()), curves, width, len(layers) * (HEIGHT + _GAP[1]) - _GAP[1])


def _layers(parents: Mapping[str, list[str]]) -> list[list[str]]:
    """Each one below the lowest of what it was made from, in whatever order they are given."""
    depth: dict[str, int] = {}
    for id in TopologicalSorter(parents).static_order():
        depth[id] = 1 + max((depth[each] for each in parents[id]), default=-1)
    return [[id for id, place in depth.items() if place == number] for number in range(max(depth.values()) + 1)]


def _middle(places: Sequence[int]) -> float:
    return sum(places) / len(places) if places else 0.0


def _note(each: Ancestor) -> str:
    if each.kind == "raw data":
        return each.url
    return f"{each.id[:8]}, {each.images:,} images" if each.images is not None else each.id[:8]


def _curve(start: LineageBox, end: LineageBox) -> str:
    x, y = start.left + WIDTH // 2, start.top + HEIGHT
    to_x, to_y = end.left + WIDTH // 2, end.top
    middle = (y + to_y) // 2
    return f"M{x},{y} C{x},{middle} {to_x},{middle} {to_x},{to_y}"
