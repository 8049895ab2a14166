"""Directions: the vectors over all trainable parameters that the seeds of a pool name. See base.py for the contract."""
