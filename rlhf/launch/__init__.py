"""Launching a stage in several processes under `accelerate launch`, and supervising them."""
