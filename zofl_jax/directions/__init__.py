"""Directions drawn from keys, derivatives along them, and losses on params that they perturb."""
