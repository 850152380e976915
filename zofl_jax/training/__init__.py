"""Runs with all that surrounds the rounds: a log, resume, snapshots, and those who watch."""
