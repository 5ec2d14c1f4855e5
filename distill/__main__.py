"""`python -m distill JOB`: run the stage as a process of its own; see `infra.launch.job`."""

from distill import run
from distill.config import DistillConfig
from infra.launch.job import module_main

if __name__ == "__main__":
    module_main(DistillConfig, run)
