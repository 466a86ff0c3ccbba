"""The cache on disk: tokens, statistics, spectra, scores and trial losses, each computed once."""
