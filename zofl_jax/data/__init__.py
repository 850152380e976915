"""Data: where examples come from, who owns them, and which ones make a batch."""
