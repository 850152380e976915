"""Federated algorithms, one published method a module; `METHODS` has a row for each.

A row is imported above and listed below; its defaults, settings and limits stand in its module.
"""

from collections.abc import Mapping
from types import MappingProxyType

from zofl_jax.algorithms.decomfl import METHOD as DECOMFL
from zofl_jax.algorithms.decomfl import decomfl
from zofl_jax.algorithms.decomfl_groups import METHOD as DECOMFL_GROUPS
from zofl_jax.algorithms.decomfl_groups import decomfl_groups
from zofl_jax.algorithms.fedavg import METHOD as FEDAVG
from zofl_jax.algorithms.fedavg import METHOD_PROXIMAL as FEDPROX
from zofl_jax.algorithms.fedavg import fedavg
from zofl_jax.algorithms.fedkseed import METHOD as FEDKSEED
from zofl_jax.algorithms.fedkseed import METHOD_PRO as FEDKSEED_PRO
from zofl_jax.algorithms.fedkseed import fedkseed
from zofl_jax.algorithms.fedopt import METHODS as FEDOPT
from zofl_jax.algorithms.fedopt import fedadagrad, fedadam, fedyogi
from zofl_jax.algorithms.fedsgd import METHOD as FEDSGD
from zofl_jax.algorithms.fedsgd import fedsgd
from zofl_jax.algorithms.fedzo import METHOD as FEDZO
from zofl_jax.algorithms.fedzo import fedzo
from zofl_jax.algorithms.feedsign import METHOD as FEEDSIGN
from zofl_jax.algorithms.feedsign import feedsign
from zofl_jax.algorithms.ferret import METHOD as FERRET
from zofl_jax.algorithms.ferret import ferret
from zofl_jax.algorithms.hiso import METHOD as HISO
from zofl_jax.algorithms.hiso import hiso
from zofl_jax.algorithms.hybrid import METHOD as HYBRID
from zofl_jax.algorithms.hybrid import hybrid
from zofl_jax.algorithms.method import Method, Parts, Refusal
from zofl_jax.algorithms.mezo import METHOD as MEZO
from zofl_jax.algorithms.mezo import mezo
from zofl_jax.algorithms.scaffold import METHOD as SCAFFOLD
from zofl_jax.algorithms.scaffold import scaffold

_ROWS = (
    *(DECOMFL, DECOMFL_GROUPS, HISO, FEDKSEED, FEDKSEED_PRO, FEEDSIGN, FEDZO, MEZO),
    *(FEDAVG, FEDPROX, FEDSGD, *FEDOPT, SCAFFOLD, FERRET, HYBRID),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
"""What each method says of itself, by its name; the first one is the default."""

__all__ = [
    "METHODS",
    "Method",
    "Parts",
    "Refusal",
    "decomfl",
    "decomfl_groups",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedkseed",
    "fedsgd",
    "fedyogi",
    "fedzo",
    "feedsign",
    "ferret",
    "hiso",
    "hybrid",
    "mezo",
    "scaffold",
]
