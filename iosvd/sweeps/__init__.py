"""Many runs: the jobs of a sweep, launched, watched and resumed."""
