"""Federated algorithms, one published method a module."""

from zofl_jax.algorithms.decomfl import decomfl
from zofl_jax.algorithms.fedavg import fedavg
from zofl_jax.algorithms.fedkseed import fedkseed
from zofl_jax.algorithms.fedopt import fedadagrad, fedadam, fedyogi
from zofl_jax.algorithms.fedsgd import fedsgd
from zofl_jax.algorithms.fedzo import fedzo
from zofl_jax.algorithms.feedsign import feedsign
from zofl_jax.algorithms.hiso import hiso
from zofl_jax.algorithms.mezo import mezo
from zofl_jax.algorithms.scaffold import scaffold

__all__ = [
    "decomfl",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedkseed",
    "fedsgd",
    "fedyogi",
    "fedzo",
    "feedsign",
    "hiso",
    "mezo",
    "scaffold",
]
