"""Run directories: their files, metrics and lock, and the handling of SIGTERM."""
