"""The cache on disk: tokens, statistics, spectra, scores and losses of trials, computed once."""
