"""Storage, artifacts, corpora, configuration, launching, telemetry. Knows nothing of vision."""
