"""Prompts to rollouts to experience."""
