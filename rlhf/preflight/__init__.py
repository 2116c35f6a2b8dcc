"""Checks and estimates before a run: data, batch sizes, memory and speed, without training."""
