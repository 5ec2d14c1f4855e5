"""Start a stage as processes of its own: on this machine, under torchrun or DeepSpeed, or as a SLURM job."""
