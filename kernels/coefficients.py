"""The six numbers of an optimizer step that change from step to step, in one small tensor.

Owns their meaning. A kernel that reads them from memory can be replayed by a CUDA graph, which
would repeat arguments. Imported by every implementation of `adam_atan2_ema_`; imports torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_coefficients(
    device: torch.device,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    found_inf: float | Tensor = 0.0,
) -> Tensor:
    """[6] float64 (float32 on MPS) on `device`, without waiting for it; numbers or 0-d tensors.

    scale of the gradient; decay = 1 - lr wd; rate = lr / (1 - beta1^step); 1 - beta2^step;
    1 - ema_decay; and 1 where the step is left out, because the gradient is not finite, else 0.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    given = (lr, step, ema_decay, grad_scale, found_inf)
    if not any(isinstance(value, Tensor) for value in given):
        values = [
            grad_scale,
            1 - lr * weight_decay,
            lr / (1 - beta1**step),
            1 - beta2**step,
            1 - ema_decay,
            float(found_inf != 0),
        ]
        return torch.tensor(values, dtype=wide).to(device)
    # Numbers are filled in, not copied to the device: a graph cannot be captured around a copy.
    lr, step, ema_decay, grad_scale, found_inf = (
        value.to(device, wide)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=wide, device=device)
        for value in given
    )
    one = torch.ones_like(lr)
    return torch.stack(
        [
            grad_scale * one,
            1 - lr * weight_decay,
            lr / (1 - beta1**step),
            1 - beta2**step,
            1 - ema_decay * one,
            (found_inf != 0).to(wide) * one,
        ]
    )
