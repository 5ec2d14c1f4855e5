"""What a training will need before it runs: work, memory, time."""
