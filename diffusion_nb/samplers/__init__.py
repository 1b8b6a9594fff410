"""Samplers: plain functions (denoiser, x, times, …) ↦ x."""
