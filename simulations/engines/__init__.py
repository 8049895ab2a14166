"""The two ways to run a federation on one machine: in this process, and with Flower's own simulation runtime."""
