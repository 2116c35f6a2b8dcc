"""Stages on a transformers Trainer: pretraining, SFT, reward model, classifier."""
