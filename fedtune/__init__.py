"""fedtune: federated full-parameter fine-tuning of language models in which a round costs kilobytes."""

__version__ = "0.1.0"
