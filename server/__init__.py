"""The server side of a federation: the round loop, the Flower strategy and the ServerApp."""
