"""From a file of instructions to each client's tokens: samples, templates, encode, partition, batches, federated."""
