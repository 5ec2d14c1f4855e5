"""Losses of students on what frozen teachers say."""
