"""Protocols: each takes a backbone and datasets and says how good the one is on the others."""
