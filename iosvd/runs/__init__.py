"""One run: options, identity, measurement, record."""
