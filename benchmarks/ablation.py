"""Does Fovea's curation help? A long-tailed pool made of CIFAR-10, small backbones on four choices of its images.

`FOVEA_DATA=/path/of/image/sets python -m benchmarks.ablation [--root FOLDER]`. About an hour on one core. The pool:
classes of Zipf's sizes, a third of it copies, a tenth of it junk. Deduplicated is what exact, blank and near-duplicate
steps leave; curated, of that, a balanced draw over clusters of the features of the backbone that was trained on the raw
pool: no label is looked at.
"""

from __future__ import annotations

import argparse
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from curation import run
from curation.config import CurateConfig, EmbedConfig, IngestConfig
from curation.embed import embed
from curation.ingest.ingest import ingest
from curation.synthetic.corpus import encode, near_copy
from flows.config import AblateConfig
from infra.config import load_yaml
from infra.corpus.selection import Selection
from pretrain.backbones.config import BackboneConfig, CheckpointBackboneConfig, PixelDescriptorConfig
from pretrain.config import PretrainConfig, PretrainSettings
from pretrain.data.decode import decode_rgb

_LARGEST_CLASS, _COPIES, _JUNK = 3600, 5000, 1600
_RECIPE = Path(__file__).parents[1] / "pretrain/recipes/tiny_cpu.yaml"
_DEDUPLICATE = [
    {"kind": "exact"},
    {"kind": "image_quality", "min_entropy": 2.0},
    {"kind": "near_duplicates", "threshold": 0.95},
]


def pool(data: Path, folder: Path) -> Path:
    """Write the pool as a folder of images, once."""
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    images = list(_long_tail(data))
    of = np.minimum(rng.zipf(1.5, _COPIES) - 1, len(images) - 1)
    order = rng.permutation(len(images))
    partial = folder.with_suffix(".part")
    partial.mkdir(parents=True)
    for number, image in enumerate(images):
        (partial / f"{number:05d}.jpg").write_bytes(image)
    for number, which in enumerate(order[of]):
        data_, suffix = near_copy(np.asarray(decode_rgb(images[which])), rng)
        (partial / f"copy-{number:05d}.{suffix}").write_bytes(images[which] if rng.random() < 0.3 else data_)
    for number in range(_JUNK):
        flat = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (32, 32, 3))
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (partial / f"junk-{number:05d}.png").write_bytes(encode(flat if number % 2 else noise))
    return partial.rename(folder)


def _long_tail(data: Path) -> Iterator[bytes]:
    """Images of the first eight training shards: of the class of rank r at most the r-th part of the largest."""
    seen: dict[int, int] = {}
    for shard in sorted(data.glob("train-*.tar.gz"))[:8]:
        with tarfile.open(shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        for name in (each for each in files if each.endswith(".jpg")):
            rank = int(files[name.replace(".jpg", ".cls")])
            seen[rank] = seen.get(rank, 0) + 1
            if seen[rank] <= _LARGEST_CLASS / (rank + 1):
                yield files[name]


def measure(data: Path, root: Path, seeds: int) -> str:
    """URL of the comparison."""
    from flows.ablation import ablate
    from flows.training import train_apart

    def ingested(source: str) -> str:
        return ingest(IngestConfig(source=source, out=str(root / "ingest" / "{id}"))).url

    corpus = ingested(str(pool(data, root / "pool")))
    settings = PretrainSettings(**load_yaml(_RECIPE))
    first = PretrainConfig(**dict(settings), corpora=[corpus], out=str(root / "pretrain" / "{id}"))

    def curated(backbone: BackboneConfig, steps: list[dict[str, object]], selection: str | None = None) -> str:
        vectors = embed(EmbedConfig(corpus=corpus, backbone=backbone, out=str(root / "embed" / "{id}"))).url
        out = str(root / "curate" / "{id}")
        return run(CurateConfig(corpus=corpus, embeddings=vectors, steps=steps, selection=selection, out=out)).url

    clean = curated(PixelDescriptorConfig(side=16, frequencies=8, whiten=1.5), _DEDUPLICATE)
    left = Selection.open(clean).artifact.metrics["kept"]
    balance = {"kind": "balance", "levels": [300, 30], "target": left * 6 // 10}
    even = curated(CheckpointBackboneConfig(url=train_apart("pretrain", first)), [balance], clean)
    return ablate(
        AblateConfig(
            root=str(root),
            corpus=corpus,
            selections={"deduplicated": clean, "curated": even},
            train=ingested(f"{data}/train-000009.tar.gz"),
            test=ingested(f"{data}/test-000000.tar.gz"),
            pretrain=settings,
            seeds=list(range(seeds)),
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=6)
    from flows.evaluation import show_comparison
    from infra.artifacts.artifact import open_artifact

    given = parser.parse_args()
    show_comparison(
        open_artifact(measure(Path(os.environ["FOVEA_DATA"]) / "cifar10", given.root, given.seeds), "report")
    )
