"""The command line `rlhf`: commands, options and their help. It holds no logic; each command imports its work only
when it runs, so that help and configuration errors are instant."""
