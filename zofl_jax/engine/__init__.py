"""Rounds, compiled and on devices: the loop, its replay, what is sent and computed."""
