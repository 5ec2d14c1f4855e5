"""Losses of self-supervised learning; they compose by weighted sum."""
