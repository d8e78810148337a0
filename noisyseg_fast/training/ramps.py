"""Weights that rise in the course of training, each from a start to 1 over `length` steps, then 1."""

from __future__ import annotations

import math


def gaussian(step: float, length: float) -> float:
    """exp(-5 (1 - t)^2), t = step / length clipped to [0, 1] (Laine and Aila 2017; UA-MT's "sigmoid_rampup").

    From 0.0067 at step 0. Every code has this one.
    """
    return math.exp(-5 * (1 - linear(step, length)) ** 2)


def exponential(step: float, length: float) -> float:
    """exp(-5 (1 - t)): as DTML prints it (sec. 3.2), without the square. It is never above the Gaussian."""
    return math.exp(-5 * (1 - linear(step, length)))


def linear(step: float, length: float) -> float:
    """step / length, clipped to [0, 1]; 1 when length is 0."""
    return min(max(step / length, 0.0), 1.0) if length > 0 else 1.0
