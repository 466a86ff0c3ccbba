"""Models: loading them, finding their sites and blocks, their loss."""
