"""Likelihoods and codes."""
