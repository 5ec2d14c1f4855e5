"""A small web-like corpus with known truth, and the scores of curation against it."""
