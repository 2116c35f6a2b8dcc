"""Evaluation that someone can believe: paired prompts, intervals, baselines beside every claim."""
