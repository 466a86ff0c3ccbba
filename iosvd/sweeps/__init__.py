"""Many runs: from the overrides of a sweep to its jobs, launched, watched and resumed."""
