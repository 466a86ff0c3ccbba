"""What is computed once and kept on disk: tokens, statistics, spectra, scores, losses of trials."""
