"""PPO on its own training loop."""
