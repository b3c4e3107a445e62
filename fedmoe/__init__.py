"""FedMoE: model-heterogeneous personalized federated learning with a mixture of experts (arXiv 2402.01350)."""

__version__ = "0.1.0"
