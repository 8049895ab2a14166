"""The client side of a federation: a Flower ClientApp that forwards, and the worker that owns model and data."""
