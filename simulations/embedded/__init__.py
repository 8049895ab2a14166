"""A small pretrained model and federated data that ship with the package, and the code that makes them."""
