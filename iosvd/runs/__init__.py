"""One run: its options, its identity, what it measures, and the record it leaves."""
