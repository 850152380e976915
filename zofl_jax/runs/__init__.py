"""Run directories: their log, snapshots, fingerprints and repair, and how a simulation enters them."""
