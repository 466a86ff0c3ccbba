"""Statistics of the calibration set: what can be asked for, and the one pass that collects it."""
