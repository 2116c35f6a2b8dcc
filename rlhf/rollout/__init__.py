"""The data of PPO's rollouts: their types, the forward passes that score them, rewards, and the step from scores to
advantages and returns. Sampling the responses is in `rlhf.generation`."""
