"""Measure speed and memory of generation: make bench-inference."""
