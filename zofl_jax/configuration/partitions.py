"""Who owns which training example, from the settings that images and texts share."""

import numpy as np

from zofl_jax import keys
from zofl_jax.configuration.config import Config
from zofl_jax.data import partition


def share_out(
    config: Config,
    labels: np.ndarray,
    root: keys.RootKeys,
    client_ids: np.ndarray | None,
) -> partition.Partition:
    """Returns the partition that `--partition` names.

    Args:
      config: the run's settings.
      labels: integers [n], the training examples' classes.
      root: the run's keys.
      client_ids: the examples' natural owners [n]; needed for "natural" alone.

    Raises:
      ValueError: if the examples can't be shared out so.
    """
    num_clients, kind = config.num_clients, config.partition
    if kind == "iid":
        return partition.iid(root.partition, labels, num_clients)
    if kind == "dirichlet":
        return partition.dirichlet(
            root.partition, labels, num_clients, config.dirichlet_alpha, config.batch_size
        )
    if kind == "shards":
        return partition.shards(root.partition, labels, num_clients, config.shards_per_client)
    assert client_ids is not None, "the caller says where owners are missing"
    return partition.natural(client_ids)
