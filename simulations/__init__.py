"""Simulation engines, presets and the embedded demo: what runs a whole federation on one machine."""
