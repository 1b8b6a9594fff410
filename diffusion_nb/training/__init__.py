"""The engine for training."""
