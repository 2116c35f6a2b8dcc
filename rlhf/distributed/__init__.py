"""What depends on the training engine or on several processes: the Accelerator, DeepSpeed and ZeRO, the launcher's
environment, and heartbeats. It does not start processes; `rlhf.launch` does."""
