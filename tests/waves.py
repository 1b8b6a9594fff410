"""Weights and pictures that anyone can make again: waves."""

import torch
from torch import Tensor


def wave(*shape: int, k: int = 0) -> Tensor:
    "sin(0.7 i + k), i counting the numbers of a tensor of this shape; float64."
    return (0.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + k).sin().reshape(shape)
