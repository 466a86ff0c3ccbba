"""Statistics of the calibration set: which there are, and the pass that collects them."""
