"""Who owns which training example, from the flags that images and texts share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from zofl_jax import keys
from zofl_jax.data import partition


def share_out(
    values: Mapping[str, Any],
    labels: np.ndarray,
    root: keys.RootKeys,
    client_ids: np.ndarray | None,
) -> partition.Partition:
    """Returns the partition that `--partition` names.

    Args:
      values: the run's flags.
      labels: integers [n], the training examples' classes.
      root: the run's keys.
      client_ids: the examples' natural owners [n]; needed for "natural" alone.

    Raises:
      ValueError: if the examples can't be shared out so.
    """
    num_clients, kind = values["num_clients"], values["partition"]
    if kind == "iid":
        return partition.iid(root.partition, labels, num_clients)
    if kind == "dirichlet":
        return partition.dirichlet(
            root.partition, labels, num_clients, values["dirichlet_alpha"], values["batch_size"]
        )
    if kind == "shards":
        return partition.shards(root.partition, labels, num_clients, values["shards_per_client"])
    assert client_ids is not None, "the caller says where owners are missing"
    return partition.natural(client_ids)
