"""Models: loading, sites, decoder blocks, losses."""
