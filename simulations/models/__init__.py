"""Real models for simulations and tests, made from packages of the index, without a model hub."""
