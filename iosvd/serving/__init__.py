"""Compressed checkpoints in servers that have their own layers."""
