"""What is recorded, and the code that runs it: the same lines drive the official classes and ours.

Owns: the table of recorded cases, seeded batches and weights, one supervision step as a flat dict
of named values, and the count sketch that stands for large gradients in the files.
Imported by tests/golden/record.py (official side), tests/test_golden.py and tests/test_official.py.
Source: the drop-in interface of TinyRecursiveReasoningModel_ACTV1 and ACTLossHead; count sketch of
Charikar, Chen, Farach-Colton 2002: linear, so its error estimates the relative L2 of the whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from official import official_dict
from parity import portable_integers, portable_uniform, splitmix

SKETCH_OVER = 300
SKETCH_SIZE = 256


@dataclass(frozen=True)
class Case:
    """One recorded model. `official` changes the config of the official side only (see `twin`)."""

    name: str
    config: dict[str, Any]
    train: bool = True
    loss_type: str = "stablemax_cross_entropy"
    supervision_steps: int = 3
    oracle: bool = False
    # The official code crashes without puzzle embedding but with a prefix; a model with all-zero
    # puzzle rows means the same there.
    twin: bool = False
    seed: int = 0
    official: dict[str, Any] = field(default_factory=dict)

    @property
    def own_config(self) -> dict[str, Any]:
        return official_dict(**self.config)

    @property
    def official_config(self) -> dict[str, Any]:
        return official_dict(**self.config) | self.official


def _cases() -> list[Case]:
    mlp: dict[str, Any] = {"mlp_t": True, "pos_encodings": "none"}
    shallow = {"H_cycles": 1}
    bf16_block = {"H_cycles": 1, "L_cycles": 1, "forward_dtype": "bfloat16"}
    deep = mlp | {"L_cycles": 6, "L_layers": 2}
    evaluation = {"halt_max_steps": 2}
    no_rows = {"puzzle_emb_ndim": 0}
    rows = {"puzzle_emb_ndim": 32}
    return [
        Case("attn-rope", {}),
        Case("attn-rope-H1", shallow | {"L_layers": 2}),
        Case("attn-learned-ceil1", {"pos_encodings": "learned", "puzzle_emb_len": 0}),
        Case(
            "attn-none-pad",
            {"pos_encodings": "none", "puzzle_emb_len": 0, "puzzle_emb_ndim": 48, "num_heads": 2},
        ),
        Case("attn-rope-norows", no_rows | {"puzzle_emb_len": 0}),
        Case("attn-rope-zeroprefix", no_rows, twin=True, official=rows),
        Case("attn-rope-eval", evaluation, train=False),
        Case("attn-rope-softmax", shallow, loss_type="softmax_cross_entropy"),
        Case("attn-rope-continue", {"no_ACT_continue": False, "halt_max_steps": 4}),
        Case("mlp-none-H1", mlp | shallow | {"puzzle_emb_len": 3}),
        Case("mlp-learned-H1", mlp | shallow | {"pos_encodings": "learned", "seq_len": 14}),
        Case("mlp-rope-H1", mlp | shallow | {"pos_encodings": "rope"}),
        Case("mlp-none-norows-H1", mlp | shallow | no_rows | {"puzzle_emb_len": 0}),
        Case(
            "mlp-learned-zeroprefix-H1",
            mlp | shallow | no_rows | {"pos_encodings": "learned"},
            twin=True,
            official=rows,
        ),
        Case("mlp-none-deep", deep, oracle=True),
        Case("mlp-learned-deep", deep | {"pos_encodings": "learned"}, oracle=True),
        Case("mlp-none-deep-eval", deep | evaluation, train=False, oracle=True),
        Case("mlp-none-continue-H1", mlp | shallow | {"no_ACT_continue": False}),
        Case("attn-rope-bf16-block", bf16_block, oracle=True),
        Case("attn-learned-bf16-block", bf16_block | {"pos_encodings": "learned"}, oracle=True),
        Case("mlp-none-bf16-block", bf16_block | mlp, oracle=True),
        Case("mlp-none-bf16-block-eval", bf16_block | mlp | evaluation, train=False, oracle=True),
        Case(
            "attn-none-fp16-block",
            bf16_block | {"pos_encodings": "none", "forward_dtype": "float16"},
            oracle=True,
        ),
    ]


def _variants() -> list[Case]:
    """The networks that TRM is compared with."""
    mlp: dict[str, Any] = {"mlp_t": True, "pos_encodings": "none"}
    six = {"name": "trm_hier6", "L_cycles": 6}
    one = {"name": "trm_singlez"}
    official = {"puzzle_emb_len": 0, "no_ACT_continue": False}
    hrm = {"name": "hrm", "H_cycles": 2, "H_layers": 2, "L_layers": 2, "halt_max_steps": 4}
    plain = {"name": "transformers_baseline", "H_cycles": 1, "L_cycles": 1, "H_layers": 3}
    hrm, plain = hrm | official, plain | official
    bf16, evaluation = {"forward_dtype": "bfloat16"}, {"halt_max_steps": 2}
    return [
        Case("singlez-attn", one | {"L_layers": 2}),
        Case("singlez-mlp-H1", one | mlp | {"H_cycles": 1}),
        Case("singlez-mlp-deep", one | mlp | {"L_cycles": 6, "L_layers": 2}, oracle=True),
        Case("singlez-bf16-block", one | bf16 | {"H_cycles": 1, "L_cycles": 1}, oracle=True),
        Case("hier6-attn", six | {"H_cycles": 2}, oracle=True),
        Case("hier6-attn-three", six | {"L_cycles": 3, "pos_encodings": "learned"}),
        Case("hier6-mlp-H1-continue", six | mlp | {"H_cycles": 1, "no_ACT_continue": False}),
        Case("hier6-eval", six | evaluation, train=False),
        Case("hrm-attn", hrm),
        Case("hrm-one-cycle", hrm | {"H_cycles": 1, "L_cycles": 3, "H_layers": 1}),
        Case("hrm-mlp", hrm | mlp | {"L_layers": 1, "H_layers": 1}, oracle=True),
        Case("hrm-eval", hrm | evaluation, train=False),
        Case("hrm-bf16-block", hrm | bf16 | {"H_cycles": 1, "L_cycles": 1}, oracle=True),
        Case("baseline-rope", plain | {"num_heads": 3}),  # heads of 10 of 32 features
        Case("baseline-learned", plain | {"pos_encodings": "learned"}),
        Case("baseline-softmax", plain, loss_type="softmax_cross_entropy"),
        Case("baseline-act-inference", plain | {"act_inference": True}, train=False),
        Case("baseline-bf16-block", plain | bf16 | {"H_layers": 1}, oracle=True),
    ]


CASES = {case.name: case for case in [*_cases(), *_variants()]}

# Configs whose seeded initial weights are recorded as hashes; the last four are the published ones.
_SUDOKU = {
    "batch_size": 768,
    "seq_len": 81,
    "vocab_size": 11,
    "num_puzzle_identifiers": 1,
    "hidden_size": 512,
    "puzzle_emb_ndim": 512,
    "num_heads": 8,
    "L_cycles": 6,
    "L_layers": 2,
    "puzzle_emb_len": 16,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "bfloat16",
}
_SEEDED = (
    "attn-rope",
    "attn-rope-H1",
    "attn-learned-ceil1",
    "attn-none-pad",
    "attn-rope-norows",
    "attn-none-fp16-block",
    "mlp-none-bf16-block",
    "mlp-learned-deep",
    "mlp-none-norows-H1",
    "singlez-attn",
    "hier6-attn",
    "hrm-mlp",
    "baseline-rope",
    "baseline-learned",
)
_HRM = {"L_cycles": 2, "H_layers": 4, "L_layers": 4, "halt_max_steps": 16}
_BASELINE = {"H_layers": 8, "num_heads": 12, "pos_encodings": "rope"}
_GRID30 = _SUDOKU | {"seq_len": 900, "L_cycles": 4}
INITIAL: dict[str, dict[str, Any]] = {
    **{name: CASES[name].official_config for name in _SEEDED},
    "sudoku-mlp": official_dict(**(_SUDOKU | {"mlp_t": True, "pos_encodings": "none"})),
    "sudoku-attention": official_dict(**_SUDOKU),
    "maze-attention": official_dict(**(_GRID30 | {"vocab_size": 6})),
    "arc-attention": official_dict(
        **(_GRID30 | {"vocab_size": 12, "num_puzzle_identifiers": 9, "batch_size": 8})
    ),
    "sudoku-hrm": official_dict(**(_SUDOKU | CASES["hrm-attn"].config | _HRM)),
    "sudoku-baseline": official_dict(**(_SUDOKU | CASES["baseline-learned"].config | _BASELINE)),
}


def step_seed(seed: int, step: int) -> int:
    """The global torch seed set before a supervision step: halting draws are part of the case."""
    return 7000 + 16 * seed + step


def digest(tensor: torch.Tensor) -> str:
    """sha256 over the bytes of a tensor, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.dtype != torch.bool else flat.to(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def compact(tensor: torch.Tensor, over: int | None = SKETCH_OVER) -> torch.Tensor:
    """float32; a tensor of more than `over` elements becomes its count sketch [SKETCH_SIZE]."""
    flat = tensor.detach().double().cpu()
    if over is None or flat.numel() <= over:
        return flat.float()
    hashes = splitmix(flat.numel(), flat.numel(), "sketch")
    bucket = torch.from_numpy((hashes >> 1).astype("int64") % SKETCH_SIZE)
    sign = torch.from_numpy((hashes & 1).astype("float64") * 2.0 - 1.0)
    sketch = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
    return sketch.index_add_(0, bucket, flat.reshape(-1) * sign).float()


def fill_weights(model: torch.nn.Module, seed: int, *, zero_rows: bool = False) -> None:
    """Portable seeded values into every state_dict entry, of the size that training begins with.

    Unlike the real start, puzzle rows and q_head are not zero: gradients flow everywhere.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            std = 1.0 / math.sqrt(tensor.shape[-1])
            if name.endswith("_init"):
                std = 1.0
            elif name.endswith("q_head.weight"):
                std *= 1.5
            elif name.endswith("q_head.bias"):
                std = 0.1
            elif name.endswith("puzzle_emb.weights") and zero_rows:
                std = 0.0
            tensor.copy_(portable_uniform(tensor.shape, std, seed, name).float())


def make_batch(config: dict[str, Any], seed: int, step: int) -> dict[str, torch.Tensor]:
    """A batch with unlabelled cells: all of the last row (padding), all but one of that before."""
    rows, length, vocab = config["batch_size"], config["seq_len"], config["vocab_size"]
    inputs = portable_integers((rows, length), 1, vocab, seed, f"inputs{step}")
    labels = portable_integers((rows, length), 1, vocab, seed, f"labels{step}")
    unlabelled = portable_integers((rows, length), 0, 5, seed, f"mask{step}") == 0
    labels = torch.where(unlabelled, -100, labels).to(torch.int32)
    if rows > 1:
        labels[-1] = -100
    if rows > 2:
        labels[-2, 1:] = -100
        labels[-2, 0] = inputs[-2, 0]
    identifiers = portable_integers(
        (rows,), 0, config["num_puzzle_identifiers"], seed, f"identifiers{step}"
    )
    return {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient by parameter name, that of the puzzle rows under its buffer's name."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, buffer in model.named_buffers():
        if buffer.requires_grad and buffer.grad is not None:
            found[name] = buffer.grad
    return found


def states(inner_carry: Any) -> dict[str, torch.Tensor]:
    """The recurrent states of either code's carry, by name."""
    return {f.name: getattr(inner_carry, f.name) for f in dataclasses.fields(inner_carry)}


def clear_gradients(model: torch.nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.grad = None


def run_step(
    head: torch.nn.Module, carry: Any, batch: dict[str, torch.Tensor], seed: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    """One supervision step of either head: the new carry, and every value it made by name.

    Names: those of the states (z_H, z_L, ...), steps, halted, data/<key>, out/<key>, loss,
    metric/<key>, grad/<parameter>, random (hash of the generator state afterwards: the same draws
    were made).
    """
    clear_gradients(head)
    torch.manual_seed(seed)
    keys = ["logits", "preds", "q_halt_logits", "q_continue_logits", "target_q_continue"]
    keys.append("actual_steps")
    carry, loss, metrics, outputs, all_halted = head(return_keys=keys, carry=carry, batch=batch)
    if head.training:
        loss.backward()
    result = {
        **states(carry.inner_carry),
        "steps": carry.steps,
        "halted": carry.halted,
        "loss": loss.detach(),
        "random": torch.tensor(int(digest(torch.get_rng_state())[:15], 16)),
    }
    assert bool(all_halted) == bool(carry.halted.all())
    result |= {f"data/{k}": v for k, v in carry.current_data.items()}
    result |= {f"out/{k}": v for k, v in outputs.items()}
    result |= {f"metric/{k}": v for k, v in metrics.items()}
    if head.training:
        result |= {f"grad/{k.removeprefix('model.')}": v for k, v in gradients(head).items()}
    return carry, {k: v.detach().clone() for k, v in result.items()}
