"""A pool that grows: what its last curation made is remembered below the root, so that the next one goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.compute as pc

from curation import curate, embed
from flows.config import PipelineConfig
from infra import storage
from infra.artifacts import find, open_artifact
from infra.hashing import hash_json
from infra.selections import Selection

RECORD = "curated.json"
_STAGES = ("embed-pool-copies", "embed-pool-likeness", "deduplicate", "retrieve")


@dataclass(frozen=True)
class Grown:
    """A curation and the one before it.

    Args:
        root: where both are.
        pool: id of the corpus that is curated.
        settings: a hash of what must not change for one curation to go on from another.
        earlier: URLs of what the one before it made, by stage.
        remembers: whether this one is for the next to go on from.
    """

    root: str
    pool: str
    settings: str
    earlier: Mapping[str, str]
    remembers: bool

    @classmethod
    def since(cls, config: PipelineConfig, pool: str) -> Grown:
        """The curation of a pool and the last one of it by the same settings.

        Where that was of the same images, it is the one before that, so that the same artifacts are found again.
        """
        settings = hash_json(
            {name: getattr(config, name).settings() for name in ("copies", "likeness", "deduplicate", "retrieve")}
            | {"versions": [embed.VERSION, curate.VERSION]}
        )
        current = open_artifact(pool, "corpus").id
        place = storage.join(config.root, RECORD)
        record = json.loads(storage.read_bytes(place)) if config.grows and storage.exists(place) else {}
        earlier = {}
        if record.get("settings") == settings:
            earlier = record["earlier"] if record["pool"] == current else record["made"]
        there = {stage: url for stage, url in earlier.items() if find(url) is not None}
        return cls(config.root, current, settings, there, config.grows)

    def before(self, stage: str) -> str | None:
        """What the earlier curation made at a stage."""
        return self.earlier.get(stage)

    def remember(self, made: Mapping[str, str]) -> None:
        """Write down what this curation made."""
        if not self.remembers:
            return
        record = {
            "settings": self.settings,
            "pool": self.pool,
            "made": {stage: made[stage] for stage in _STAGES if stage in made},
            "earlier": dict(self.earlier),
        }
        storage.write_atomic(storage.join(self.root, RECORD), json.dumps(record, indent=2).encode())


def changed_share(before: str | None, now: str) -> float:
    """How much of what is kept differs between two selections: images in one alone over images in either; 1 without an
    earlier one.

    Args:
        before: URL of the earlier selection.
    """
    if before is None or find(before) is None:
        return 1.0
    old, new = (_kept(url) for url in (before, now))
    either = len(old | new)
    return len(old ^ new) / either if either else 0.0


def _kept(url: str) -> set[str]:
    ledger = Selection.open(url).ledger
    return set(ledger["key"].filter(pc.fill_null(ledger["keep"], False)).to_pylist())
