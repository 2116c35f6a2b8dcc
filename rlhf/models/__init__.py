"""Models: load them from folders, add heads and adapters, select parameters, pack batches, offload and average weights.
What depends on the training engine is in `rlhf.distributed`."""
