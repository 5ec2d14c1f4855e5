"""Pretraining with the probe that its configuration asks for, which lies in another room.

`python -m flows.pretraining JOB` runs it as a process of its own; see `infra.launch.job`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pretrain
from infra.artifacts.artifact import Artifact, find_existing
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.launch.job import module_main
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.config import PretrainConfig
from pretrain.config import Probe as ProbeSettings
from pretrain.data.images import decodable_rows

if TYPE_CHECKING:
    from pretrain.models.timm_network import Network
    from pretrain.monitoring.reporter import Probe

_BATCH = 256
_TEMPERATURE = 0.07


def run(config: PretrainConfig) -> Artifact:
    """Pretrain a backbone."""
    if config.collapse.probe is None:
        return pretrain.run(config)
    made = find_existing(checkpoint_spec(config), config.out)
    return made or pretrain.run(config, knn_probe(config, config.collapse.probe))


def knn_probe(config: PretrainConfig, settings: ProbeSettings) -> Probe:
    """Accuracy of the teacher by its nearest neighbors, 0 to 1, on two labeled corpora.

    Raises:
        UserError: they have no labels, or not the same.
    """
    train, test = (decodable_rows(Corpus.open(url)) for url in (settings.train, settings.test))
    if train.classes != test.classes or not len(train.labels) or not len(test.labels):
        raise UserError(f"collapse.probe: {settings.train} and {settings.test} need the same labels")

    def score(backbone: Network, steps: int) -> Mapping[str, float]:
        from eval.protocols.knn import predict
        from pretrain.backbones.checkpoint_backbone import wrap_checkpoint
        from pretrain.backbones.features import extract

        model = wrap_checkpoint(backbone, config.views)
        bank, queries = (extract(model, corpus, _BATCH, "probe", shown=False) for corpus in (train, test))
        classes = int(max(train.labels.max(), test.labels.max())) + 1
        votes = predict(bank, train.labels, queries, classes, settings.k, _TEMPERATURE)
        return {"knn": float((votes.argmax(1) == test.labels).mean())}

    return score


if __name__ == "__main__":
    module_main(PretrainConfig, run)
