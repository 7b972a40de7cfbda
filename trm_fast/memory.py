"""How much memory a training step needs, and which policy of `deep_recursion` fits.

Owns the arithmetic only; runs nothing on a device. Imported by `model.py` (policy "auto") and by
the trainer, which refuses a run that cannot fit before its first step. Each implementation of
`deep_recursion` has its own counts, tested against the tensors that are really kept; `engine` names
it, as backends are named: "reference", "triton", "cuda" or "cpp".

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t widths of the two SwiGLUs.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from trm_fast.config import ModelConfig
from trm_fast.extension import library
from trm_fast.ops import POLICIES

GIB = 2**30
CONTROL_GROUP = Path("/sys/fs/cgroup")


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters, puzzle rows not counted."""
    if config.kind == "gated_mlp":
        return _gated_parameters(config)
    d, f = config.hidden_size, config.channel_width
    attention = 4 * d * config.attention_width
    mixer = 3 * config.total_len * config.token_width if config.mlp_t else attention
    positions = config.total_len * d if config.pos_encodings == "learned" else 0
    heads = 2 * config.vocab_size * d + config.q_logits * (d + 1)
    return config.blocks * (mixer + 3 * d * f) + heads + positions


def _gated_parameters(config: ModelConfig) -> int:
    d, f = config.hidden_size, round(config.expansion * config.hidden_size)
    cells, channels = config.seq_len, config.vocab_size - 1
    whole = 1 if config.cell_attention else cells
    ends = whole * channels * d + d + (d + 1) * whole * (channels - 1)
    attention = config.L_layers * (4 * d * d + 6 * d) + cells * d if config.cell_attention else 0
    gates = 2 * d if config.vector_gates else 2
    return ends + attention + gates + config.blocks * (2 * d * f + f + 3 * d)


def _gated_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that `gated_mlp` keeps for the backward, at its worst moment."""
    d, f = config.hidden_size, round(config.expansion * config.hidden_size)
    states = config.seq_len if config.cell_attention else 1
    block = states * (3 * d + 2 * f + (7 * d if config.cell_attention else 0))
    onehot = config.seq_len * (config.vocab_size - 1)
    if policy == "save":
        return onehot + config.passes[0] * block
    return onehot + 3 * states * d * sum(config.gated_passes) + max(config.L_layers, 2) * block


def saved_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that one block keeps for the backward of one pass, its input included."""
    s, d = config.total_len, config.hidden_size
    if policy == "recompute":
        return 0
    gate_up = 0 if policy == "light" else 3
    channel = gate_up * config.channel_width * s + 2 * s * d
    if policy == "light":
        channel -= s * d
    if config.mlp_t:
        mixer = gate_up * config.token_width * d + (s * d if policy == "light" else 2 * s * d)
    else:
        rotated = 2 if config.pos_encodings == "rope" else 0  # q and k; v is a view of q, k, v
        e = config.attention_width
        mixer = (
            2 * s * d + (4 + rotated) * s * e
        )  # h and the sum before the norm; q, k, v; attended
    return channel + mixer


