"""From settings to library objects: the config of a run, and what is built from it."""
