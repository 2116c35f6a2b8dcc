"""Checkpoints on disk: verified folders, engine-independent files of parameters and Adam state, and how often to save.
What else a stage puts into its checkpoints is decided in `rlhf.trainers`."""