def _reference_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that the reference's recursion holds at its worst moment.

    "recompute" holds what "save" keeps of one pass and "light" that of one block.
    """
    if config.kind == "gated_mlp":
        return _gated_elements(config, policy)
    _, blocks, passes = config.passes
    if policy == "save":
        return blocks * saved_elements(config, policy)
    if policy == "light":
        one_block = saved_elements(config, "save")
        return blocks * saved_elements(config, policy) + one_block
    state = config.total_len * config.hidden_size
    longest = max(config.L_layers, config.blocks - config.L_layers)
    return passes * state + longest * saved_elements(config, "save")


def _triton_tape(config: ModelConfig, with_gate_up: bool) -> int:
    """Elements per item that the kernels keep of one pass."""
    state, inner = config.total_len * config.hidden_size, config.channel_width * config.total_len
    gate_up = 2 * inner if with_gate_up else 0
    if config.mlp_t:  # each block's input, its mixer's output and its sum
        return config.L_layers * (3 * state + gate_up)
    # the first block's input; of each q, k, v, attended, two sums
    return state + config.L_layers * (6 * state + gate_up)


def _triton_saved(config: ModelConfig, policy: str) -> int:
    passes = config.L_cycles + 1
    if policy == "recompute":  # the state before each pass, and what is injected into it
        return (passes + 2) * config.total_len * config.hidden_size
    return passes * _triton_tape(config, policy == "save")


def _triton_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that the kernels' recursion holds at its worst moment, in its backward."""
    s, d, f = config.total_len, config.hidden_size, config.channel_width
    gradients = (1 if config.mlp_t else 2) * s * d + f * s  # of the sums, and silu(gate) * up
    if policy == "light":  # the others write the rest over what they kept
        gradients += 2 * f * s + (0 if config.mlp_t else 5 * s * d)
    work = config.L_layers * gradients * (config.L_cycles + 1 if policy == "save" else 1)
    if policy == "recompute":
        work += _triton_tape(config, with_gate_up=True)
    mixer = 3 * config.token_width * d + 2 * s * d if config.mlp_t else 2 * s * d
    return _triton_saved(config, policy) + work + mixer


def _cpp_tape(config: ModelConfig, with_gate_up: bool) -> int:
    """Elements per item that the CPU engine keeps of the blocks of one pass."""
    s, d, padded = config.total_len, config.hidden_size, -(-config.channel_width // 16) * 16
    states = 2 if config.mlp_t else 6  # after both halves; q, k, v and attended
    gate_up = 2 * padded * s + (2 * config.token_width * d if config.mlp_t else 0)
    return config.L_layers * (states * s * d + (gate_up if with_gate_up else 0))


def _cpp_saved(config: ModelConfig, policy: str) -> int:
    passes, state = config.L_cycles + 1, config.total_len * config.hidden_size
    tape = 0 if policy == "recompute" else _cpp_tape(config, policy == "save")
    # Of the last pass the token mixer's gate and up are not kept.
    left_out = 2 * config.token_width * config.hidden_size if config.mlp_t else 0
    return passes * (state + tape) - (config.L_layers * left_out if policy == "save" else 0)


def _cpp_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that the CPU engine holds at its worst moment, in its backward."""
    s, d, f = config.total_len, config.hidden_size, config.channel_width
    work = 6 * s * d + 3 * f * s  # gradients of states and sums, of gate and up, silu(gate) * up
    work += 3 * config.token_width * d + s * d if config.mlp_t else 5 * s * d
    if policy == "recompute":
        work += _cpp_tape(config, with_gate_up=True)
    return _cpp_saved(config, policy) + work


def _cuda_tape(config: ModelConfig, with_gate_up: bool) -> int:
    """Elements per item that the CUDA library keeps of the blocks of one pass."""
    s, d = config.total_len, config.hidden_size
    states = 2 if config.mlp_t else 6  # after both halves; q, k, v and attended
    gate_up = 2 * config.channel_width * s if with_gate_up else 0
    return config.L_layers * (states * s * d + gate_up)


def _cuda_saved(config: ModelConfig, policy: str) -> int:
    passes, state = config.L_cycles + 1, config.total_len * config.hidden_size
    tape = 0 if policy == "recompute" else _cuda_tape(config, policy == "save")
    return passes * (state + tape)


def _cuda_elements(config: ModelConfig, policy: str) -> int:
    """Elements per item that the CUDA library holds at its worst moment, in its backward."""
    s, d, f = config.total_len, config.hidden_size, config.channel_width
    # silu(gate) * up's gradient, both halves' (and both halves again); or the mixer's own.
    channel = s * d + (5 if policy == "light" else 3) * f * s
    mixer = 2 * s * d + (5 * config.token_width * d if config.mlp_t else 6 * s * d)
    wide = 1 if config.forward_dtype == "float32" else 2  # the gradient of x is a float32 sum
    work = (2 + wide) * s * d + max(channel, mixer)
    if policy == "recompute":
        work += _cuda_tape(config, with_gate_up=True)
    return _cuda_saved(config, policy) + work


_SAVED = {"triton": _triton_saved, "cuda": _cuda_saved, "cpp": _cpp_saved}
_WORST = {
    "reference": _reference_elements,
    "triton": _triton_elements,
    "cuda": _cuda_elements,
    "cpp": _cpp_elements,
}


def engine_saved_elements(config: ModelConfig, policy: str, engine: str) -> int:
    """Elements per item that an engine's recursion keeps for its backward; not the reference."""
    return _SAVED[engine](config, policy)


def step_bytes(config: ModelConfig, batch: int, policy: str, engine: str = "reference") -> int:
    """Memory of one training step of `batch` items: weights, optimizer, states, saved tensors.

    Weights count five times (themselves, gradient, two moments, EMA).
    """
    size = torch.empty((), dtype=getattr(torch, config.forward_dtype)).element_size()
    params = parameter_count(config)
    rows = config.num_puzzle_identifiers * config.puzzle_emb_ndim
    state = config.total_len * config.hidden_size
    per_item = _WORST[engine](config, policy)
    if config.latents > 1:  # all go forward before one goes back
        forward = config.latents * (6 * state + saved_elements(config, "save"))
        per_item = max(per_item, forward) + (config.latents - 1) * state
    loss = 8 * config.seq_len * config.vocab_size * 5  # stablemax in float64
    casts = config.passes[1] / config.blocks if engine == "reference" else 1
    casts = 1 if policy == "recompute" else casts
    cast = int(casts * params * size) if size != 4 else 0
    states = (4 + config.states) * state * size
    return 4 * (5 * params + rows) + cast + batch * (per_item * size + states + loss)


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still take on the device, in bytes."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        reusable = sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            # Those of captured graphs are theirs, also while they are not replayed.
            if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
        )
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_host_bytes() + library.kept_memory()


