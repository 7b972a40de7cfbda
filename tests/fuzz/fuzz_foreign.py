"""Small files of other projects to begin with. Imported by fuzz_parsers."""

from __future__ import annotations

import json
import sys
from functools import cache

import safetensors.torch
import torch
from foreign_models import D, lucidrains_weights, nano_weights, rs_weights, s4nj1th_weights
from fuzz_inputs import Files, saved
from torch import Tensor

from trm_fast.overrides import emit_yaml

GIVEN = {
    "official": {"seq_len": 9},
    "rs": {"H_cycles": 2, "L_cycles": 2, "num_heads": 2, "seq_len": 9},
    "nano-trm": {},
    "lucidrains": {"H_cycles": 2, "L_cycles": 2, "num_heads": 2, "seq_len": 9},
    "s4nj1th": {},
}
"""What the reader of each format is given beside the file."""

ARCH = {
    **{"name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1", "H_cycles": 2},
    **{"L_cycles": 2, "num_heads": 2, "expansion": 4, "pos_encodings": "rope"},
    **{"halt_max_steps": 4, "halt_exploration_prob": 0.1, "puzzle_emb_len": 1},
    **{"loss": {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"}},
}


def _narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with an inner width of 8 instead of 256, so that most of a file is structure."""
    result = {}
    for name, value in weights.items():
        if "gate_up_proj" in name:
            value = value[:16]
        elif "down_proj" in name:
            value = value[:, :8]
        result[name] = value.clone()
    return result


@cache
def official() -> tuple[Files, ...]:
    weights = _narrow(nano_weights(7, prefix=1))
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in (
            ("lenet.layers.", "L_level.layers."),
            ("input_embedding.", "embed_tokens."),
            ("z_H_init", "H_init"),
            ("z_L_init", "L_init"),
        ):
            name = name.replace(theirs, ours)
        renamed[f"_orig_mod.model.inner.{name}"] = value
    renamed["_orig_mod.model.inner.puzzle_emb.weights"] = torch.ones(3, D)
    beside = emit_yaml({"arch": ARCH}).encode()
    return (
        {"step_12": saved(renamed), "all_config.yaml": beside},
        {"step_12": saved(renamed, new=False), "all_config.yaml": beside},
    )


@cache
def rs() -> tuple[Files, ...]:
    data = safetensors.torch.save(_narrow(rs_weights(layers=1)))
    said = {"h_cycles": 2, "l_cycles": 2, "num_heads": 2, "seq_len": 9}
    meta = {"step": 4, "lr": 1e-4, "loss": 0.5, "config": json.dumps(said)}
    beside = json.dumps(meta).encode()
    return ({"m.safetensors": data}, {"m.safetensors": data, "m.safetensors.meta.json": beside})


@cache
def nano() -> tuple[Files, ...]:
    weights = _narrow(nano_weights(7))
    hyper = {
        **{"hidden_size": D, "num_layers": 2, "num_heads": 2, "H_cycles": 2, "L_cycles": 2},
        **{"N_supervision": 4, "ffn_expansion": 4, "halt_exploration_prob": 0.1},
        **{"rope_theta": 10000, "pos_emb_type": "1d", "puzzle_emb_len": 0, "vocab_size": 7},
        **{"num_puzzles": 3, "batch_size": 2, "seq_len": 16, "forward_dtype": torch.float32},
    }
    document = {
        "epoch": 3,
        "global_step": 120,
        "state_dict": weights,
        "callbacks": {"EMACallback": {"shadow": {"lm_head.weight": weights["lm_head.weight"]}}},
        "hyper_parameters": hyper,
    }
    return ({"m.ckpt": saved(document)},)


@cache
def lucidrains() -> tuple[Files, ...]:
    return ({"m.pt": saved(_narrow(lucidrains_weights()))},)


class TRMConfig:
    """As that project's script has it, in __main__."""


@cache
def s4nj1th() -> tuple[Files, ...]:
    weights = s4nj1th_weights((1,), width=8, layers=1)
    plain = {"H_cycles": 2, "L_cycles": 3, "dropout": 0.1, "hidden_dim": 8}
    config = TRMConfig()
    vars(config).update(plain)
    main = sys.modules["__main__"]
    TRMConfig.__module__, TRMConfig.__qualname__ = "__main__", "TRMConfig"
    main.TRMConfig = TRMConfig  # type: ignore[attr-defined]
    try:
        best = saved({"model_state_dict": weights, "config": config, "train_losses": [1.0]})
    finally:
        del main.TRMConfig  # type: ignore[attr-defined]
    head = s4nj1th_weights((), width=8, layers=1)
    return ({"m.pt": best}, {"m.pt": saved({"model_state_dict": head, "config": plain})})
