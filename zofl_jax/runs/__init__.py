"""Run directories: log, snapshots, fingerprints, repair, and how a simulation enters them."""