def _free_host_bytes() -> int:
    """What the machine has left, or the container's limit (cgroup v2) leaves, if that is less."""
    free = [_available()]
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        free.append(limit - used + int(stat.get("inactive_file", 0)))  # caches give way
    except (OSError, ValueError):  # no control groups, or "max": no limit
        pass
    return max(0, min(free))


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux: all of it, where that can be asked
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return 4 * GIB
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fastest_policy(
    config: ModelConfig, batch: int, device: torch.device, engine: str = "reference"
) -> str:
    """The first of "save", "light", "recompute" whose step fits nine tenths of the free memory."""
    if device.type not in ("cpu", "cuda", "mps"):
        return "save"
    budget = 0.9 * free_bytes(device)
    fitting = (p for p in POLICIES if step_bytes(config, batch, p, engine) <= budget)
    return next(fitting, _leanest(config, batch, engine))


def _leanest(config: ModelConfig, batch: int, engine: str) -> str:
    """The policy whose step needs least: "light" or "recompute", by the shape of the model."""
    return min(POLICIES, key=lambda policy: step_bytes(config, batch, policy, engine))


def check_fits(
    config: ModelConfig, batch: int, device: torch.device, engine: str = "reference"
) -> int:
    """Estimated bytes of a training step of `batch` items.

    Raises:
        ValueError: the step cannot fit; one line naming a policy or a batch size that does.
    """
    free = free_bytes(device)
    policy = config.policy
    if policy == "auto":
        policy = fastest_policy(config, batch, device, engine)
    need = step_bytes(config, batch, policy, engine)
    if need <= free:
        return need
    said = (
        f"a training step of {batch} boards needs about {need / GIB:.1f} GiB on {device} with "
        f"arch.policy={policy}, {free / GIB:.1f} GiB are free"
    )
    for other in POLICIES:
        if step_bytes(config, batch, other, engine) <= free:
            raise ValueError(f"{said}; arch.policy={other} fits")
    smaller = batch
    while smaller and step_bytes(config, smaller, _leanest(config, smaller, engine), engine) > free:
        smaller //= 2
    if not smaller:
        raise ValueError(f"{said}; no batch size fits: make the model smaller")
    leanest = _leanest(config, smaller, engine)
    raise ValueError(
        f"{said}; {smaller} at a time with arch.policy={leanest} fit: "
        f"global_batch_size={smaller}, or more grad_accum"
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether PyTorch failed because memory ran out: each device has its own words for it."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
