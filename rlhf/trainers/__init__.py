"""SFT and reward model on TRL's trainers, PPO on our own loop."""
