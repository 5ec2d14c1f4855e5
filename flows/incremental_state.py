"""A pool that grows: what its last curation made is remembered below the root, so that the next one goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from curation import curate, embed
from flows.config import PipelineConfig
from infra.artifacts.artifact import find, open_artifact
from infra.corpus.arrow import index_in
from infra.corpus.selection import Selection
from infra.hashing import hash_json
from infra.storage import filesystem

RECORD, TRAINED = ".state/curated.json", ".state/trained.json"
_SETTINGS = ("dedup_embedding", "retrieval_embedding", "deduplicate", "retrieve")
_STAGES = ("embed-pool-dedup", "embed-pool-retrieval", "deduplicate", "retrieve")


@dataclass(frozen=True)
class IncrementalState:
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
    previous: Mapping[str, str]
    remembers: bool

    @classmethod
    def previous_of(cls, config: PipelineConfig, pool: str) -> IncrementalState:
        """The curation of a pool and the last one of it by the same settings.

        Where that was of the same images, it is the one before that, so that the same artifacts are found again.
        """
        settings = hash_json(
            {name: getattr(config, name).settings() for name in _SETTINGS}
            | {"versions": [embed.VERSION, curate.VERSION]}
        )
        current = open_artifact(pool, "corpus").id
        place = filesystem.join(config.root, RECORD)
        record = json.loads(filesystem.read_bytes(place)) if config.incremental and filesystem.exists(place) else {}
        earlier = {}
        if record.get("settings") == settings:
            earlier = record["earlier"] if record["pool"] == current else record["made"]
        whole = all(_is_complete(url) for url in earlier.values())
        return cls(config.root, current, settings, earlier if whole else {}, config.incremental)

    def previous_selection(self, stage: str) -> str | None:
        """What the earlier curation made at a stage."""
        return self.previous.get(stage)

    def remember(self, made: Mapping[str, str]) -> None:
        """Write down what this curation made."""
        if not self.remembers:
            return
        record = {
            "settings": self.settings,
            "pool": self.pool,
            "made": {stage: made[stage] for stage in _STAGES if stage in made},
            "earlier": dict(self.previous),
        }
        filesystem.write_atomic(filesystem.join(self.root, RECORD), json.dumps(record, indent=2).encode())


def _is_complete(url: str) -> bool:
    """Whether an artifact is there, with the corpus and embeddings that it was made from."""
    artifact = find(url)
    if artifact is None:
        return False
    needed = [each for role, each in artifact.manifest.inputs.items() if role in ("corpus", "embeddings")]
    found = [find(each.url) for each in needed]
    return all(there is not None and there.id == each.id for there, each in zip(found, needed, strict=True))


def record_training(root: str, selection: str) -> None:
    """Write down that a selection is, or is about to be, trained on."""
    if _read_trained_selection(root) != selection:
        filesystem.write_atomic(filesystem.join(root, TRAINED), json.dumps({"selection": selection}).encode())


def changed_fraction(root: str, selection: str) -> float:
    """How much of what is kept differs from the selection that was last trained on: images in one alone over images in
    either; 1 where nothing was.

    Args:
        selection: URL of the new one.
    """
    before = _read_trained_selection(root)
    if before is None:
        return 1.0
    old, new = (_read_kept_keys(url) for url in (before, selection))
    both = int((index_in(old, new) >= 0).sum())
    either = len(old) + len(new) - both
    return (either - both) / either if either else 0.0


def _read_trained_selection(root: str) -> str | None:
    place = filesystem.join(root, TRAINED)
    if not filesystem.exists(place):
        return None
    url = str(json.loads(filesystem.read_bytes(place))["selection"])
    return url if find(url) is not None else None


def _read_kept_keys(url: str) -> pa.ChunkedArray:
    ledger = Selection.open(url).ledger
    return ledger["key"].filter(pc.fill_null(ledger["keep"], False))
