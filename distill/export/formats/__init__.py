"""What a backbone is published as, for tools that know nothing of Fovea."""
