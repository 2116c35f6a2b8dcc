"""Stages: one module each, with `run(config, console) -> RunResult`."""
