"""Learning rates, and decays of averages, as functions of the step."""

import math
from collections.abc import Callable


def warmup_cosine(peak: float, warmup: int, steps: int) -> Callable[[int], float]:
    "k ↦ the learning rate: up to `peak` in `warmup` steps, down to 0 along a cosine at `steps`."
    return lambda k: peak * min((k + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * k / steps))


def warmup_constant(peak: float, warmup: int) -> Callable[[int], float]:
    "k ↦ the learning rate: up to `peak` in `warmup` steps, then constant, as in DDPM."
    return lambda k: peak * min((k + 1) / warmup, 1.0)


def linear_decay(lr: float, steps: int) -> Callable[[int], float]:
    "k ↦ the learning rate, from lr down to 0 in a line."
    return lambda k: lr * (1 - k / steps)


def warmed_up(decay: float) -> Callable[[int], float]:
    "k ↦ the decay of an average that is short at first: min(decay, (1 + k)/(10 + k)). Raises ValueError for a decay outside [0, 1)."
    if not 0 <= decay < 1:
        raise ValueError(f"ema: expected a decay in [0, 1), or a function of the step; got {decay}")
    return lambda k: min(decay, (1 + k) / (10 + k))
