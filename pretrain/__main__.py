"""`python -m pretrain JOB`: run the stage as a process of its own; see `infra.launch.job`."""

from infra.launch.job import module_main
from pretrain import run
from pretrain.config import PretrainConfig

if __name__ == "__main__":
    module_main(PretrainConfig, run)
