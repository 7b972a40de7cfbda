"""The recorded case of s4nj1th/tiny-recursive-model: its settings, weights and puzzles.

Imported by record_s4nj1th.py and by tests/test_gated_mlp.py.
"""

from __future__ import annotations

import torch
from golden.cases import digest
from parity import portable_integers, portable_uniform

SETTINGS = {"hidden_dim": 16, "L_layers": 2, "H_cycles": 2, "L_cycles": 3, "dropout": 0.0}


def fill(model: torch.nn.Module, prefix: str = "") -> None:
    """Portable weights, small enough that the recursion neither dies nor explodes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            width = p.shape[-1] if p.ndim else 1
            center = 1.0 if name.endswith("net.0.weight") else 0.0
            std = 0.4 if p.ndim == 0 or name.endswith("_gate") else 0.7 / width**0.5
            p.copy_(center + portable_uniform(p.shape or (1,), std, 3, name).float().view(p.shape))


def puzzles() -> tuple[torch.Tensor, torch.Tensor]:
    """Clues 0..9 and digits 1..9, each [5, 81] int64; no Sudoku, the model does not mind."""
    digits = portable_integers((5, 81), 1, 10, 5, "digits").long()
    given = portable_integers((5, 81), 0, 3, 5, "given") == 0
    return torch.where(given, digits, 0), digits


def state_digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of every entry."""
    return {name: digest(value) for name, value in state.items()}
