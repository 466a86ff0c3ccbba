"""The compressed layers: factors, rows of two widths, and the checkpoints that hold them."""
