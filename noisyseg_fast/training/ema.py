"""Teachers: exponential moving averages of a network's parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def teacher_of(network: nn.Module) -> nn.Module:
    """A copy that wants no gradients.

    Keep it in train mode while training: its batch norms then use and collect the statistics of its own
    batches, which is how UA-MT, SSL4MIS and MTCL have it (buffers are not averaged), and its dropout is on.
    """
    return copy.deepcopy(network).requires_grad_(False)


def decay_at(step: int, most: float) -> float:
    """min(1 - 1 / (step + 1), most): 0 at step 0, where the teacher becomes the student (Tarvainen and Valpola
    2017, their code)."""
    return min(1 - 1 / (step + 1), most)


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, decay: float | Tensor) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, parameters only, after the optimiser's step.

    decay: a number, or a scalar tensor on their device, which no one waits for; a teacher with decay 1 stays
    bit for bit what it was.
    """
    teachers: list[Tensor] = list(teacher.parameters())
    students: list[Tensor] = list(student.parameters())
    if isinstance(decay, Tensor):
        difference = list(torch._foreach_sub(students, teachers))
        torch._foreach_mul_(difference, 1 - decay)
        torch._foreach_add_(teachers, difference)
    else:
        torch._foreach_lerp_(teachers, students, 1 - decay)
