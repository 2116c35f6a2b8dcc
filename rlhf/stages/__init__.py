"""One file a stage: run(config, console) -> RunResult, straight-line."""
