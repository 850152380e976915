"""Federated learning that exchanges a few scalars instead of a model, in JAX."""

__version__ = "0.1.0"
