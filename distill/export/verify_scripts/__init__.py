"""Scripts that load a published directory with nothing of Fovea, each in a process of its own."""
