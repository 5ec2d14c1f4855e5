"""Benchmarks: `python -m benchmarks.NAME [--json FILE]`, each beside a peer measured in the same run."""
