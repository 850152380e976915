"""Federated algorithms, one published method a module."""

from zofl_jax.algorithms.decomfl import decomfl

__all__ = ["decomfl"]
