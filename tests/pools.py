"""Small corpora and embeddings with chosen vectors, written as artifacts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation import run
from curation.config import CurateConfig
from curation.synthetic.corpus import encode
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.corpus import embeddings
from infra.corpus.selection import Selection
from infra.corpus.writer import CorpusWriter


def unit(seed: int, n: int, dim: int = 4) -> np.ndarray:
    """Random unit vectors, as they come out of embeddings."""
    vectors = np.random.default_rng(seed).normal(size=(n, dim))
    return halved(vectors)


def halved(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def planted(seed: int, n: int, dim: int, least: float = 0.62, concepts: int = 0) -> np.ndarray:
    """A fifth are copies of others, as like them as chance has it from `least` up; float16 `[n, dim]`."""
    rng = np.random.default_rng(seed)
    originals = n * 4 // 5
    base = np.asarray(rng.normal(size=(originals, dim)), dtype=np.float64)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    if concepts:
        centers = rng.normal(size=(concepts, dim)) / np.sqrt(dim)
        base = halved(base + 0.65 * centers[rng.integers(0, concepts, originals)]).astype(np.float64)
    source = base[rng.zipf(1.9, n - originals).clip(1, originals) - 1]
    noise = rng.normal(size=source.shape)
    noise -= (noise * source).sum(1, keepdims=True) * source
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    strength = rng.uniform(least, 0.999, (len(source), 1))
    copies = strength * source + np.sqrt(1 - strength**2) * noise
    return halved(np.concatenate([base, copies])[rng.permutation(n)])


@dataclass(frozen=True)
class Pool:
    """URLs of a corpus and its embeddings."""

    corpus: str
    embeddings: str | None
    keys: list[str]


def pool(
    folder: Path,
    vectors: np.ndarray,
    name: str = "k",
    rows: Sequence[Mapping[str, Any]] | None = None,
    keys: Sequence[str] | None = None,
) -> Pool:
    """Write a corpus of tiny images and its embeddings.

    Args:
        rows: for each image what its index says beyond the default, and `json`, bytes of its .json file.
    """
    keys = keys or [f"{name}{i:04d}" for i in range(len(vectors))]
    identity = hashlib.sha256(vectors.tobytes() + repr((keys, rows)).encode()).hexdigest()
    corpus = get_or_create(
        ArtifactSpec("corpus", "test", 1, {"identity": identity}),
        str(folder / f"{name}-corpus"),
        lambda directory: _write_corpus(directory, keys, rows),
    )
    plan = ArtifactSpec("embeddings", "test", 1, {"dim": vectors.shape[1]}, {"corpus": corpus.as_ref()})
    embedded = get_or_create(
        plan, str(folder / f"{name}-embeddings"), lambda directory: _write_embeddings(directory, keys, vectors)
    )
    return Pool(corpus.url, embedded.url, list(keys))


def _write_corpus(directory: Path, keys: Sequence[str], rows: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    writer = CorpusWriter(directory, 1 << 20)
    for number, key in enumerate(keys):
        row = dict(rows[number]) if rows else {}
        side = np.array([[[number % 256, number // 256, 7]]], dtype=np.uint8)
        members = {"png": encode(side)}
        if (content := row.pop("json", None)) is not None:
            members["json"] = content
        facts = {"width": 1, "height": 1, "label": None, "caption": None}
        writer.add(key, members, "png", facts | {"sha256": hashlib.sha256(members["png"]).hexdigest()} | row)
    writer.finish()
    return {"images": len(keys)}


def written(folder: Path, images: Sequence[bytes]) -> Pool:
    """Write a corpus of given images, without embeddings."""
    keys = [f"k{i:04d}" for i in range(len(images))]

    def write(directory: Path) -> Mapping[str, Any]:
        writer = CorpusWriter(directory, 1 << 20)
        for key, image in zip(keys, images, strict=True):
            width, height = Image.open(io.BytesIO(image)).size
            facts = {"width": width, "height": height, "label": None, "caption": None}
            writer.add(key, {"img": image}, "img", facts | {"sha256": hashlib.sha256(image).hexdigest()})
        writer.finish()
        return {"images": len(keys)}

    identity = hashlib.sha256(b"".join(images)).hexdigest()
    corpus = get_or_create(ArtifactSpec("corpus", "test", 1, {"identity": identity}), str(folder / "corpus"), write)
    return Pool(corpus.url, None, keys)


def _write_embeddings(directory: Path, keys: Sequence[str], vectors: np.ndarray) -> Mapping[str, Any]:
    import pyarrow as pa

    embeddings.write_keys(directory, pa.chunked_array([pa.array(keys)]))
    middle = len(vectors) // 2
    for number, part in enumerate((vectors[:middle], vectors[middle:])):  # as they are: written anew they would round
        np.save(directory / f"part-{number:05d}.npy", part)
    return {"images": len(keys), "dim": vectors.shape[1]}


def curated(
    folder: Path, of: Pool, *steps: Mapping[str, Any], **settings: Any
) -> tuple[Artifact, list[dict[str, Any]]]:
    """Apply steps to a pool; return the selection and its ledger's rows."""
    out = str(folder / "selections" / "{id}")
    config = CurateConfig(corpus=of.corpus, embeddings=of.embeddings, steps=list(steps), out=out, **settings)
    artifact = run(config)
    rows = Selection.open(artifact.url).ledger.to_pylist()
    return artifact, [row | {"score": None if np.isnan(row["score"]) else row["score"]} for row in rows]
