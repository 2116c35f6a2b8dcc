"""Evaluation: paired comparisons on the same prompts, confidence intervals, and baselines."""
