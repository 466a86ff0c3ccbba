"""Measure a model's quality."""
