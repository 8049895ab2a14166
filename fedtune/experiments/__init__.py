"""Several runs that belong together: sweeps over settings, each run an ordinary run folder made by a process of its own."""
