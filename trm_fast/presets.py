"""The presets: plain dictionaries of dotted keys, applied over the official base configuration.

Owns their values only. config imports it; it imports nothing. `sudoku-mini` is the default job:
the measured recipe for a CPU (38 thousand parameters, 60 to 90 ms a step on one core), `maze-mini`
one for mazes. The others are the command lines of the official README.
"""

from typing import Any

_PUZZLES_1K: dict[str, Any] = {
    "evaluators": [],
    "epochs": 50000,
    "eval_interval": 5000,
    "lr": 1e-4,
    "puzzle_emb_lr": 1e-4,
    "weight_decay": 1.0,
    "puzzle_emb_weight_decay": 1.0,
    "arch.L_layers": 2,
    "arch.H_cycles": 3,
    "arch.L_cycles": 6,
    "ema": True,
}
_ARC: dict[str, Any] = {"arch.L_layers": 2, "arch.H_cycles": 3, "arch.L_cycles": 4, "ema": True}

_SUDOKU_MINI: dict[str, Any] = {
    "data_paths": [],
    "evaluators": [],
    "generate": 20000,
    "augment": "sudoku",
    "curriculum": 0.2,
    "global_batch_size": 64,
    "steps": 1500,
    "optimizer": "adamw",
    "lr": 2e-2,
    "lr_min_ratio": 0.1,
    "lr_warmup_steps": 50,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "ema": True,
    "ema_rate": 0.99,
    "ema_warmup": True,
    "eval_interval": None,
    "eval_steps": 250,
    "eval_max_puzzles": 500,
    "keep": 3,
    "log_interval": 10,
    # A step on one thread takes 84 ms here, also beside a busy neighbour; on two that sleep
    # while they wait 123, on two that spin 73, but 200 beside the neighbour.
    "threads": 1,
    "arch.mlp_t": True,
    "arch.hidden_size": 48,
    "arch.num_heads": 4,
    "arch.intermediate_size": 96,
    "arch.token_intermediate_size": 96,
    "arch.L_layers": 1,
    "arch.H_cycles": 1,
    "arch.L_cycles": 2,
    "arch.halt_max_steps": 8,
    # Over 3 seeds .5 and .3 solve as many easy boards (96.5 and 96.7 %, deviation .3), .5 more
    # medium ones (38.0 and 35.9 %).
    "arch.halt_exploration_prob": 0.5,
    "arch.puzzle_emb_ndim": 0,
    "arch.puzzle_emb_len": 0,
    "arch.pos_encodings": "none",
    "arch.forward_dtype": "float32",
    "arch.q_readout": "mean",
    "arch.q_logits": 1,
    "arch.loss_type": "stablemax_cross_entropy",
}

PRESETS: dict[str, dict[str, Any]] = {
    "sudoku-mini": _SUDOKU_MINI,
    "sudoku-extreme": {
        **_PUZZLES_1K,
        "data_paths": ["data/sudoku-extreme-1k-aug-1000"],
        "arch.mlp_t": True,
        "arch.pos_encodings": "none",
    },
    "sudoku-extreme-attention": {
        **_PUZZLES_1K,
        "data_paths": ["data/sudoku-extreme-1k-aug-1000"],
    },
    "maze-mini": {
        **_SUDOKU_MINI,
        "generate": 30000,
        "generate_puzzle": "maze",
        "augment": "dihedral",
        "curriculum": 0.0,
        "steps": 2000,
        "optimizer": "muon",
        "lr": 2e-3,
        # .02 solves 32 and 37 % of seeds 0 and 1, .0035 is behind at 700 steps.
        "muon_lr": 0.006,
        "weight_decay": 0.02,
        # Every cell must learn who its neighbours are: as many hidden units as cells, and more.
        "arch.token_intermediate_size": 256,
        # A maze that stays for several supervision steps is learned by heart meanwhile, which hides
        # what all mazes have in common: with 12 steps the loss in training fell to .30, and unseen
        # mazes got worse. So the depth is within the step, and every step has new mazes.
        "arch.L_cycles": 7,
        "arch.halt_max_steps": 1,
        "arch.forward_dtype": "bfloat16",
        "arch.loss_type": "softmax_cross_entropy",
    },
    "maze-hard": {
        **_PUZZLES_1K,
        "data_paths": ["data/maze-30x30-hard-1k"],
        "arch.L_cycles": 4,
    },
    "arc1": {**_ARC, "data_paths": ["data/arc1concept-aug-1000"]},
    "arc2": {**_ARC, "data_paths": ["data/arc2concept-aug-1000"]},
    # The training of s4nj1th/tiny-recursive-model as its notebook has it.
    "gated-mlp": {
        "data_paths": ["data/sudoku.csv"],
        "evaluators": [],
        "global_batch_size": 64,
        "epochs": 50,
        "eval_interval": 1,
        "optimizer": "adamw",
        "lr": 1e-4,
        "lr_min_ratio": 0.0,
        "lr_warmup_steps": 0,
        "weight_decay": 1e-3,
        "weight_decay_on": "matrices",
        "beta2": 0.999,
        "grad_clip": 1.0,
        "constraint_weight": 0.1,
        "constraint_boxes": False,
        "keep": 3,
        "log_interval": 10,
        "arch.name": "gated_mlp@TinyRecursiveModel",
        "arch.hidden_size": 512,
        "arch.L_layers": 4,
        "arch.H_cycles": 6,
        "arch.L_cycles": 6,
        "arch.dropout": 0.0,
    },
}
