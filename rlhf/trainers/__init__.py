"""Training loops: SFT, reward model and classifier on the Trainers of TRL and transformers; PPO on its own loop."""
