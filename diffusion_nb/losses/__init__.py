"""Objectives: one loss for each sample."""
