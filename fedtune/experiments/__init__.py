"""Many runs that belong together: comparisons of algorithms, and sweeps over settings."""
