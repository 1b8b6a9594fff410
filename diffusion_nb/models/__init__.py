"""Trained models in folders."""
