"""One report that says how fast and how exact the library is on a GPU: make gpu-report."""
